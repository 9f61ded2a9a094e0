//! What the instance is: the agent's own copy of what the node's IMDS says of it.
//!
//! Owns what is copied and when. Never asks on a pod's behalf, and copies nothing that a pod has no business with: no
//! role, no user-data, no address, no account.

use std::time::Duration;

use aws_config::{
    imds::client::{Client, error::ImdsError},
    provider_config::ProviderConfig,
};
use serde::Deserialize;
use tokio::{sync::watch, time::sleep};
use tracing::{info, warn};

use crate::error::chain;

/// The zone and the rest stay as they are while an instance runs; its type changes only while it is stopped. A copy that
/// is wrong all the same does not stay so forever.
const AGAIN: Duration = Duration::from_hours(1);
/// After a failure, doubled from one to the next.
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

/// What the instance identity document says, as far as it is copied.
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
    /// An instance of which only the region is known, if that.
    pub fn in_region(region: Option<String>) -> Self {
        Self { region, ..Self::default() }
    }
}

/// The node's IMDS, asked once and not again: whoever asks tries again by itself.
pub fn imds() -> Client {
    Client::builder().configure(&directly()).max_attempts(1).build()
}

/// How the SDK is to ask the node's IMDS: by no proxy. The SDK's own client would ask by that of `HTTP_PROXY`, and get what
/// the IMDS of the proxy's own host says.
pub(crate) fn directly() -> ProviderConfig {
    ProviderConfig::default().with_http_client(aws_smithy_http_client::Builder::new().build_http())
}

/// Keeps the copy up to date forever. While the node's IMDS is away, what is known stays.
pub async fn follow(imds: Client, copy: watch::Sender<Instance>) {
    let mut pause = RETRY_DELAY_MIN;
    loop {
        match fetch(&imds).await {
            Ok(instance) => {
                let is_new = copy.send_if_modified(|known| take(known, instance));
                if is_new {
                    info!(instance = ?*copy.borrow(), "the instance is known");
                }
                pause = RETRY_DELAY_MIN;
                sleep(AGAIN).await;
            }
            Err(error) => {
                if pause == RETRY_DELAY_MIN {
                    let region = copy.borrow().region.clone();
                    warn!(
                        error = chain(&*error),
                        region, "cannot read what the instance is from its IMDS; trying again"
                    );
                }
                sleep(pause).await;
                pause = (pause * 2).min(RETRY_DELAY_MAX);
            }
        }
    }
}

async fn fetch(imds: &Client) -> Result<Instance, Box<dyn std::error::Error + Send + Sync>> {
    let document = imds.get("/latest/dynamic/instance-identity/document").await?;
    let document: Document = serde_json::from_str(document.as_ref())?;
    // Some services that stand in for EC2's have no more than the document.
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

/// Takes over what was fetched, and keeps what could not be; tells whether anything is new.
fn take(known: &mut Instance, fetched: Instance) -> bool {
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
    fn the_document_is_read_as_ec2_and_as_others_write_it() {
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
    fn what_cannot_be_had_stays_as_it_was_known() {
        let mut known = Instance::in_region(Some("us-west-2".into()));
        let fetched = Instance { id: Some("i-0".into()), ..Instance::default() };
        assert!(take(&mut known, fetched.clone()));
        assert_eq!((known.region.as_deref(), known.id.as_deref()), (Some("us-west-2"), Some("i-0")));
        assert!(!take(&mut known, fetched));
        assert!(take(&mut known, Instance::in_region(Some("eu-west-1".into()))));
        assert_eq!((known.region.as_deref(), known.id.as_deref()), (Some("eu-west-1"), Some("i-0")));
    }
}
