//! Keeps the kernel's policies equal to what `policy` decides for the pods of this node, and removes what is
//! cached of pods that no longer exist.
//!
//! Owns the join of what is known of a pod, its object, its namespace and its cgroup; never decides.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use agent_common::policy::PodPolicy;
use futures::{Stream, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info, warn};

use crate::{
    control::policy_map::PolicyMap,
    identity::{
        ConfigHash, DaemonSetRef, Pod, PodUid, Pods,
        cgroup::Owner,
        networks::Networks,
        tree::{PodCgroup, StaticCgroup, TreeEvent},
        watch::ClusterEvent,
    },
    policy::lookup::Policies,
    policy::{self, AnnotationScope, ImdsMode, Policy},
};

/// When the kernel did not take a policy, it is tried again after this time.
const RETRY_DELAY: std::time::Duration = std::time::Duration::from_secs(1);

/// What pods' coming and going means to what is cached for them.
pub(crate) trait PodLifecycle: Send + Sync + 'static {
    /// The API server shows the pod, which has no cgroup yet.
    fn on_pod_pending(&self, uid: PodUid);
    /// The pod has a cgroup, for the first time or again.
    fn on_cgroup_created(&self, pod: PodCgroup);
    /// The pod's cgroup was removed, and the API server may go on to show it.
    fn on_cgroup_removed(&self, uid: PodUid) -> impl Future<Output = ()> + Send;
    /// The pod has no cgroup, and the API server has it no more.
    fn on_pod_deleted(&self, uid: PodUid) -> impl Future<Output = ()> + Send;
    /// The pod is going to ask.
    fn prefetch(&self, pod: &Arc<Pod>);
}

/// Applies what happens to pods, namespaces and cgroups.
#[derive(Debug)]
pub(crate) struct Reconciler<M, S> {
    /// What pods get.
    pub policies: Policies,
    /// The kernel's map.
    pub map: M,
    /// The cgroup of podgate's own pod, which stays exempt.
    pub own_pod: Option<u64>,
    /// Whose pods are the EKS Pod Identity Agent, which is exempt.
    pub eks_agent: Option<DaemonSetRef>,
    /// Learns whether such a pod is on this node.
    pub eks_agent_is_here: watch::Sender<bool>,
    /// The pods of this node.
    pub pods: Arc<Pods>,
    /// Their networks.
    pub networks: Arc<Networks>,
    /// What is cached for them.
    pub lifecycle: S,
    /// Whether those are fetched before the pods ask.
    pub prefetch: bool,
}

/// What is known of the pods.
#[derive(Default)]
struct State {
    cgroups: HashMap<PodUid, u64>,
    /// The policies in the kernel's map.
    effective: HashMap<PodUid, Policy>,
    /// Pods of the EKS Pod Identity Agent that the API server has.
    eks_agents: HashSet<PodUid>,
    /// Pods whose policy the kernel did not take.
    to_retry: HashSet<PodUid>,
    /// Cgroups that were removed and that the kernel still has, with their pods.
    to_remove: HashMap<u64, Owner>,
    /// Those that are exempt.
    exempt: HashSet<PodUid>,
    /// The static pods that have a cgroup.
    static_pods: HashMap<ConfigHash, StaticPod>,
    /// Pods that the API server has no more, but whose cgroup may still be there.
    deleted: HashSet<PodUid>,
    /// Pods whose cgroup was removed, but that the API server may still have.
    cgroup_removed: HashSet<PodUid>,
    /// What pods get that are not in the map, in a network of their own and on the host's.
    unknown: Option<(PodPolicy, PodPolicy)>,
    pods_synced: bool,
    namespaces_synced: bool,
}

/// A static pod on the node.
struct StaticPod {
    cgroup_id: u64,
    /// The policy in the kernel's map.
    effective: Option<Policy>,
}

// === impl Reconciler ===

