// Resolves credentials through the default provider chain and prints one line of JSON; then again for every line that
// comes in, by a new configuration.
process.env.AWS_SDK_JS_SUPPRESS_MAINTENANCE_MODE_MESSAGE = "1";
const readline = require("readline");
const AWS = require("aws-sdk");

function resolve() {
  const line = { version: `aws-sdk ${AWS.VERSION}, node ${process.version}` };
  const began = process.hrtime.bigint();
  const config = new AWS.Config();
  return new Promise((done) => {
    config.getCredentials((error) => {
      line.ms = Number((process.hrtime.bigint() - began) / 1000000n);
      const found = config.credentials;
      if (error || !found || !found.accessKeyId) {
        line.error = error ? `${error.code || error.name}: ${error.message}` : "no error, and no access key id";
      } else {
        line.access_key_id = found.accessKeyId;
        line.expires = found.expireTime ? new Date(found.expireTime).toISOString() : null;
        line.source = found.constructor.name;
      }
      console.log(JSON.stringify(line));
      done();
    });
  });
}

(async () => {
  await resolve();
  for await (const _ of readline.createInterface({ input: process.stdin })) await resolve();
  process.exit();
})();
