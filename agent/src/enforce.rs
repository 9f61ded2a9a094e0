//! Keeps the kernel's policies equal to what `policy` decides for the pods of this node, and forgets pods that
//! are gone.
//!
//! Owns the join of what is known of a pod, its object, its namespace and its cgroup; never decides.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use agent_common::policy::PodPolicy;
use futures::{Stream, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info, warn};

use crate::{
    credentials::cache::{CredentialSource, Engine},
    identity::{
        Pod, PodUid, Pods,
        network::Networks,
        tree::{PodCgroup, TreeEvent},
        watch::ClusterEvent,
    },
    intercept::{self, Interceptor},
    policies::Policies,
    policy::{self, Place, Policy},
};

/// Where policies go. A trait because only root has the kernel's map.
pub trait PolicyMap: Send + 'static {
    /// Gives the pod with this cgroup a policy.
    fn set(&self, pod_cgroup_id: u64, policy: PodPolicy) -> Result<(), intercept::Error>;
    /// Takes it away.
    fn remove(&self, pod_cgroup_id: u64) -> Result<(), intercept::Error>;
    /// Gives a policy to pods that have none of their own yet: one to those in a network of their own, one to those on
    /// the host's.
    fn set_unknown(
        &self,
        in_pod_network: PodPolicy,
        on_host_network: PodPolicy,
    ) -> Result<(), intercept::Error>;
}

/// Drops a pod's credentials.
pub trait Forget: Send + Sync + 'static {
    /// The pod is gone.
    fn forget(&self, uid: PodUid) -> impl Future<Output = ()> + Send;
}

/// Applies what happens to pods, namespaces and cgroups.
#[derive(Debug)]
pub struct Enforcer<M, S> {
    /// What pods get.
    pub policies: Policies,
    /// The kernel's map.
    pub map: M,
    /// The cgroup of podgate's own pod, which stays exempt.
    pub own: Option<u64>,
    /// The pods of this node.
    pub pods: Arc<Pods>,
    /// Their networks.
    pub networks: Arc<Networks>,
    /// Their credentials.
    pub engine: Arc<S>,
}

/// What is known of the pods.
#[derive(Default)]
struct State {
    cgroups: HashMap<PodUid, u64>,
    /// The policies in the kernel's map.
    in_force: HashMap<PodUid, Policy>,
    /// Pods that the API server has no more, but whose cgroup may still be there.
    deleted: HashSet<PodUid>,
    /// What pods get that are not in the map, in a network of their own and on the host's.
    unknown: Option<(PodPolicy, PodPolicy)>,
    pods_synced: bool,
    namespaces_synced: bool,
}

// === impl Interceptor, Engine ===

impl PolicyMap for Arc<Mutex<Interceptor>> {
    fn set(&self, pod_cgroup_id: u64, policy: PodPolicy) -> Result<(), intercept::Error> {
        self.lock().unwrap_or_else(PoisonError::into_inner).set_policy(pod_cgroup_id, policy)
    }

    fn remove(&self, pod_cgroup_id: u64) -> Result<(), intercept::Error> {
        self.lock().unwrap_or_else(PoisonError::into_inner).remove_policy(pod_cgroup_id)
    }

    fn set_unknown(
        &self,
        in_pod_network: PodPolicy,
        on_host_network: PodPolicy,
    ) -> Result<(), intercept::Error> {
        self.lock().unwrap_or_else(PoisonError::into_inner).set_unknown_pods(in_pod_network, on_host_network)
    }
}

impl<S: CredentialSource> Forget for Engine<S> {
    async fn forget(&self, uid: PodUid) {
        Self::forget(self, uid).await;
    }
}

// === impl Enforcer ===

