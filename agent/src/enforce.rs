//! Keeps the kernel's policies equal to what `policy` decides for the pods of this node, and forgets pods that
//! are gone.
//!
//! Owns the join of the two things known of a pod, its object and its cgroup; never decides.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use agent_common::policy::PodPolicy;
use futures::{Stream, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info};

use crate::{
    credentials::cache::{CredentialSource, Engine},
    identity::{
        Pod, PodUid, Pods,
        pods::PodEvent,
        tree::{PodCgroup, TreeEvent},
    },
    intercept::{self, Interceptor},
    policy::{Defaults, Policy},
};

/// Where policies go. A trait because only root has the kernel's map.
pub trait PolicyMap: Send + 'static {
    /// Gives the pod with this cgroup a policy.
    fn set(&self, pod_cgroup_id: u64, policy: PodPolicy) -> Result<(), intercept::Error>;
    /// Takes it away.
    fn remove(&self, pod_cgroup_id: u64) -> Result<(), intercept::Error>;
}

/// Applies what happens to pods and their cgroups.
#[derive(Debug)]
pub struct Enforcer<M, S> {
    /// What pods get unless something more particular says otherwise.
    pub defaults: Defaults,
    /// The kernel's map.
    pub map: M,
    /// The cgroup of podgate's own pod, which stays exempt.
    pub own: Option<u64>,
    /// The pods of this node.
    pub pods: Arc<Pods>,
    /// Their credentials.
    pub engine: Arc<S>,
}

/// What is known of the pods' cgroups.
#[derive(Default)]
struct State {
    cgroups: HashMap<PodUid, u64>,
    /// Pods that the API server has no more, but whose cgroup may still be there.
    deleted: HashSet<PodUid>,
}

/// Drops a pod's credentials.
pub trait Forget: Send + Sync + 'static {
    /// The pod is gone.
    fn forget(&self, uid: PodUid) -> impl Future<Output = ()> + Send;
}

// === impl Interceptor, Engine ===

impl PolicyMap for Arc<Mutex<Interceptor>> {
    fn set(&self, pod_cgroup_id: u64, policy: PodPolicy) -> Result<(), intercept::Error> {
        self.lock().unwrap_or_else(PoisonError::into_inner).set_policy(pod_cgroup_id, policy)
    }

    fn remove(&self, pod_cgroup_id: u64) -> Result<(), intercept::Error> {
        self.lock().unwrap_or_else(PoisonError::into_inner).remove_policy(pod_cgroup_id)
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
        mut events: mpsc::Receiver<PodEvent>,
        synced: watch::Sender<bool>,
    ) {
        let mut state = State::default();
        for event in first {
            self.on_tree(&mut state, event).await;
        }
        loop {
            tokio::select! {
                Some(event) = tree.next() => self.on_tree(&mut state, event).await,
                Some(event) = events.recv() => match event {
                    PodEvent::Changed(pod) => self.on_changed(&mut state, &pod),
                    PodEvent::Deleted(uid) => self.on_deleted(&mut state, uid).await,
                    PodEvent::Synced => {
                        synced.send_replace(true);
                    }
                },
                else => return,
            }
        }
    }

    async fn on_tree(&self, state: &mut State, event: TreeEvent) {
        match event {
            TreeEvent::Appeared(PodCgroup { uid, id }) => {
                state.cgroups.insert(uid, id);
                if let Some(pod) = self.pods.get(uid) {
                    self.apply(&pod, id);
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
                    self.engine.forget(uid).await;
                    if state.deleted.remove(&uid) {
                        self.pods.forget(uid);
                    }
                }
            }
        }
    }

