//! The metadata, by path.
//!
//! Owns paths, listings and documents. Never decides who may read.

use std::{collections::BTreeSet, time::Duration};

use jiff::Timestamp;
use serde_json::json;

use super::{ImdsConfig, NodeCredentials};

/// Lifetime of the node's credentials from the moment they are read.
const CREDENTIAL_LIFETIME: Duration = Duration::from_hours(6);
/// The role that the instance has for EC2's own purposes; here with the same credentials.
const INSTANCE_CREDENTIALS: &str = "meta-data/identity-credentials/ec2/security-credentials/ec2-instance";
/// Versions in the path, oldest and newest first.
const VERSIONS: [&str; 4] = ["1.0", "2012-01-12", "2024-04-11", "latest"];

/// The tree below a version.
#[derive(Debug)]
pub(super) struct Tree {
    leaves: Vec<(String, Leaf)>,
}

/// What a path holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) text: String,
    pub(super) is_credentials: bool,
}

#[derive(Debug)]
enum Leaf {
    Text(String),
    Credentials(NodeCredentials),
}

// === impl Tree ===

impl Tree {
    pub(super) fn new(config: ImdsConfig) -> Self {
        let identity = identity(&config);
        let ImdsConfig { region, zone, zone_id, instance_id, role_name, account, credentials } = config;
        let mac = "06:00:00:00:00:01";
        let info = format!(
            "{{\n  \"Code\" : \"Success\",\n  \"LastUpdated\" : \"{}\",\n  \"InstanceProfileArn\" : \
             \"arn:aws:iam::{account}:instance-profile/{role_name}\",\n  \"InstanceProfileId\" : \
             \"AIPA0000000000000000\"\n}}",
            seconds(Timestamp::now()),
        );
        let text = |path: &str, text: &str| (path.to_owned(), Leaf::Text(text.to_owned()));
        let leaves = vec![
            text("dynamic/instance-identity/document", &identity),
            text("meta-data/ami-id", "ami-00000000000000000"),
            text("meta-data/hostname", "node.lab.internal"),
            text("meta-data/iam/info", &info),
            (
                format!("meta-data/iam/security-credentials/{role_name}"),
                Leaf::Credentials(credentials.clone()),
            ),
            (INSTANCE_CREDENTIALS.to_owned(), Leaf::Credentials(credentials)),
            text("meta-data/instance-id", &instance_id),
            text("meta-data/instance-type", "m7i.large"),
            text("meta-data/local-hostname", "node.lab.internal"),
            text("meta-data/local-ipv4", "10.0.0.10"),
            text("meta-data/mac", mac),
            text(&format!("meta-data/network/interfaces/macs/{mac}/device-number"), "0"),
            text(&format!("meta-data/network/interfaces/macs/{mac}/local-ipv4s"), "10.0.0.10"),
            text("meta-data/placement/availability-zone", &zone),
            text("meta-data/placement/availability-zone-id", &zone_id),
            text("meta-data/placement/region", &region),
            text("meta-data/services/domain", "amazonaws.com"),
            text("meta-data/services/partition", "aws"),
            text("user-data", "#!/bin/sh\n# what only the node may know\n"),
        ];
        Self { leaves }
    }

    /// The content of a leaf, or the listing of a directory with or without its slash.
    pub(super) fn get(&self, path: &str, now: Timestamp) -> Option<Content> {
        let plain = |text| Some(Content { text, is_credentials: false });
        let path = path.trim_start_matches('/').trim_end_matches('/');
        if path.is_empty() {
            return plain(VERSIONS.join("\n"));
        }
        let (version, path) = path.split_once('/').unwrap_or((path, ""));
        if !is_version(version) {
            return None;
        }
        if let Some((_, leaf)) = self.leaves.iter().find(|(leaf, _)| leaf == path) {
            return Some(leaf.content(now));
        }
        let below = |leaf: &str| -> Option<String> {
            let rest = leaf.strip_prefix(path)?;
            let rest = if path.is_empty() { rest } else { rest.strip_prefix('/')? };
            let slash = rest.find('/').map_or(rest.len(), |at| at + 1);
            Some(rest[..slash].to_owned())
        };
        let children: BTreeSet<String> = self.leaves.iter().filter_map(|(leaf, _)| below(leaf)).collect();
        if children.is_empty() { None } else { plain(children.into_iter().collect::<Vec<_>>().join("\n")) }
    }
}

// === impl Leaf ===

