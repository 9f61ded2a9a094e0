//! Resolves credentials through `aws_config`'s default chain and prints one line of JSON; then again for every line that
//! comes in, by a new configuration.

use std::time::{Instant, SystemTime};

use aws_config::BehaviorVersion;
use aws_credential_types::{Credentials, provider::ProvideCredentials};
use aws_smithy_types::{DateTime, date_time::Format};
use serde_json::json;

const VERSION: &str = "aws-config 1.13.0";

#[tokio::main]
async fn main() {
    loop {
        let began = Instant::now();
        let found = resolve().await;
        let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        println!(
            "{}",
            match found {
                Ok(found) => json!({
                    "version": VERSION,
                    "ms": ms,
                    "access_key_id": found.access_key_id(),
                    "expires": found.expiry().and_then(text),
                    // Only the `Debug` form of credentials tells.
                    "source": format!("{found:?}").split(r#"provider_name: ""#).nth(1).and_then(|rest| rest.split('"').next()),
                }),
                Err(error) => json!({"version": VERSION, "ms": ms, "error": error}),
            }
        );
        if std::io::stdin().read_line(&mut String::new()).unwrap_or(0) == 0 {
            return;
        }
    }
}

async fn resolve() -> Result<Credentials, String> {
    let config = aws_config::load_defaults(BehaviorVersion::latest()).await;
    let provider = config.credentials_provider().ok_or("no credentials provider in the default chain")?;
    provider.provide_credentials().await.map_err(|error| chain(&error))
}

fn text(at: SystemTime) -> Option<String> {
    DateTime::from(at).fmt(Format::DateTime).ok()
}

/// An error with all of its causes.
fn chain(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
