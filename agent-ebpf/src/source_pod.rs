//! The source pod of a connection attempt: the pod of the running task, and its policy.
//!
//! Owns the walk from a cgroup to a pod and its policy; never decides what the pod gets.

use agent_common::{
    defense::{Defense, holds},
    policy::{
        IMDS_DENY, POD_IDENTITY_ON, PodPolicy, QosClass, UNKNOWN_IN_POD_NETWORK, UNKNOWN_ON_HOST_NETWORK,
    },
};
use aya_ebpf::helpers::bpf_get_current_ancestor_cgroup_id;

use crate::{
    ctx::SockAddrCtx,
    globals::{HOST_NETNS, KUBEPODS_ID, KUBEPODS_LEVEL},
    maps::{EXEMPT, POLICIES, QOS_CLASSES, UNKNOWN_POD},
};

/// The strictest policy, for the case that the map has none.
const STRICTEST: PodPolicy = PodPolicy { imds: IMDS_DENY, pod_identity: POD_IDENTITY_ON };

/// The pod that connects.
pub(crate) struct SourcePod {
    /// 0 while the agent does not know the pod.
    pub(crate) pod_cgroup_id: u64,
    /// Whether it is podgate's own, or of the EKS Pod Identity Agent.
    pub(crate) is_exempt: bool,
    /// The cgroup that its tickets count for.
    pub(crate) counts_for: u64,
    pub(crate) policy: PodPolicy,
}

/// The two cgroups of which one may be a pod's.
///
/// Guaranteed pods are one level below kubepods, others two. A Guaranteed pod's second level is a container and the
/// others' first is a class of service: neither is ever a key of `POLICIES`.
pub(crate) struct Lineage {
    outer: u64,
    /// 0 where there is none.
    inner: u64,
}

// === impl SourcePod ===

impl SourcePod {
    /// The pod of the running task; `None` for a task that is in no pod.
    ///
    /// The task decides and not the socket, which another pod may have made. Only while the agent does not know the pod
    /// does the socket's network namespace tell host-network pods from others.
    #[inline(always)]
    pub(crate) fn current(ctx: &SockAddrCtx) -> Option<Self> {
        let lineage = Lineage::current()?;
        if let Some(pod) = lineage.exempt() {
            return Some(Self {
                pod_cgroup_id: pod,
                is_exempt: true,
                counts_for: pod,
                policy: PodPolicy::EXEMPT,
            });
        }
        if let Some((pod, policy)) = lineage.with_policy() {
            return Some(Self { pod_cgroup_id: pod, is_exempt: false, counts_for: pod, policy });
        }
        let on_host_network = ctx.netns_cookie() == HOST_NETNS.load();
        let slot = if on_host_network { UNKNOWN_ON_HOST_NETWORK } else { UNKNOWN_IN_POD_NETWORK };
        Some(Self {
            pod_cgroup_id: 0,
            is_exempt: false,
            counts_for: if lineage.is_in_class() { lineage.inner } else { lineage.outer },
            policy: unknown(slot),
        })
    }
}

// === impl Lineage ===

impl Lineage {
    #[inline(always)]
    fn current() -> Option<Self> {
        Self::of(ancestor)
    }

    /// From the ids of a cgroup's ancestors by level; `None` where it is in no pod.
    #[inline(always)]
    pub(crate) fn of(ancestor: impl Fn(u32) -> u64) -> Option<Self> {
        let level = KUBEPODS_LEVEL.load();
        let outer = ancestor(level + 1);
        let is_below_kubepods = ancestor(level) == KUBEPODS_ID.load() || !holds(Defense::BelowKubepods);
        let in_pod = is_below_kubepods && outer != 0;
        in_pod.then(|| Self { outer, inner: ancestor(level + 2) })
    }

    /// Whether the pod is the inner one. Never decided by what a pod can make itself: below its own cgroup it makes as many
    /// as it likes. A class that the agent has not announced yet counts as a pod: until then its pods share a limit.
    #[inline(always)]
    fn is_in_class(&self) -> bool {
        let is = |class| QOS_CLASSES.get(class as u32).is_some_and(|cgroup_id| *cgroup_id == self.outer);
        is(QosClass::Burstable) || is(QosClass::BestEffort)
    }

    /// The pod among the two, and what it gets.
    #[inline(always)]
    pub(crate) fn known(&self) -> Option<(u64, PodPolicy)> {
        self.exempt().map(|pod| (pod, PodPolicy::EXEMPT)).or_else(|| self.with_policy())
    }

    /// The one among the two that is exempt.
    #[inline(always)]
    fn exempt(&self) -> Option<u64> {
        if is_exempt(self.inner) { Some(self.inner) } else { is_exempt(self.outer).then_some(self.outer) }
    }

    /// The one among the two that has a policy.
    #[inline(always)]
    fn with_policy(&self) -> Option<(u64, PodPolicy)> {
        // SAFETY: a policy is copied at once; entries are replaced whole.
        unsafe {
            if let Some(policy) = POLICIES.get(self.inner) {
                Some((self.inner, *policy))
            } else {
                POLICIES.get(self.outer).map(|policy| (self.outer, *policy))
            }
        }
    }
}

/// The policy of the pod with this cgroup, if the agent knows one.
#[inline(always)]
pub(crate) fn of_pod(pod_cgroup_id: u64) -> Option<PodPolicy> {
    if is_exempt(pod_cgroup_id) {
        return Some(PodPolicy::EXEMPT);
    }
    // SAFETY: as above.
    unsafe { POLICIES.get(pod_cgroup_id).copied() }
}

/// The policy of a pod that the agent does not know.
#[inline(always)]
pub(crate) fn unknown(slot: u32) -> PodPolicy {
    if !holds(Defense::UnknownPods) {
        return PodPolicy::EXEMPT;
    }
    UNKNOWN_POD.get(slot).copied().unwrap_or(STRICTEST)
}

/// Whether the running task is podgate's own, or of the EKS Pod Identity Agent.
#[inline(always)]
pub(crate) fn current_task_is_exempt() -> bool {
    Lineage::current().is_some_and(|lineage| lineage.exempt().is_some())
}

#[inline(always)]
fn is_exempt(cgroup_id: u64) -> bool {
    EXEMPT.get_ptr(cgroup_id).is_some()
}

/// The cgroup id of the running task's ancestor at `level`, 0 where it has none. Linux 5.7 for programs on cgroups:
/// <https://github.com/torvalds/linux/commit/0f09abd105da6c37713d2b253730a86cb45e127a>.
#[inline(always)]
fn ancestor(level: u32) -> u64 {
    // SAFETY: the helper has no precondition; it answers 0 for a level below the task.
    unsafe { bpf_get_current_ancestor_cgroup_id(level.cast_signed()) }
}
