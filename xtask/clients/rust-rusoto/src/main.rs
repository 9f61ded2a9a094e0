//! Resolves credentials through rusoto's `ChainProvider` and prints one line of JSON; then again for every line that comes
//! in, by a new chain.

use std::time::Instant;

use rusoto_credential::{ChainProvider, ProvideAwsCredentials};
use serde_json::json;

const VERSION: &str = "rusoto_credential 0.48.0";

#[tokio::main]
async fn main() {
    loop {
        let began = Instant::now();
        let found = ChainProvider::new().credentials().await;
        let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        println!(
            "{}",
            match found {
                Ok(found) => json!({
                    "version": VERSION,
                    "ms": ms,
                    "access_key_id": found.aws_access_key_id(),
                    "expires": found.expires_at().map(|at| at.to_rfc3339()),
                    "source": "ChainProvider",
                }),
                Err(error) => json!({"version": VERSION, "ms": ms, "error": error.message}),
            }
        );
        if std::io::stdin().read_line(&mut String::new()).unwrap_or(0) == 0 {
            return;
        }
    }
}
