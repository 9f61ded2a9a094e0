//! Whether a pod is pointed at podgate's addresses, as the EKS webhook does it, a chart's author, or a tool of its own.
//!
//! Owns what counts: what SDKs make of it, not how it is spelled. Pure; never reads what a variable refers to.

use std::net::IpAddr;

use agent_common::net::{Endpoint, HTTP_PORT};
use k8s_openapi::api::core::v1::{Container, EnvVar, PodSpec, Volume};
use url::{Host, Url};

/// The audience of a service-account token that EKS Auth accepts.
pub const AUDIENCE: &str = "pods.eks.amazonaws.com";
/// The volume that the EKS webhook adds.
pub const TOKEN_VOLUME: &str = "eks-pod-identity-token";
/// The variable that holds the whole address of a credentials server.
const FULL_URI: &str = "AWS_CONTAINER_CREDENTIALS_FULL_URI";
/// The variable that holds a path at 169.254.170.2.
const RELATIVE_URI: &str = "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI";

/// Whether the pod has a token for EKS Auth mounted: the EKS webhook's volume, or another with a token of the same
/// audience.
pub(super) fn has_token_volume(spec: &PodSpec) -> bool {
    spec.volumes.iter().flatten().any(|volume| volume.name == TOKEN_VOLUME || has_token(volume))
}

/// Whether a container's environment points SDKs at podgate's addresses. A value from elsewhere counts: who sets one of
/// these variables means credentials.
pub(super) fn points_at_podgate(spec: &PodSpec) -> bool {
    containers(spec).flat_map(|container| container.env.iter().flatten()).any(is_ours)
}

/// Whether a container has variables whose names are not in the pod's object.
pub(super) fn has_env_from(spec: &PodSpec) -> bool {
    containers(spec).any(|container| container.env_from.as_ref().is_some_and(|sources| !sources.is_empty()))
}

/// The containers of a pod, those of its start included.
pub(super) fn containers(spec: &PodSpec) -> impl Iterator<Item = &Container> {
    spec.init_containers.iter().flatten().chain(&spec.containers)
}

fn has_token(volume: &Volume) -> bool {
    let sources = volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten());
    let mut tokens = sources.filter_map(|source| source.service_account_token.as_ref());
    tokens.any(|token| token.audience.as_deref() == Some(AUDIENCE))
}

fn is_ours(variable: &EnvVar) -> bool {
    let value = variable.value.as_deref().unwrap_or_default();
    match variable.name.as_str() {
        FULL_URI | RELATIVE_URI if variable.value_from.is_some() => true,
        FULL_URI => is_at_ours(value),
        RELATIVE_URI => !value.is_empty(),
        _ => false,
    }
}

fn is_at_ours(uri: &str) -> bool {
    let address = match Url::parse(uri).ok().as_ref().and_then(Url::host) {
        Some(Host::Ipv4(address)) => IpAddr::V4(address),
        Some(Host::Ipv6(address)) => IpAddr::V6(address).to_canonical(),
        Some(Host::Domain(_)) | None => return false,
    };
    Endpoint::new(address, HTTP_PORT).service().is_some()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(spec: Value) -> PodSpec {
        serde_json::from_value(spec).unwrap()
    }

    fn with_variable(name: &str, value: &Value) -> PodSpec {
        let mut variable = json!({"name": name});
        variable.as_object_mut().unwrap().extend(value.as_object().unwrap().clone());
        spec(json!({"containers": [{"name": "a"}, {"name": "b", "env": [{"name": "X"}, variable]}]}))
    }

    #[test]
    fn a_uri_counts_by_its_host_however_it_is_spelled() {
        for (uri, is_injected) in [
            ("http://169.254.170.23/v1/credentials", true),
            ("http://169.254.170.23:80/v1/credentials", true),
            ("http://169.254.170.23:8080", true),
            ("HTTP://169.254.170.23/V1/Credentials/?a#b", true),
            ("  http://169.254.170.23/v1/credentials\n", true),
            ("http://user@169.254.170.23//v1/credentials", true),
            ("http://0xa9feaa17/v1/credentials", true),
            ("https://169.254.170.23/v1/credentials", true),
            ("http://[fd00:ec2::23]/v1/credentials", true),
            ("http://[FD00:0EC2:0::23]:80/v1/credentials", true),
            ("http://[::ffff:169.254.170.23]/v1/credentials", true),
            ("http://169.254.170.2/v2/credentials", true),
            ("http://169.254.169.254/latest", true),
            ("http://127.0.0.1/v1/credentials", false),
            ("http://169.254.170.23.evil/v1/credentials", false),
            ("http://evil/169.254.170.23", false),
            ("169.254.170.23", false),
            ("", false),
        ] {
            let found = points_at_podgate(&with_variable(FULL_URI, &json!({"value": uri})));
            assert_eq!(found, is_injected, "{uri:?}");
        }
    }

    #[test]
    fn a_relative_uri_counts_and_so_does_a_value_from_elsewhere() {
        let elsewhere = json!({"valueFrom": {"configMapKeyRef": {"name": "aws", "key": "uri"}}});
        for (name, value, is_injected) in [
            (RELATIVE_URI, json!({"value": "/v2/credentials"}), true),
            (RELATIVE_URI, json!({"value": ""}), false),
            (RELATIVE_URI, elsewhere.clone(), true),
            (FULL_URI, elsewhere.clone(), true),
            ("AWS_REGION", elsewhere, false),
        ] {
            assert_eq!(points_at_podgate(&with_variable(name, &value)), is_injected, "{name}: {value}");
        }
    }

    #[test]
    fn variables_of_an_unknown_source_are_no_injection() {
        let spec =
            spec(json!({"containers": [{"name": "a", "envFrom": [{"configMapRef": {"name": "aws"}}]}]}));
        assert!(has_env_from(&spec) && !points_at_podgate(&spec));
    }

    #[test]
    fn a_volume_counts_by_audience_or_by_the_name_that_the_webhook_gives() {
        let volume = |name: &str, audience: Value| {
            let token = json!({"serviceAccountToken": {"path": "t", "audience": audience}});
            spec(json!({"containers": [], "volumes": [{"name": name, "projected": {"sources": [token]}}]}))
        };
        for (name, audience, has_token) in [
            ("aws", json!(AUDIENCE), true),
            ("aws", json!("sts.amazonaws.com"), false),
            ("aws", Value::Null, false),
            (TOKEN_VOLUME, Value::Null, true),
        ] {
            assert_eq!(has_token_volume(&volume(name, audience.clone())), has_token, "{name}: {audience}");
        }
    }
}
