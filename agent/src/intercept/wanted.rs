//! What the maps must contain while this agent is active, whichever agent is active now.
//!
//! Owns the policies and the exemptions that were set here; never decides when they are written.

use std::collections::{HashMap, HashSet};

use agent_common::{
    abi::EXEMPT_EKS_AGENT,
    pod_listener::PodListener,
    policy::{IMDS_AUDIT, IMDS_OFF, PodPolicy, QosClass, UNKNOWN_IN_POD_NETWORK, UNKNOWN_ON_HOST_NETWORK},
};

use super::{Error, fence::Netdevs, object::Object};

/// What the maps must contain while this agent is active.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) policies: HashMap<u64, PodPolicy>,
    pub(super) unknown_in_pod_network: Option<PodPolicy>,
    pub(super) unknown_on_host_network: Option<PodPolicy>,
    /// The cgroups of the quality-of-service classes.
    pub(super) classes: HashMap<QosClass, u64>,
    /// The agent's listeners by the cookies of the networks that they are in.
    pub(super) pod_listeners: HashMap<u64, PodListener>,
    /// Pods of the EKS Pod Identity Agent.
    pub(super) eks_agents: HashSet<u64>,
    /// The node's netdevs, once they are known.
    pub(super) netdevs: Option<Netdevs>,
}

// === impl Wanted ===

impl Wanted {
    /// Every policy that may decide a connection attempt.
    fn all(&self) -> impl Iterator<Item = &PodPolicy> {
        let unknown = self.unknown_in_pod_network.iter().chain(&self.unknown_on_host_network);
        self.policies.values().chain(unknown)
    }

    /// Writes all of it to the maps, and removes what else a predecessor has left there.
    pub(super) fn apply(&self, object: &mut Object) -> Result<(), Error> {
        self.apply_unknown_pods(object)?;
        for (&class, &cgroup_id) in &self.classes {
            object.set_class(class, cgroup_id)?;
        }
        for (&pod, &policy) in &self.policies {
            object.set_policy(pod, policy)?;
        }
        for pod in object.policies()? {
            if !self.policies.contains_key(&pod) {
                object.remove_policy(pod)?;
            }
        }
        for (&network, &listener) in &self.pod_listeners {
            object.set_pod_listener(network, listener)?;
        }
        for network in object.pod_listeners()? {
            if !self.pod_listeners.contains_key(&network) {
                object.remove_pod_listener(network)?;
            }
        }
        for (pod, why) in object.exempted()? {
            if why == EXEMPT_EKS_AGENT && !self.eks_agents.contains(&pod) {
                object.unexempt(pod)?;
            }
        }
        Ok(())
    }

    /// Writes what pods get that have no policy of their own.
    pub(super) fn apply_unknown_pods(&self, object: &mut Object) -> Result<(), Error> {
        let wanted = [
            (UNKNOWN_IN_POD_NETWORK, self.unknown_in_pod_network),
            (UNKNOWN_ON_HOST_NETWORK, self.unknown_on_host_network),
        ];
        for (slot, policy) in wanted {
            if let Some(policy) = policy {
                object.set_unknown_pod(slot, policy)?;
            }
        }
        Ok(())
    }

    /// Having a program on outgoing packets costs every packet of every pod some 100 ns, so it is there only while some
    /// pod is strict or its requests are to be reported.
    pub(super) fn needs_egress(&self, egress_filter: bool, audit_paths: bool) -> bool {
        self.all().any(|policy| match policy.imds {
            IMDS_OFF => false,
            IMDS_AUDIT => audit_paths,
            _ => egress_filter,
        })
    }
}
