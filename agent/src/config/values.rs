//! What each setting may be, and how a value that it may not be is refused.
//!
//! Owns the limits; pure functions of the text, each with what would be right in its refusal.

use std::{
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    path::PathBuf,
    str::FromStr as _,
    time::Duration,
};

use tracing_subscriber::EnvFilter;

use super::{KubeIdentity, LogFormat, TargetMode, WhenDown};
use crate::{
    identity::{DaemonSetRef, ServiceAccountRef},
    policy::{ImdsMode, UnknownPods},
};

pub(super) fn node_name(value: &str) -> Result<String, String> {
    let ok = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    match value {
        "" => Err("is missing: the DaemonSet sets it from spec.nodeName".into()),
        _ if value.len() <= 253 && value.chars().all(ok) => Ok(value.to_owned()),
        _ => Err(format!("is {value:?}: a Kubernetes node's name has lower-case letters, digits, - and .")),
    }
}

/// The pattern of `clusterName` in the EKS Auth model.
pub(super) fn cluster_name(value: &str) -> Result<String, String> {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    match value {
        "" => Err("is missing: the name of the EKS cluster".into()),
        _ if value.len() <= 100
            && value.starts_with(|c: char| c.is_ascii_alphanumeric())
            && value.chars().all(ok) =>
        {
            Ok(value.to_owned())
        }
        _ => Err(format!("is {value:?}: at most 100 letters, digits, - and _, the first a letter or digit")),
    }
}

pub(super) fn absolute(value: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(value);
    if path.is_absolute() { Ok(path) } else { Err(format!("is {value:?}: must be an absolute path")) }
}

pub(super) fn imds_mode(value: &str) -> Result<ImdsMode, String> {
    ImdsMode::from_str(value).map_err(|()| format!("is {value:?}: one of off, audit, intercept, deny"))
}

pub(super) fn unknown_pods(value: &str) -> Result<UnknownPods, String> {
    match value {
        "strict" => Ok(UnknownPods::Strict),
        "as-known" => Ok(UnknownPods::AsKnown),
        _ => Err(format!("is {value:?}: strict or as-known")),
    }
}

pub(super) fn allow_or_deny(value: &str) -> Result<bool, String> {
    match value {
        "allow" => Ok(true),
        "deny" => Ok(false),
        _ => Err(format!("is {value:?}: allow or deny")),
    }
}

pub(super) fn auto_or_off(value: &str) -> Result<bool, String> {
    match value {
        "auto" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("is {value:?}: auto or off")),
    }
}

pub(super) fn on_or_off(value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("is {value:?}: on or off")),
    }
}

pub(super) fn target_mode(value: &str) -> Result<TargetMode, String> {
    match value {
        "auto" => Ok(TargetMode::Auto),
        "pod-identity" => Ok(TargetMode::PodIdentity),
        "own" => Ok(TargetMode::Own),
        _ => Err(format!("is {value:?}: auto, pod-identity or own")),
    }
}

pub(super) fn target_v4(value: &str) -> Result<Option<SocketAddrV4>, String> {
    if value == "none" {
        return Ok(None);
    }
    let target: SocketAddrV4 = value
        .parse()
        .map_err(|_| format!("is {value:?}: an IPv4 address and port as 169.254.175.1:80, or none"))?;
    // AWS's services are in the first three; NodeLocal DNSCache and the VPC CNI's gateway have one each.
    let is_taken = match target.ip().octets() {
        [169, 254, 169 | 170 | 172, _] | [169, 254, 20, 10] | [169, 254, 1, 1] => true,
        [first, second, ..] => (first, second) != (169, 254),
    };
    if is_taken {
        return Err(format!(
            "is {value:?}: must be link-local (169.254.0.0/16), and none that AWS or common add-ons use (169.254.169.0/24, \
             169.254.170.0/24, 169.254.172.0/24, 169.254.20.10, 169.254.1.1)"
        ));
    }
    nonzero(target.port()).map(|()| Some(target))
}