impl<M: PolicyMap, S: PodLifecycle> Reconciler<M, S> {
    /// Follows both streams forever. `first` are the cgroups that exist already; `synced` learns when every pod
    /// that was there at the beginning has its policy.
    pub(crate) async fn run(
        self,
        first: Vec<TreeEvent>,
        mut tree: impl Stream<Item = TreeEvent> + Unpin,
        mut events: mpsc::Receiver<ClusterEvent>,
        synced: watch::Sender<bool>,
    ) {
        let mut state = State::default();
        for event in first {
            self.on_tree(&mut state, event).await;
        }
        loop {
            tokio::select! {
                Some(event) = tree.next() => self.on_tree(&mut state, event).await,
                Some(event) = events.recv() => self.on_cluster(&mut state, event).await,
                () = tokio::time::sleep(RETRY_DELAY), if !(state.to_retry.is_empty() && state.to_remove.is_empty()) => self.retry(&mut state).await,
                else => return,
            }
            self.publish(&mut state).await;
            if state.pods_synced && state.namespaces_synced {
                synced.send_replace(true);
            }
        }
    }

    /// Publishes what all that is known of the pods amounts to: what unknown pods get, and whether the EKS Pod Identity
    /// Agent is on this node.
    async fn publish(&self, state: &mut State) {
        self.apply_unknown(state).await;
        let is_here = !state.eks_agents.is_empty();
        self.eks_agent_is_here.send_if_modified(|known| std::mem::replace(known, is_here) != is_here);
    }

    async fn on_tree(&self, state: &mut State, event: TreeEvent) {
        match event {
            TreeEvent::Created(PodCgroup { uid, id }) => {
                state.cgroups.insert(uid, id);
                state.effective.remove(&uid);
                state.exempt.remove(&uid);
                state.cgroup_removed.remove(&uid);
                self.lifecycle.on_cgroup_created(PodCgroup { uid, id });
                if let Some(pod) = self.pods.get(uid) {
                    self.apply(state, &pod).await;
                }
            }
            TreeEvent::StaticCreated(StaticCgroup { config_hash, id }) => {
                state.static_pods.insert(config_hash, StaticPod { cgroup_id: id, effective: None });
                self.apply_static(state, config_hash).await;
            }
            TreeEvent::StaticRemoved(StaticCgroup { config_hash, id }) => {
                if Some(id) != self.own_pod {
                    self.remove_policy(state, id, Owner::StaticPod(config_hash)).await;
                }
                // Made anew, as above.
                if state.static_pods.get(&config_hash).is_some_and(|known| known.cgroup_id == id) {
                    state.static_pods.remove(&config_hash);
                }
            }
            TreeEvent::QosClass(class, id) => {
                if let Err(error) = self.map.set_class(class, id).await {
                    error!(%error, ?class,
                        "cannot tell the kernel of a class of pods; those that it does not know yet share a limit");
                }
            }
            TreeEvent::Removed(PodCgroup { uid, id }) => {
                if Some(id) != self.own_pod {
                    self.remove_policy(state, id, Owner::Pod(uid)).await;
                }
                // Made anew, as when the kubelet starts over: then another cgroup is the pod's.
                if state.cgroups.get(&uid) == Some(&id) {
                    state.cgroups.remove(&uid);
                    state.effective.remove(&uid);
                    state.exempt.remove(&uid);
                    self.networks.remove(uid);
                    if state.deleted.remove(&uid) {
                        self.remove_pod(uid).await;
                    } else {
                        self.note_removed(state, uid).await;
                    }
                }
            }
        }
    }

    async fn on_cluster(&self, state: &mut State, event: ClusterEvent) {
        match event {
            ClusterEvent::PodChanged(pod) => {
                state.deleted.remove(&pod.uid);
                if self.is_eks_agent(&pod) {
                    state.eks_agents.insert(pod.uid);
                } else {
                    state.eks_agents.remove(&pod.uid);
                }
                report_unreadable(&pod.annotations, AnnotationScope::Pod, &pod.full_name());
                self.note_absence(state, &pod).await;
                self.apply(state, &pod).await;
                self.prefetch(&pod);
            }
            ClusterEvent::PodDeleted(uid) => {
                state.eks_agents.remove(&uid);
                self.on_deleted(state, uid).await;
            }
            ClusterEvent::PodsSynced => {
                state.pods_synced = true;
                let never_shown: Vec<_> =
                    state.cgroup_removed.extract_if(|uid| self.pods.get(*uid).is_none()).collect();
                for uid in never_shown {
                    self.remove_pod(uid).await;
                }
            }
            ClusterEvent::NamespaceChanged(name) => {
                if let Some(annotations) = self.policies.namespaces.get(&name) {
                    report_unreadable(&annotations, AnnotationScope::Namespace, &name);
                }
                for pod in self.pods.of_namespace(&name) {
                    self.apply(state, &pod).await;
                    self.prefetch(&pod);
                }
            }
            ClusterEvent::NamespacesSynced => state.namespaces_synced = true,
        }
    }

