# Resolves credentials through the default chain and prints one line of JSON; then again for every line that comes in, by a
# new chain.
require "aws-sdk-core"
require "json"

$stdout.sync = true
loop do
  line = { version: "aws-sdk-core #{Aws::CORE_GEM_VERSION}" }
  began = Process.clock_gettime(Process::CLOCK_MONOTONIC)
  begin
    found = Aws::CredentialProviderChain.new.resolve
    raise "no credentials in the default chain" unless found&.set?
    line[:access_key_id] = found.credentials.access_key_id
    line[:expires] = found.expiration
    line[:source] = found.class.name
  rescue StandardError => error
    line[:error] = "#{error.class}: #{error.message}"
  end
  line[:ms] = ((Process.clock_gettime(Process::CLOCK_MONOTONIC) - began) * 1000).round
  puts line.to_json
  break unless $stdin.gets
end
