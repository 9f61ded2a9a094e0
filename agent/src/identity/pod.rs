//! A pod, as podgate caches it.
//!
//! Owns what is copied of the API server's object; never finds a pod, never reads a cgroup.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use agent_common::defense::{Defense, holds};
use k8s_openapi::{api::core::v1 as core, apimachinery::pkg::apis::meta::v1::OwnerReference};
use serde::Serialize;

use super::{
    cgroup::{ConfigHash, PodUid},
    injection,
};

/// The prefix of the annotations that podgate reads; others are not cached.
pub(super) const ANNOTATION_PREFIX: &str = "podgate.dev/";

/// The annotation of a mirror pod that has the hash of the static pod's configuration, as in the name of its cgroup.
pub(super) const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// The annotation that makes a pod a mirror pod: the kubelet never runs such a pod, and deletes one that it did not make.
const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";

/// A service account.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct ServiceAccountRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// A `DaemonSet`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DaemonSetRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What podgate caches of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Pod {
    /// Its UID.
    pub uid: PodUid,
    /// Its name.
    pub name: String,
    /// Its service account; the namespace is the pod's own.
    pub service_account: ServiceAccountRef,
    /// Whether it is on the host's network.
    pub host_network: bool,
    /// Whether it has a token for EKS Auth mounted, as the EKS webhook does it.
    pub token_volume: bool,
    /// Whether it has such a volume, or a container whose environment points SDKs at podgate's addresses.
    pub injected: bool,
    /// Whether a container has variables that the pod's object does not show: it may be injected.
    pub has_env_from: bool,
    /// The name of the `DaemonSet` of its namespace that controls it.
    pub daemon_set: Option<String>,
    /// The static pod that this one mirrors at the API server. Good for policy alone: who may write pods can write one.
    pub static_pod: Option<ConfigHash>,
    /// Whether all its containers have exited for good.
    pub finished: bool,
    /// Its addresses, once it has them.
    pub ips: Vec<IpAddr>,
    /// The ports that its containers say they listen at.
    pub container_ports: Vec<u16>,
    /// Its annotations that concern podgate.
    pub annotations: BTreeMap<String, String>,
}

// === impl ServiceAccountRef ===

impl fmt::Display for ServiceAccountRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

// === impl DaemonSetRef ===

impl DaemonSetRef {
    /// Whether this `DaemonSet` controls the pod: by its owner reference, since another pod can have the same name or
    /// label.
    pub fn controls(&self, pod: &Pod) -> bool {
        let is_in_namespace = pod.service_account.namespace == self.namespace;
        is_in_namespace && pod.daemon_set.as_ref() == Some(&self.name)
    }
}

impl fmt::Display for DaemonSetRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

// === impl Pod ===

impl Pod {
    /// Copies what podgate needs. `None` without a usable UID, name or namespace, which the API server always sets.
    pub fn from_api(pod: &core::Pod) -> Option<Self> {
        let metadata = &pod.metadata;
        let spec = pod.spec.as_ref()?;
        let token_volume = injection::has_token_volume(spec);
        let annotations = metadata.annotations.iter().flatten();
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let ips = pod.status.as_ref().and_then(|status| status.pod_ips.as_ref()).into_iter().flatten();
        Some(Self {
            uid: PodUid::parse(metadata.uid.as_deref()?)?,
            name: metadata.name.clone()?,
            service_account: ServiceAccountRef {
                namespace: metadata.namespace.clone()?,
                name: spec.service_account_name.clone().unwrap_or_else(|| "default".to_owned()),
            },
            host_network: spec.host_network.unwrap_or(false),
            token_volume,
            injected: token_volume || injection::points_at_podgate(spec),
            has_env_from: injection::has_env_from(spec),
            daemon_set: metadata
                .owner_references
                .iter()
                .flatten()
                .find(|owner| is_daemon_set(owner))
                .map(|owner| owner.name.clone()),
            static_pod: static_pod(pod),
            finished: matches!(phase, Some("Succeeded" | "Failed")),
            ips: ips.filter_map(|ip| ip.ip.parse().ok()).collect(),
            container_ports: container_ports(spec),
            annotations: annotations
                .filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX) || !holds(Defense::StaticPods))
                .map(|(key, value)| (key.clone(), value.clone()))
                .collect(),
        })
    }

    /// `namespace/name`, as people name it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.service_account.namespace, self.name)
    }
}

/// The static pod that a mirror pod stands for. The kubelet of its node makes it, with the node for its controller.
fn static_pod(pod: &core::Pod) -> Option<ConfigHash> {
    let metadata = &pod.metadata;
    let annotations = metadata.annotations.as_ref()?;
    let hash = annotations.get(CONFIG_HASH)?;
    let node = pod.spec.as_ref()?.node_name.as_ref()?;
    let is_nodes = metadata.owner_references.iter().flatten().any(|owner| {
        owner.controller == Some(true)
            && owner.kind == "Node"
            && owner.api_version == "v1"
            && owner.name == *node
    });
    (is_nodes && annotations.get(CONFIG_MIRROR) == Some(hash)).then(|| ConfigHash::parse(hash)).flatten()
}