    /// Fetches a pod's credentials where it is known to want them, and its policy lets it have them.
    fn prefetch(&self, pod: &Arc<Pod>) {
        let has_credentials = |policy: Policy| policy.pod_identity || policy.imds == ImdsMode::Intercept;
        if self.prefetch && will_ask(pod) && self.policies.of(pod).is_some_and(has_credentials) {
            self.lifecycle.prefetch(pod);
        }
    }

    /// Tries again what the kernel did not take.
    async fn retry(&self, state: &mut State) {
        for (id, owner) in std::mem::take(&mut state.to_remove) {
            self.remove_policy(state, id, owner).await;
        }
        for uid in std::mem::take(&mut state.to_retry) {
            if let Some(pod) = self.pods.get(uid) {
                self.apply(state, &pod).await;
            }
        }
    }

    async fn remove_policy(&self, state: &mut State, id: u64, owner: Owner) {
        if let Err(error) = self.map.remove(id).await {
            error!(%error, pod.uid = %owner, "cannot take a pod's policy out of the kernel; trying again");
            state.to_remove.insert(id, owner);
        }
    }

    async fn on_deleted(&self, state: &mut State, uid: PodUid) {
        if state.cgroups.contains_key(&uid) {
            // Its containers may be terminating, and need their credentials to the end.
            state.deleted.insert(uid);
        } else {
            state.cgroup_removed.remove(&uid);
            self.remove_pod(uid).await;
        }
    }

    /// Notes what there is no cgroup for. Of a pod whose containers have all ended none comes any more, also where it went
    /// before this agent came.
    async fn note_absence(&self, state: &mut State, pod: &Pod) {
        if state.cgroups.contains_key(&pod.uid) {
            return;
        }
        if pod.finished {
            self.note_removed(state, pod.uid).await;
        } else {
            self.lifecycle.on_pod_pending(pod.uid);
        }
    }

    /// What the API server still shows of the pod brings nothing of it back; a new cgroup would.
    async fn note_removed(&self, state: &mut State, uid: PodUid) {
        if state.cgroup_removed.insert(uid) {
            self.lifecycle.on_cgroup_removed(uid).await;
        }
    }

    async fn remove_pod(&self, uid: PodUid) {
        self.lifecycle.on_pod_deleted(uid).await;
        self.pods.remove(uid);
        debug!(pod.uid = %uid, "removed a pod");
    }

    fn is_eks_agent(&self, pod: &Pod) -> bool {
        self.eks_agent.as_ref().is_some_and(|eks_agent| eks_agent.controls(pod))
    }

    /// Makes a pod's policy effective, once its cgroup and its namespace are known.
    async fn apply(&self, state: &mut State, pod: &Pod) {
        if let Some(static_pod) = pod.static_pod {
            self.apply_static(state, static_pod).await;
        }
        let Some(&id) = state.cgroups.get(&pod.uid).filter(|id| Some(**id) != self.own_pod) else { return };
        self.apply_exemption(state, pod, id).await;
        if state.exempt.contains(&pod.uid) {
            return;
        }
        let Some(policy) = self.policies.of(pod) else { return };
        if state.effective.get(&pod.uid) == Some(&policy) {
            return;
        }
        match self.map.set(id, policy.kernel()).await {
            Ok(()) => {
                state.to_retry.remove(&pod.uid);
                state.effective.insert(pod.uid, policy);
                info!(pod.uid = %pod.uid, pod.name = pod.full_name(), imds = ?policy.imds, reason = ?policy.reason,
                    pod_identity = policy.pod_identity, may_be_injected = !pod.injected && pod.has_env_from,
                    "a pod's policy is effective");
            }
            Err(error) => {
                error!(%error, pod.uid = %pod.uid, pod.name = pod.full_name(),
                    "cannot put a pod's policy into the kernel; it counts as unknown until that works");
                state.to_retry.insert(pod.uid);
            }
        }
    }

