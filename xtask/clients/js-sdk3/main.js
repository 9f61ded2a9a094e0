// Resolves credentials through the default node provider chain, that of any client, and prints one line of JSON; then
// again for every line that comes in, by a new client, or with the argument `keep` by the same one.
const readline = require("readline");
const { STSClient } = require("@aws-sdk/client-sts");
const { version } = require("@aws-sdk/client-sts/package.json");

const keep = process.argv.includes("keep");
let client;

async function resolve() {
  const line = { version: `client-sts ${version}, node ${process.version}` };
  const began = process.hrtime.bigint();
  try {
    if (!client || !keep) client = new STSClient({ region: "us-east-1" });
    const found = await client.config.credentials();
    line.access_key_id = found.accessKeyId;
    line.expires = found.expiration ? new Date(found.expiration).toISOString() : null;
    line.source = Object.keys(found.$source || {}).join(",") || null;
  } catch (error) {
    line.error = `${error.name}: ${error.message}`;
  }
  line.ms = Number((process.hrtime.bigint() - began) / 1000000n);
  console.log(JSON.stringify(line));
}

(async () => {
  await resolve();
  for await (const _ of readline.createInterface({ input: process.stdin })) await resolve();
  process.exit();
})();