    fn on_changed(&self, state: &mut State, pod: &Pod) {
        state.deleted.remove(&pod.uid);
        if let Some(id) = state.cgroups.get(&pod.uid) {
            self.apply(pod, *id);
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

    fn apply(&self, pod: &Pod, id: u64) {
        if Some(id) == self.own {
            return;
        }
        let policy = Policy::decide(&self.defaults, pod);
        match self.map.set(id, policy.kernel()) {
            Ok(()) => {
                info!(pod.uid = %pod.uid, pod.name = pod.full_name(), imds = ?policy.imds, reason = ?policy.reason,
                    "a pod's policy is in force");
            }
            Err(error) => {
                error!(%error, pod.uid = %pod.uid, pod.name = pod.full_name(),
                    "cannot put a pod's policy into the kernel; it counts as unknown");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use agent_common::policy::{IMDS_INTERCEPT, IMDS_OFF};

    use super::*;
    use crate::{policy::ImdsMode, testing::pod};

    #[derive(Clone, Default)]
    struct FakeMap(Arc<Mutex<HashMap<u64, PodPolicy>>>);

    #[derive(Default)]
    struct FakeEngine(Mutex<Vec<PodUid>>);

    impl PolicyMap for FakeMap {
        fn set(&self, id: u64, policy: PodPolicy) -> Result<(), intercept::Error> {
            self.0.lock().unwrap().insert(id, policy);
            Ok(())
        }

        fn remove(&self, id: u64) -> Result<(), intercept::Error> {
            self.0.lock().unwrap().remove(&id);
            Ok(())
        }
    }

    impl Forget for FakeEngine {
        async fn forget(&self, uid: PodUid) {
            self.0.lock().unwrap().push(uid);
        }
    }

    fn enforcer() -> (FakeMap, Enforcer<FakeMap, FakeEngine>, State) {
        let map = FakeMap::default();
        let enforcer = Enforcer {
            defaults: Defaults { imds: ImdsMode::Intercept, imds_v1: false },
            map: map.clone(),
            own: Some(1),
            pods: Arc::default(),
            engine: Arc::default(),
        };
        (map, enforcer, State::default())
    }

    fn imds(map: &FakeMap, id: u64) -> Option<u32> {
        map.0.lock().unwrap().get(&id).map(|policy| policy.imds)
    }

    #[tokio::test]
    async fn a_policy_is_in_force_once_object_and_cgroup_are_there_in_either_order() {
        let (map, enforcer, mut state) = enforcer();
        let (first, second) = (Arc::new(pod("app", "web")), Arc::new(pod("app", "web")));
        enforcer.pods.insert(&first);
        enforcer.on_changed(&mut state, &first);
        assert_eq!(imds(&map, 10), None);
        enforcer.on_tree(&mut state, TreeEvent::Appeared(PodCgroup { uid: first.uid, id: 10 })).await;
        assert_eq!(imds(&map, 10), Some(IMDS_INTERCEPT));

        enforcer.on_tree(&mut state, TreeEvent::Appeared(PodCgroup { uid: second.uid, id: 20 })).await;
        assert_eq!(imds(&map, 20), None);
        enforcer.on_changed(&mut state, &second);
        assert_eq!(imds(&map, 20), Some(IMDS_INTERCEPT));
    }

    #[tokio::test]
    async fn a_change_of_the_pod_changes_its_policy() {
        let (map, enforcer, mut state) = enforcer();
        let before = pod("app", "web");
        enforcer.on_tree(&mut state, TreeEvent::Appeared(PodCgroup { uid: before.uid, id: 10 })).await;
        enforcer.on_changed(&mut state, &before);
        let after = Pod { host_network: true, ..before };
        enforcer.on_changed(&mut state, &after);
        assert_eq!(imds(&map, 10), Some(IMDS_OFF));
    }

    #[tokio::test]
    async fn a_terminating_pod_is_forgotten_with_its_cgroup_and_not_before() {
        let (map, enforcer, mut state) = enforcer();
        let pod = Arc::new(pod("app", "web"));
        enforcer.pods.insert(&pod);
        enforcer.on_tree(&mut state, TreeEvent::Appeared(PodCgroup { uid: pod.uid, id: 10 })).await;
        enforcer.on_deleted(&mut state, pod.uid).await;
        assert!(enforcer.pods.get(pod.uid).is_some() && imds(&map, 10).is_some());
        assert!(enforcer.engine.0.lock().unwrap().is_empty());
        enforcer.on_tree(&mut state, TreeEvent::Gone(PodCgroup { uid: pod.uid, id: 10 })).await;
        assert!(enforcer.pods.get(pod.uid).is_none() && imds(&map, 10).is_none());
        assert_eq!(*enforcer.engine.0.lock().unwrap(), [pod.uid]);
    }

    #[tokio::test]
    async fn a_pod_without_a_cgroup_is_forgotten_at_once() {
        let (_, enforcer, mut state) = enforcer();
        let pod = Arc::new(pod("app", "web"));
        enforcer.pods.insert(&pod);
        enforcer.on_deleted(&mut state, pod.uid).await;
        assert!(enforcer.pods.get(pod.uid).is_none());
    }

    #[tokio::test]
    async fn podgate_s_own_pod_keeps_its_exemption() {
        let (map, enforcer, mut state) = enforcer();
        map.set(1, PodPolicy::EXEMPT).unwrap();
        let own = Arc::new(pod("kube-system", "podgate"));
        enforcer.on_tree(&mut state, TreeEvent::Appeared(PodCgroup { uid: own.uid, id: 1 })).await;
        enforcer.on_changed(&mut state, &own);
        assert_eq!(imds(&map, 1), Some(IMDS_OFF));
    }
}
