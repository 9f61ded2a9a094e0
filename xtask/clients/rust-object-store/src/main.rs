//! Resolves credentials as `object_store` does for S3, which is no AWS code, and prints one line of JSON; then again for
//! every line that comes in, by a new store.

use std::{sync::Arc, time::Instant};

use object_store::aws::{AmazonS3Builder, AwsCredential};
use serde_json::json;

const VERSION: &str = "object_store 0.14.2";

#[tokio::main]
async fn main() {
    loop {
        let began = Instant::now();
        let found = resolve().await;
        let ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        println!(
            "{}",
            match found {
                Ok(found) => json!({"version": VERSION, "ms": ms, "access_key_id": found.key_id, "source": "AmazonS3"}),
                Err(error) => json!({"version": VERSION, "ms": ms, "error": error.to_string()}),
            }
        );
        if std::io::stdin().read_line(&mut String::new()).unwrap_or(0) == 0 {
            return;
        }
    }
}

async fn resolve() -> object_store::Result<Arc<AwsCredential>> {
    let store = AmazonS3Builder::from_env().with_bucket_name("bucket").with_region("us-west-2").build()?;
    store.credentials().get_credential().await
}