    /// Makes a static pod's policy effective, once its cgroup, its mirror pod and that one's namespace are known. It keeps
    /// its policy while the mirror pod is away: the kubelet makes another.
    async fn apply_static(&self, state: &mut State, config_hash: ConfigHash) {
        let known = state.static_pods.get_mut(&config_hash);
        let Some(known) = known.filter(|known| Some(known.cgroup_id) != self.own_pod) else { return };
        let Some((mirror, policy)) = self.policies.of_static_pod(&self.pods, config_hash) else { return };
        if known.effective == Some(policy) {
            return;
        }
        match self.map.set(known.cgroup_id, policy.kernel()).await {
            Ok(()) => {
                known.effective = Some(policy);
                state.to_retry.remove(&mirror.uid);
                info!(pod.uid = %config_hash, pod.name = mirror.full_name(), imds = ?policy.imds, reason = ?policy.reason,
                    pod_identity = policy.pod_identity, "a static pod's policy is effective");
            }
            Err(error) => {
                error!(%error, pod.uid = %config_hash, pod.name = mirror.full_name(),
                    "cannot put a static pod's policy into the kernel; it counts as unknown until that works");
                state.to_retry.insert(mirror.uid);
            }
        }
    }

    async fn apply_exemption(&self, state: &mut State, pod: &Pod, id: u64) {
        let is_eks_agent = self.is_eks_agent(pod);
        if is_eks_agent == state.exempt.contains(&pod.uid) {
            return;
        }
        let applied = if is_eks_agent { self.map.exempt(id).await } else { self.map.unexempt(id).await };
        if let Err(error) = applied {
            error!(%error, pod.uid = %pod.uid, pod.name = pod.full_name(), is_eks_agent,
                "cannot tell the kernel whether a pod is the EKS Pod Identity Agent");
            return;
        }
        if is_eks_agent {
            state.exempt.insert(pod.uid);
            info!(pod.uid = %pod.uid, pod.name = pod.full_name(), "the EKS Pod Identity Agent is exempt");
        } else {
            state.exempt.remove(&pod.uid);
            info!(pod.uid = %pod.uid, pod.name = pod.full_name(), "a pod is the EKS Pod Identity Agent no more");
        }
    }

    /// What pods get that have no policy yet: at least as strict as anybody on this node may be.
    async fn apply_unknown(&self, state: &mut State) {
        // Of those too whose cgroup is still to come: it may be theirs that is not known. What a namespace has to say that
        // is not known may be as strict as it likes.
        let modes = self.pods.all().into_iter().map(|pod| {
            let mode = self.policies.of(&pod).map_or(ImdsMode::Intercept, |policy| policy.imds);
            (mode, pod.host_network)
        });
        let (mut strictest, mut covers_host_network) =
            (self.policies.strictest(), self.policies.covers_host_network());
        for (mode, on_host_network) in modes {
            strictest = strictest.max(mode);
            covers_host_network |= on_host_network && mode.is_strict();
        }
        let unknown = policy::unknown_pod(&self.policies.defaults, strictest);
        let on_host_network = if covers_host_network { unknown } else { PodPolicy::EXEMPT };
        if state.unknown == Some((unknown, on_host_network)) {
            return;
        }
        match self.map.set_unknown(unknown, on_host_network).await {
            Ok(()) => state.unknown = Some((unknown, on_host_network)),
            Err(error) => error!(%error, "cannot tell the kernel what pods get that it does not know"),
        }
    }
}

/// Whether a pod is known to want credentials: the EKS webhook gave it what it takes, or its annotation asks for them.
fn will_ask(pod: &Pod) -> bool {
    let is_annotated = pod.annotations.get(policy::ANNOTATION_IMDS).is_some_and(|mode| mode == "intercept");
    pod.static_pod.is_none() && !pod.finished && (pod.injected || is_annotated)
}

/// Says which annotations cannot be read.
fn report_unreadable(annotations: &policy::Annotations, scope: AnnotationScope, owner: &str) {
    for unreadable in policy::unreadable(annotations, scope) {
        warn!(of = owner, "{unreadable}; the strictest that fits applies");
    }
}

#[cfg(test)]
mod tests;
