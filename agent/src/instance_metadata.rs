//! The facts of the instance: the agent's own copy of them from the node's IMDS.
//!
//! Owns what is copied and when. Never asks on a pod's behalf, and copies nothing that pods must not have: no role, no
//! user-data, no address, no account.

use std::time::Duration;

use aws_config::{
    imds::client::{Client, error::ImdsError},
    provider_config::ProviderConfig,
};
use serde::Deserialize;
use tokio::{sync::watch, time::sleep};
use tracing::{debug, info, warn};

use self::exposure::Exposure;
use crate::error::chain;

mod exposure;

/// The facts do not change while an instance runs, and its type changes only while it is stopped. A copy that is wrong
/// anyway is corrected by then.
const REFRESH_INTERVAL: Duration = Duration::from_hours(1);
/// After a failure, doubled with each further one.
const RETRY_DELAY_MIN: Duration = Duration::from_secs(1);
const RETRY_DELAY_MAX: Duration = Duration::from_mins(1);

/// What is known of the instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instance {
    /// Such as `us-east-1`.
    pub region: Option<String>,
    /// Such as `us-east-1a`.
    pub zone: Option<String>,
    /// Such as `use1-az1`.
    pub zone_id: Option<String>,
    /// Such as `i-0123456789abcdef0`.
    pub id: Option<String>,
    /// Such as `m7i.large`.
    pub instance_type: Option<String>,
    /// `x86_64` or `arm64`.
    pub architecture: Option<String>,
    /// Such as `amazonaws.com`.
    pub domain: Option<String>,
    /// Such as `aws`.
    pub partition: Option<String>,
}

/// The instance identity document, as far as it is copied.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    region: Option<String>,
    availability_zone: Option<String>,
    instance_id: Option<String>,
    instance_type: Option<String>,
    architecture: Option<String>,
}

// === impl Instance ===

impl Instance {
    /// An instance of which at most the region is known.
    pub fn in_region(region: Option<String>) -> Self {
        Self { region, ..Self::default() }
    }
}

/// A client of the node's IMDS without retries: its users retry by themselves.
pub fn imds() -> Client {
    Client::builder().configure(&directly()).max_attempts(1).build()
}

/// Lets the SDK reach the node's IMDS without a proxy. By default it would use that of `HTTP_PROXY`, and read the IMDS of
/// the proxy's host.
pub(crate) fn directly() -> ProviderConfig {
    ProviderConfig::default().with_http_client(aws_smithy_http_client::Builder::new().build_http())
}

/// Keeps the copy current until shutdown. While the node's IMDS is unavailable, known facts stay.
pub async fn follow(imds: Client, copy: watch::Sender<Instance>) {
    let mut delay = RETRY_DELAY_MIN;
    let mut exposure = None;
    loop {
        match fetch(&imds).await {
            Ok(instance) => {
                let is_new = copy.send_if_modified(|known| merge(known, instance));
                if is_new {
                    info!(instance = ?*copy.borrow(), "the facts of the instance changed");
                }
                delay = RETRY_DELAY_MIN;
                match Exposure::measure().await {
                    Ok(measured) => {
                        if exposure.replace(measured) != Some(measured) {
                            let id = copy.borrow().id.clone();
                            measured.say(id.as_deref());
                        }
                        sleep(REFRESH_INTERVAL).await;
                    }
                    Err(error) => {
                        // Some replacements of EC2's IMDS know neither.
                        debug!(%error, "cannot tell how far the node's IMDS is open");
                        sleep(RETRY_DELAY_MAX).await;
                    }
                }
            }
            Err(error) => {
                if delay == RETRY_DELAY_MIN {
                    let region = copy.borrow().region.clone();
                    warn!(
                        error = chain(&*error),
                        region, "cannot read the facts of the instance from the node's IMDS; retrying"
                    );
                }
                sleep(delay).await;
                delay = (delay * 2).min(RETRY_DELAY_MAX);
            }
        }
    }
}

async fn fetch(imds: &Client) -> Result<Instance, Box<dyn std::error::Error + Send + Sync>> {
    let document = imds.get("/latest/dynamic/instance-identity/document").await?;
    let document: Document = serde_json::from_str(document.as_ref())?;
    // Some replacements of EC2's IMDS have only the document.
    let read = async |path| match imds.get(path).await {
        Ok(text) => Ok(Some(String::from(text))),
        Err(ImdsError::ErrorResponse(error)) if error.response().status().as_u16() == 404 => Ok(None),
        Err(error) => Err(error),
    };
    Ok(Instance {
        region: document.region,
        zone: document.availability_zone,
        zone_id: read("/latest/meta-data/placement/availability-zone-id").await?,
        id: document.instance_id,
        instance_type: document.instance_type,
        architecture: document.architecture,
        domain: read("/latest/meta-data/services/domain").await?,
        partition: read("/latest/meta-data/services/partition").await?,
    })
}

/// Merges fetched facts into the known ones, which stay where one could not be fetched. Whether anything changed.
fn merge(known: &mut Instance, fetched: Instance) -> bool {
    let keep = |fetched: Option<String>, known: &Option<String>| fetched.or_else(|| known.clone());
    let merged = Instance {
        region: keep(fetched.region, &known.region),
        zone: keep(fetched.zone, &known.zone),
        zone_id: keep(fetched.zone_id, &known.zone_id),
        id: keep(fetched.id, &known.id),
        instance_type: keep(fetched.instance_type, &known.instance_type),
        architecture: keep(fetched.architecture, &known.architecture),
        domain: keep(fetched.domain, &known.domain),
        partition: keep(fetched.partition, &known.partition),
    };
    let is_new = *known != merged;
    *known = merged;
    is_new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_is_read_as_ec2_and_its_replacements_write_it() {
        let ec2 = r#"{"accountId" : "123456789012", "region" : "eu-west-1", "availabilityZone" : "eu-west-1b",
            "billingProducts" : null, "instanceId" : "i-0", "instanceType" : "m7i.large", "architecture" : "x86_64"}"#;
        let document: Document = serde_json::from_str(ec2).unwrap();
        assert_eq!(
            (document.region.as_deref(), document.instance_id.as_deref()),
            (Some("eu-west-1"), Some("i-0"))
        );
        let document: Document = serde_json::from_str("{}").unwrap();
        assert_eq!(document.availability_zone, None);
    }

    #[test]
    fn a_fact_that_cannot_be_fetched_stays_as_it_was() {
        let mut known = Instance::in_region(Some("us-west-2".into()));
        let fetched = Instance { id: Some("i-0".into()), ..Instance::default() };
        assert!(merge(&mut known, fetched.clone()));
        assert_eq!((known.region.as_deref(), known.id.as_deref()), (Some("us-west-2"), Some("i-0")));
        assert!(!merge(&mut known, fetched));
        assert!(merge(&mut known, Instance::in_region(Some("eu-west-1".into()))));
        assert_eq!((known.region.as_deref(), known.id.as_deref()), (Some("eu-west-1"), Some("i-0")));
    }
}