impl<M: PolicyMap, S: Forget> Enforcer<M, S> {
    /// Follows both streams for ever. `first` are the cgroups that exist already; `synced` learns when every pod
    /// that was there at the beginning has its policy.
    pub async fn run(
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
                else => return,
            }
            self.apply_unknown(&mut state);
            if state.pods_synced && state.namespaces_synced {
                synced.send_replace(true);
            }
        }
    }

    async fn on_tree(&self, state: &mut State, event: TreeEvent) {
        match event {
            TreeEvent::Appeared(PodCgroup { uid, id }) => {
                state.cgroups.insert(uid, id);
                state.in_force.remove(&uid);
                if let Some(pod) = self.pods.get(uid) {
                    self.apply(state, &pod);
                }
            }
            TreeEvent::Gone(PodCgroup { uid, id }) => {
                if Some(id) != self.own
                    && let Err(error) = self.map.remove(id)
                {
                    error!(%error, pod.uid = %uid, "cannot take a pod's policy out of the kernel");
                }
                // Made anew, as when the kubelet starts over: then another cgroup is the pod's.
                if state.cgroups.get(&uid) == Some(&id) {
                    state.cgroups.remove(&uid);
                    state.in_force.remove(&uid);
                    self.networks.forget(uid);
                    self.engine.forget(uid).await;
                    if state.deleted.remove(&uid) {
                        self.pods.forget(uid);
                    }
                }
            }
        }
    }

    async fn on_cluster(&self, state: &mut State, event: ClusterEvent) {
        match event {
            ClusterEvent::PodChanged(pod) => {
                state.deleted.remove(&pod.uid);
                report(&pod.annotations, Place::Pod, &pod.full_name());
                self.apply(state, &pod);
            }
            ClusterEvent::PodDeleted(uid) => self.on_deleted(state, uid).await,
            ClusterEvent::PodsSynced => state.pods_synced = true,
            ClusterEvent::NamespaceChanged(name) => {
                if let Some(annotations) = self.policies.namespaces.get(&name) {
                    report(&annotations, Place::Namespace, &name);
                }
                for pod in self.pods.of_namespace(&name) {
                    self.apply(state, &pod);
                }
            }
            ClusterEvent::NamespacesSynced => state.namespaces_synced = true,
        }
    }

    async fn on_deleted(&self, state: &mut State, uid: PodUid) {
        if state.cgroups.contains_key(&uid) {
            // Its containers may be terminating, and need their credentials to the end.
            state.deleted.insert(uid);
        } else {
            self.engine.forget(uid).await;
            self.pods.forget(uid);
            debug!(pod.uid = %uid, "forgot a pod");
        }
    }

    /// Puts a pod's policy into force, once its cgroup and its namespace are known.
    fn apply(&self, state: &mut State, pod: &Pod) {
        let Some(&id) = state.cgroups.get(&pod.uid) else { return };
        let Some(policy) = self.policies.of(pod).filter(|_| Some(id) != self.own) else { return };
        if state.in_force.get(&pod.uid) == Some(&policy) {
            return;
        }
        match self.map.set(id, policy.kernel()) {
            Ok(()) => {
                state.in_force.insert(pod.uid, policy);
                info!(pod.uid = %pod.uid, pod.name = pod.full_name(), imds = ?policy.imds, reason = ?policy.reason,
                    pod_identity = policy.pod_identity, "a pod's policy is in force");
            }
            Err(error) => {
                error!(%error, pod.uid = %pod.uid, pod.name = pod.full_name(),
                    "cannot put a pod's policy into the kernel; it counts as unknown");
            }
        }
    }

    /// What pods get that have no policy yet: as strict as anybody on this node may be.
    fn apply_unknown(&self, state: &mut State) {
        let here = state.in_force.values().map(|policy| policy.imds).max();
        let strictest = self.policies.strictest();
        let unknown = policy::unknown_pod(here.map_or(strictest, |here| here.max(strictest)));
        let on_host_network = if self.policies.ask_for_host_network() { unknown } else { PodPolicy::EXEMPT };
        if state.unknown == Some((unknown, on_host_network)) {
            return;
        }
        match self.map.set_unknown(unknown, on_host_network) {
            Ok(()) => state.unknown = Some((unknown, on_host_network)),
            Err(error) => error!(%error, "cannot tell the kernel what pods get that it does not know"),
        }
    }
}

/// Says which annotations cannot be read.
fn report(annotations: &policy::Annotations, place: Place, whose: &str) {
    for unreadable in policy::unreadable(annotations, place) {
        warn!(of = whose, "{unreadable}; the strictest that fits applies");
    }
}

#[cfg(test)]
mod tests;