impl Leaf {
    fn content(&self, now: Timestamp) -> Content {
        match self {
            Self::Text(text) => Content { text: text.clone(), is_credentials: false },
            Self::Credentials(credentials) => {
                Content { text: document(credentials, now), is_credentials: true }
            }
        }
    }
}

/// A credential document, spaced as EC2 spaces it.
fn document(credentials: &NodeCredentials, now: Timestamp) -> String {
    let fields = [
        ("Code", "Success".to_owned()),
        ("LastUpdated", seconds(now)),
        ("Type", "AWS-HMAC".to_owned()),
        ("AccessKeyId", credentials.access_key_id.clone()),
        ("SecretAccessKey", credentials.secret_access_key.clone()),
        ("Token", credentials.session_token.clone()),
        ("Expiration", seconds(now + CREDENTIAL_LIFETIME)),
    ];
    let lines = fields.map(|(key, value)| format!("  {} : {}", json!(key), json!(value)));
    format!("{{\n{}\n}}", lines.join(",\n"))
}

/// The instance identity document.
fn identity(config: &ImdsConfig) -> String {
    let document = json!({
        "accountId": config.account,
        "architecture": "x86_64",
        "availabilityZone": config.zone,
        "billingProducts": null,
        "devpayProductCodes": null,
        "marketplaceProductCodes": null,
        "imageId": "ami-00000000000000000",
        "instanceId": config.instance_id,
        "instanceType": "m7i.large",
        "kernelId": null,
        "pendingTime": seconds(Timestamp::now()),
        "privateIp": "10.0.0.10",
        "ramdiskId": null,
        "region": config.region,
        "version": "2017-09-30",
    });
    format!("{document:#}")
}

fn seconds(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// `latest`, `1.0`, or a date.
fn is_version(text: &str) -> bool {
    let date = text.len() == 10
        && text.bytes().enumerate().all(|(at, byte)| match at {
            4 | 7 => byte == b'-',
            _ => byte.is_ascii_digit(),
        });
    date || text == "latest" || text == "1.0"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> Tree {
        Tree::new(ImdsConfig::new(NodeCredentials {
            access_key_id: "ASIANODE".into(),
            secret_access_key: "secret".into(),
            session_token: "token".into(),
        }))
    }

    #[test]
    fn a_path_answers_as_on_ec2() {
        let tree = tree();
        for (path, expected) in [
            ("/latest/meta-data/iam/security-credentials/", Some("node-role")),
            ("/latest/meta-data/iam/security-credentials", Some("node-role")),
            ("/latest/meta-data/iam/", Some("info\nsecurity-credentials/")),
            ("/latest/meta-data/placement/availability-zone/", Some("us-west-2a")),
            ("/2021-03-23/meta-data/placement/region", Some("us-west-2")),
            ("/latest/", Some("dynamic/\nmeta-data/\nuser-data")),
            ("/latest/meta-data/iam/security-credentials/other", None),
            ("/latest/meta-data/ia", None),
            ("/newest/meta-data/instance-id", None),
            ("/2021-3-23/meta-data/instance-id", None),
        ] {
            assert_eq!(
                tree.get(path, Timestamp::UNIX_EPOCH).map(|content| content.text).as_deref(),
                expected,
                "{path}"
            );
        }
    }

    #[test]
    fn the_credential_document_is_spaced_and_ordered_as_on_ec2() {
        let Leaf::Credentials(credentials) = &tree().leaves[4].1 else { panic!("the role's leaf has moved") };
        let now = "2026-09-15T10:11:12.5Z".parse().unwrap();
        let expected = "{\n  \"Code\" : \"Success\",\n  \"LastUpdated\" : \"2026-09-15T10:11:12Z\",\n  \"Type\" : \
                        \"AWS-HMAC\",\n  \"AccessKeyId\" : \"ASIANODE\",\n  \"SecretAccessKey\" : \"secret\",\n  \
                        \"Token\" : \"token\",\n  \"Expiration\" : \"2026-09-15T16:11:12Z\"\n}";
        assert_eq!(document(credentials, now), expected);
    }

    #[test]
    fn reading_any_credentials_of_the_node_is_noticed() {
        let tree = tree();
        for (path, noticed) in [
            ("/latest/meta-data/iam/security-credentials/node-role", true),
            ("/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance", true),
            ("/latest/meta-data/iam/security-credentials/", false),
            ("/latest/user-data", false),
        ] {
            assert_eq!(tree.get(path, Timestamp::UNIX_EPOCH).unwrap().is_credentials, noticed, "{path}");
        }
    }
}