fn container_ports(spec: &core::PodSpec) -> Vec<u16> {
    let ports = injection::containers(spec).flat_map(|container| container.ports.iter().flatten());
    ports.filter_map(|port| u16::try_from(port.container_port).ok()).collect()
}

/// Whether it is the `DaemonSet` that controls the pod; an object has at most one controller.
fn is_daemon_set(owner: &OwnerReference) -> bool {
    owner.controller == Some(true) && owner.kind == "DaemonSet" && owner.api_version == "apps/v1"
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn api_pod(spec: &serde_json::Value) -> core::Pod {
        serde_json::from_value(json!({
            "metadata": {
                "name": "web-0", "namespace": "app", "uid": "0c5cb3f2-7a47-4a4b-8f0c-5b0f6a3d2e11",
                "annotations": {"podgate.dev/imds-v1": "allow", "other": "x"},
            },
            "spec": spec,
            "status": {"podIPs": [{"ip": "10.0.0.7"}, {"ip": "nonsense"}]},
        }))
        .unwrap()
    }

    #[test]
    fn only_what_podgate_needs_is_cached() {
        let spec = json!({"containers": [], "serviceAccountName": "web", "hostNetwork": true,
            "volumes": [{"name": "eks-pod-identity-token"}]});
        let pod = Pod::from_api(&api_pod(&spec)).unwrap();
        assert_eq!(pod.service_account.to_string(), "app/web");
        assert_eq!(pod.full_name(), "app/web-0");
        assert!(pod.host_network && pod.token_volume && pod.injected && !pod.has_env_from);
        assert_eq!(pod.ips, ["10.0.0.7".parse::<IpAddr>().unwrap()]);
        assert_eq!(pod.annotations.keys().collect::<Vec<_>>(), ["podgate.dev/imds-v1"]);
    }

    #[test]
    fn a_pod_of_a_daemon_set_is_known_by_its_controller_only() {
        let eks_agent =
            DaemonSetRef { namespace: "kube-system".into(), name: "eks-pod-identity-agent".into() };
        let owner = |api_version: &str, kind: &str, name: &str, controller: bool| {
            json!([{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "0"},
                {"apiVersion": api_version, "kind": kind, "name": name, "uid": "1", "controller": controller}])
        };
        let (apps, own) = ("apps/v1", "eks-pod-identity-agent");
        for (namespace, owners, is_eks_agent) in [
            ("kube-system", owner(apps, "DaemonSet", own, true), true),
            ("shop", owner(apps, "DaemonSet", own, true), false),
            ("kube-system", owner(apps, "DaemonSet", "eks-pod-identity-agent-2", true), false),
            ("kube-system", owner(apps, "DaemonSet", own, false), false),
            ("kube-system", owner(apps, "ReplicaSet", own, true), false),
            ("kube-system", owner("shop.example/v1", "DaemonSet", own, true), false),
            ("kube-system", json!([]), false),
        ] {
            let mut pod = api_pod(&json!({"containers": []}));
            pod.metadata.name = Some(format!("{own}-x7k2m"));
            pod.metadata.namespace = Some(namespace.to_owned());
            pod.metadata.labels = Some([("app.kubernetes.io/name".to_owned(), own.to_owned())].into());
            pod.metadata.owner_references = serde_json::from_value(owners.clone()).unwrap();
            assert_eq!(
                eks_agent.controls(&Pod::from_api(&pod).unwrap()),
                is_eks_agent,
                "{namespace}: {owners}"
            );
        }
    }

    #[test]
    fn a_mirror_pod_is_known_by_its_node_and_both_annotations() {
        const HASH: &str = "fc407168c6823ed1e0a61410d6621724";
        let node = |name: &str| json!([{"apiVersion": "v1", "kind": "Node", "name": name, "uid": "0", "controller": true}]);
        let own = json!({CONFIG_HASH: HASH, CONFIG_MIRROR: HASH});
        for (annotations, owners, is_mirror) in [
            (own.clone(), node("n1"), true),
            (own.clone(), node("n2"), false),
            (own.clone(), json!([]), false),
            (own, json!([{"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "0"}]), false),
            (json!({CONFIG_HASH: HASH}), node("n1"), false),
            (json!({CONFIG_HASH: HASH, CONFIG_MIRROR: "x"}), node("n1"), false),
            (json!({CONFIG_HASH: "x", CONFIG_MIRROR: "x"}), node("n1"), false),
        ] {
            let mut pod = api_pod(&json!({"containers": [], "nodeName": "n1"}));
            pod.metadata.annotations = serde_json::from_value(annotations.clone()).unwrap();
            pod.metadata.owner_references = serde_json::from_value(owners.clone()).unwrap();
            let mirrored = Pod::from_api(&pod).unwrap().static_pod.map(|hash| hash.to_string());
            assert_eq!(mirrored.as_deref(), is_mirror.then_some(HASH), "{annotations} {owners}");
        }
    }

    #[test]
    fn a_pod_without_a_service_account_has_the_default_one() {
        let pod = Pod::from_api(&api_pod(&json!({"containers": []}))).unwrap();
        assert_eq!(pod.service_account.to_string(), "app/default");
    }
}
