//! The policy of a pod now: the rules, applied to what is known of its namespace.
//!
//! Owns that join; never decides by itself, never watches anything.

use std::{sync::Arc, time::Instant};

use super::{
    annotation::{ANNOTATION_IMDS, Annotations},
    mode::ImdsMode,
    rules::{Defaults, Policy},
};
use crate::identity::{ConfigHash, Namespaces, Pod, Pods};

/// Finds the policy of each pod.
#[derive(Clone, Debug)]
pub struct Policies {
    /// What pods get where no annotation says otherwise.
    pub defaults: Defaults,
    /// The annotations of namespaces.
    pub namespaces: Arc<Namespaces>,
}

// === impl Policies ===

impl Policies {
    /// The pod's policy; `None` until its namespace is known, whose annotations may ask for anything.
    pub fn of(&self, pod: &Pod) -> Option<Policy> {
        let namespace = self.namespaces.get(&pod.service_account.namespace)?;
        Some(Policy::decide(&self.defaults, &namespace, pod))
    }

    /// A static pod's policy, and the mirror pod that it is from; `None` until such a pod and its namespace are known. It is
    /// the strictest one's: who may write pods must not loosen what the node's own pods get.
    pub fn of_static_pod(&self, pods: &Pods, static_pod: ConfigHash) -> Option<(Arc<Pod>, Policy)> {
        let mirrors = pods.mirroring(static_pod).into_iter();
        let policies = mirrors.filter_map(|mirror| self.of(&mirror).map(|policy| (mirror, policy)));
        policies.max_by_key(|(_, policy)| policy.imds)
    }

    /// The pod's policy, waiting for its namespace until `deadline`.
    pub async fn wait(&self, pod: &Pod, deadline: Instant) -> Option<Policy> {
        if let Some(policy) = self.of(pod) {
            return Some(policy);
        }
        self.namespaces.wait(&pod.service_account.namespace, deadline).await;
        self.of(pod)
    }

    /// The strictest mode that the operator or a namespace gives to any pod of the cluster.
    pub fn strictest(&self) -> ImdsMode {
        let of_namespaces = self.namespaces.all().into_iter().filter_map(|namespace| imds(&namespace)).max();
        let of_operator = self.defaults.imds.max(self.defaults.imds_floor);
        of_namespaces.map_or(of_operator, |mode| mode.max(of_operator))
    }

    /// Whether the annotation of some namespace covers its pods on the host's network too.
    pub fn covers_host_network(&self) -> bool {
        self.namespaces.all().iter().any(|namespace| imds(namespace).is_some_and(ImdsMode::is_strict))
    }
}

/// The mode of a namespace's annotation; an unknown value counts as `intercept` at least, as in [`Policy::decide`].
fn imds(namespace: &Annotations) -> Option<ImdsMode> {
    namespace.get(ANNOTATION_IMDS).map(|mode| mode.parse().unwrap_or(ImdsMode::Intercept))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{policy::UnknownPods, testing::pod};

    fn policies(imds: ImdsMode, namespaces: &[(&str, Option<&str>)]) -> Policies {
        let known = Namespaces::default();
        for (name, mode) in namespaces {
            let annotation = mode.map(|mode| (ANNOTATION_IMDS.to_owned(), mode.to_owned()));
            known.insert(name, annotation.into_iter().collect());
        }
        let defaults = Defaults {
            imds,
            imds_floor: ImdsMode::Off,
            imds_unknown: UnknownPods::Strict,
            imds_v1: false,
            tokenless: true,
        };
        Policies { defaults, namespaces: Arc::new(known) }
    }

    #[test]
    fn a_pod_has_no_policy_before_its_namespace_is_known() {
        let policies = policies(ImdsMode::Audit, &[("app", Some("deny"))]);
        assert_eq!(policies.of(&pod("app", "web")).map(|policy| policy.imds), Some(ImdsMode::Deny));
        assert_eq!(policies.of(&pod("new", "web")), None);
    }

    #[test]
    fn the_strictest_of_operator_and_namespaces_counts_for_unknown_pods() {
        assert_eq!(policies(ImdsMode::Audit, &[("a", None)]).strictest(), ImdsMode::Audit);
        assert_eq!(
            policies(ImdsMode::Audit, &[("a", None), ("b", Some("deny"))]).strictest(),
            ImdsMode::Deny
        );
        assert_eq!(policies(ImdsMode::Off, &[("a", Some("Deny"))]).strictest(), ImdsMode::Intercept);
        assert_eq!(policies(ImdsMode::Deny, &[("a", Some("off"))]).strictest(), ImdsMode::Deny);
    }

    #[test]
    fn a_namespace_that_intercepts_asks_for_its_host_network_pods() {
        assert!(!policies(ImdsMode::Deny, &[("a", None), ("b", Some("audit"))]).covers_host_network());
        assert!(policies(ImdsMode::Off, &[("a", Some("intercept"))]).covers_host_network());
    }
}