pub(super) fn target_v6(value: &str) -> Result<Option<SocketAddrV6>, String> {
    if value == "none" {
        return Ok(None);
    }
    let target: SocketAddrV6 = value.parse().map_err(|_| {
        format!("is {value:?}: an IPv6 address and port as [fd70:6f64:6761:7465::1]:80, or none")
    })?;
    let is_aws_address = matches!(target.ip().segments(), [0xfd00, 0xec2, ..]);
    if !target.ip().is_unique_local() || is_aws_address {
        return Err(format!(
            "is {value:?}: must be unique local (fc00::/7), and not in AWS's fd00:ec2::/32; connect cannot be \
             redirected to a link-local IPv6 address"
        ));
    }
    nonzero(target.port()).map(|()| Some(target))
}

pub(super) fn eks_agent(value: &str) -> Result<Option<DaemonSetRef>, String> {
    let is_name = |name: &str| node_name(name).is_ok();
    match value.split_once('/') {
        None if value == "none" => Ok(None),
        Some((namespace, name)) if is_name(namespace) && is_name(name) => {
            Ok(Some(DaemonSetRef { namespace: namespace.to_owned(), name: name.to_owned() }))
        }
        _ => Err(format!("is {value:?}: a DaemonSet as kube-system/eks-pod-identity-agent, or none")),
    }
}

/// Service accounts' names are DNS subdomains, as nodes' are; namespaces' are labels, which none with a dot is.
pub(super) fn service_accounts(value: &str) -> Result<Vec<ServiceAccountRef>, String> {
    if value.is_empty() {
        return Ok(Vec::new());
    }
    let parse = |account: &str| {
        let (namespace, name) = account.trim().split_once('/')?;
        let are_names = node_name(namespace).is_ok() && !namespace.contains('.') && node_name(name).is_ok();
        are_names.then(|| ServiceAccountRef { namespace: namespace.to_owned(), name: name.to_owned() })
    };
    let accounts = value.split(',').map(|account| {
        let reason =
            || format!("has {account:?}: service accounts as kube-system/csi-secrets-store-provider-aws");
        parse(account).ok_or_else(reason)
    });
    accounts.collect()
}

pub(super) fn when_down(value: &str) -> Result<WhenDown, String> {
    match value {
        "auto" => Ok(WhenDown::Auto),
        "deny" => Ok(WhenDown::Deny),
        _ => Err(format!("is {value:?}: auto or deny")),
    }
}

fn nonzero(port: u16) -> Result<(), String> {
    if port == 0 { Err("has port 0: pods need one that does not change".into()) } else { Ok(()) }
}

/// `IFNAMSIZ` leaves 15 bytes.
pub(super) fn netdev_name(value: &str) -> Result<String, String> {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if (1..=15).contains(&value.len()) && value.chars().all(ok) && value != "." && value != ".." {
        Ok(value.to_owned())
    } else {
        Err(format!("is {value:?}: 1 to 15 letters, digits, -, _ and ."))
    }
}

pub(super) fn kube_identity(value: &str) -> Result<KubeIdentity, String> {
    match value {
        "associated-node" => Ok(KubeIdentity::AssociatedNode),
        "own" => Ok(KubeIdentity::Own),
        _ => Err(format!("is {value:?}: associated-node or own")),
    }
}

pub(super) fn socket_addr(value: &str) -> Result<SocketAddr, String> {
    value.parse().map_err(|_| format!("is {value:?}: an address and port as 127.0.0.1:9163"))
}

pub(super) fn seconds(value: &str) -> Result<Duration, String> {
    match value.parse() {
        Ok(seconds @ 0..=600) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("is {value:?}: whole seconds, 0 to 600")),
    }
}

pub(super) fn log_format(value: &str) -> Result<LogFormat, String> {
    match value {
        "json" => Ok(LogFormat::Json),
        "text" => Ok(LogFormat::Text),
        _ => Err(format!("is {value:?}: json or text")),
    }
}

pub(super) fn log_filter(value: &str) -> Result<String, String> {
    match EnvFilter::builder().parse(value) {
        Ok(_) => Ok(value.to_owned()),
        Err(error) => Err(format!("is {value:?}: {error}")),
    }
}
