//! The objects as the API shows them.
//!
//! Owns their JSON. Never stores one.

use std::{collections::BTreeMap, net::IpAddr};

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::POD_IDENTITY_AUDIENCE;

/// Mount point and file name that the EKS webhook gives the token.
const TOKEN_DIRECTORY: &str = "/var/run/secrets/pods.eks.amazonaws.com/serviceaccount";
const TOKEN_NAME: &str = "eks-pod-identity-token";
/// Lifetime that the EKS webhook asks for, in seconds.
const TOKEN_LIFETIME: u32 = 86_400;

/// A pod to add. Its default runs nowhere: give it at least namespace, name, service account and node.
#[derive(Clone, Debug, Default)]
pub struct PodSpec {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Service account.
    pub service_account: String,
    /// Node it is scheduled on.
    pub node: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// The `DaemonSet` of its namespace that controls it.
    pub daemon_set: Option<String>,
    /// The configuration hash of the static pod of its node that it mirrors, as the kubelet makes it.
    pub mirror_of: Option<String>,
    /// Whether it shares the node's network namespace.
    pub host_network: bool,
    /// Its addresses, of either family; empty while the network is not there.
    pub pod_ips: Vec<IpAddr>,
    /// Whether the EKS webhook changed it: the projected volume `eks-pod-identity-token`, its mount, and the two
    /// environment variables.
    pub token_volume: bool,
    /// The credentials URI that somebody has put into its container's environment by hand.
    pub credentials_uri: Option<String>,
    /// UID; a new one where there is none.
    pub uid: Option<String>,
}

pub(super) fn node(name: &str) -> Value {
    json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    })
}

pub(super) fn namespace(name: &str, annotations: BTreeMap<String, String>) -> Value {
    let annotations: Map<String, Value> =
        annotations.into_iter().map(|(key, value)| (key, Value::String(value))).collect();
    json!({
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/metadata.name": name},
            "annotations": annotations,
        },
        "spec": {"finalizers": ["kubernetes"]},
        "status": {"phase": "Active"},
    })
}

pub(super) fn service_account(namespace: &str, name: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": namespace}})
}

pub(super) fn pod(spec: &PodSpec) -> Value {
    let mut container = json!({"name": "main", "image": "lab"});
    let mut volumes = json!([]);
    if spec.token_volume {
        container["env"] = json!([
            {"name": "AWS_CONTAINER_CREDENTIALS_FULL_URI", "value": "http://169.254.170.23/v1/credentials"},
            {"name": "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "value": format!("{TOKEN_DIRECTORY}/{TOKEN_NAME}")},
        ]);
        container["volumeMounts"] =
            json!([{"name": TOKEN_NAME, "mountPath": TOKEN_DIRECTORY, "readOnly": true}]);
        let source = json!({
            "audience": POD_IDENTITY_AUDIENCE,
            "expirationSeconds": TOKEN_LIFETIME,
            "path": TOKEN_NAME,
        });
        volumes = json!([{
            "name": TOKEN_NAME,
            "projected": {"defaultMode": 420, "sources": [{"serviceAccountToken": source}]},
        }]);
    }
    if let Some(uri) = &spec.credentials_uri {
        container["env"] = json!([{"name": "AWS_CONTAINER_CREDENTIALS_FULL_URI", "value": uri}]);
    }
    let mut pod = json!({
        "metadata": {
            "name": spec.name,
            "namespace": spec.namespace,
            "labels": spec.labels,
            "annotations": spec.annotations,
        },
        "spec": {
            "nodeName": spec.node,
            "serviceAccountName": spec.service_account,
            "containers": [container],
            "volumes": volumes,
        },
        "status": {"phase": if spec.pod_ips.is_empty() { "Pending" } else { "Running" }},
    });
    if spec.host_network {
        pod["spec"]["hostNetwork"] = json!(true);
    }
    if let Some(daemon_set) = &spec.daemon_set {
        pod["metadata"]["ownerReferences"] = json!([{
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "name": daemon_set,
            "uid": Uuid::new_v4().to_string(),
            "controller": true,
            "blockOwnerDeletion": true,
        }]);
    }
    if let Some(config_hash) = &spec.mirror_of {
        for annotation in ["kubernetes.io/config.hash", "kubernetes.io/config.mirror"] {
            pod["metadata"]["annotations"][annotation] = json!(config_hash);
        }
        pod["metadata"]["ownerReferences"] = json!([{
            "apiVersion": "v1",
            "kind": "Node",
            "name": spec.node,
            "uid": Uuid::new_v4().to_string(),
            "controller": true,
        }]);
    }
    if let Some(uid) = &spec.uid {
        pod["metadata"]["uid"] = json!(uid);
    }
    if !spec.pod_ips.is_empty() {
        set_pod_ips(&mut pod, &spec.pod_ips);
    }
    pod
}

pub(super) fn set_pod_ips(pod: &mut Value, pod_ips: &[IpAddr]) {
    let status = &mut pod["status"];
    status["phase"] = json!("Running");
    status["podIP"] = json!(pod_ips.first());
    status["podIPs"] = pod_ips.iter().map(|ip| json!({"ip": ip})).collect();
}

pub(super) fn annotate(object: &mut Value, key: &str, value: Option<&str>) {
    let metadata = &mut object["metadata"];
    if metadata["annotations"].is_null() {
        metadata["annotations"] = json!({});
    }
    match value {
        Some(value) => metadata["annotations"][key] = json!(value),
        None => {
            if let Some(annotations) = metadata["annotations"].as_object_mut() {
                annotations.remove(key);
            }
        }
    }
}
