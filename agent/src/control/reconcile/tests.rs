use parking_lot::Mutex;

use agent_common::policy::{IMDS_AUDIT, IMDS_DENY, IMDS_INTERCEPT, IMDS_OFF, QosClass};

use super::*;
use crate::{
    identity::Namespaces,
    intercept,
    policy::{ANNOTATION_IMDS, Defaults, ImdsMode, UnknownPods},
    testing::pod,
};

#[derive(Clone, Default)]
struct FakeMap(Arc<Mutex<Kernel>>);

#[derive(Default)]
struct Kernel {
    policies: HashMap<u64, PodPolicy>,
    exempt: HashSet<u64>,
    classes: HashMap<QosClass, u64>,
    unknown: Option<(PodPolicy, PodPolicy)>,
}

#[derive(Default)]
struct FakePodState {
    told: Mutex<Vec<(Told, PodUid)>>,
    prefetched: Mutex<Vec<PodUid>>,
}

/// What is told of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Pending,
    CgroupCreated,
    CgroupRemoved,
    Deleted,
}

impl PolicyMap for FakeMap {
    async fn set(&self, id: u64, policy: PodPolicy) -> Result<(), intercept::Error> {
        self.0.lock().policies.insert(id, policy);
        Ok(())
    }

    async fn remove(&self, id: u64) -> Result<(), intercept::Error> {
        let mut kernel = self.0.lock();
        kernel.policies.remove(&id);
        kernel.exempt.remove(&id);
        Ok(())
    }

    async fn exempt(&self, id: u64) -> Result<(), intercept::Error> {
        self.0.lock().exempt.insert(id);
        Ok(())
    }

    async fn unexempt(&self, id: u64) -> Result<(), intercept::Error> {
        self.0.lock().exempt.remove(&id);
        Ok(())
    }

    async fn set_class(&self, class: QosClass, id: u64) -> Result<(), intercept::Error> {
        self.0.lock().classes.insert(class, id);
        Ok(())
    }

    async fn set_unknown(&self, in_pod: PodPolicy, on_host: PodPolicy) -> Result<(), intercept::Error> {
        self.0.lock().unknown = Some((in_pod, on_host));
        Ok(())
    }
}

impl FakePodState {
    fn tell(&self, what: Told, uid: PodUid) {
        self.told.lock().push((what, uid));
    }

    /// What was told of a pod, in order.
    fn told(&self, uid: PodUid) -> Vec<Told> {
        let told = self.told.lock();
        told.iter().filter(|(_, of)| *of == uid).map(|(what, _)| *what).collect()
    }
}

impl PodLifecycle for FakePodState {
    fn on_pod_pending(&self, uid: PodUid) {
        self.tell(Told::Pending, uid);
    }

    fn on_cgroup_created(&self, pod: PodCgroup) {
        self.tell(Told::CgroupCreated, pod.uid);
    }

    async fn on_cgroup_removed(&self, uid: PodUid) {
        self.tell(Told::CgroupRemoved, uid);
    }

    async fn on_pod_deleted(&self, uid: PodUid) {
        self.tell(Told::Deleted, uid);
    }

    fn prefetch(&self, pod: &Arc<Pod>) {
        self.prefetched.lock().push(pod.uid);
    }
}

/// A node whose pods are left to the node's role by default.
struct Node {
    map: FakeMap,
    reconciler: Reconciler<FakeMap, FakePodState>,
    state: State,
}

impl Node {
    fn new() -> Self {
        let map = FakeMap::default();
        let namespaces = Arc::<Namespaces>::default();
        namespaces.insert("app", policy::Annotations::new());
        let defaults = Defaults {
            imds: ImdsMode::Audit,
            imds_floor: ImdsMode::Off,
            imds_unknown: UnknownPods::AsKnown,
            imds_v1: false,
            tokenless: true,
        };
        let reconciler = Reconciler {
            policies: Policies { defaults, namespaces },
            map: map.clone(),
            own_pod: Some(1),
            eks_agent: Some(DaemonSetRef { namespace: "aws".into(), name: "agent".into() }),
            eks_agent_is_here: watch::Sender::new(false),
            pods: Arc::default(),
            networks: Arc::new(Networks::new(0)),
            lifecycle: FakePodState::default(),
            prefetch: true,
        };
        Self { map, reconciler, state: State::default() }
    }

    async fn cluster(&mut self, event: ClusterEvent) {
        self.reconciler.on_cluster(&mut self.state, event).await;
        self.reconciler.publish(&mut self.state).await;
    }

    async fn pod(&mut self, pod: &Arc<Pod>) {
        self.reconciler.pods.insert(pod);
        self.cluster(ClusterEvent::PodChanged(Arc::clone(pod))).await;
    }

    async fn namespace(&mut self, name: &str, imds: &str) {
        let annotations = [(ANNOTATION_IMDS.to_owned(), imds.to_owned())].into();
        self.reconciler.policies.namespaces.insert(name, annotations);
        self.cluster(ClusterEvent::NamespaceChanged(name.to_owned())).await;
    }

    async fn cgroup_created(&mut self, uid: PodUid, id: u64) {
        self.reconciler.on_tree(&mut self.state, TreeEvent::Created(PodCgroup { uid, id })).await;
    }

    async fn cgroup_removed(&mut self, uid: PodUid, id: u64) {
        self.reconciler.on_tree(&mut self.state, TreeEvent::Removed(PodCgroup { uid, id })).await;
    }

    fn imds(&self, id: u64) -> Option<u32> {
        self.map.0.lock().policies.get(&id).map(|policy| policy.imds)
    }

    fn unknown(&self) -> (u32, u32) {
        let (in_pod, on_host) = self.map.0.lock().unknown.unwrap();
        (in_pod.imds, on_host.imds)
    }
}

#[tokio::test]
async fn a_policy_is_effective_once_pod_and_cgroup_are_there_in_either_order() {
    let mut node = Node::new();
    let (first, second) = (Arc::new(pod("app", "web")), Arc::new(pod("app", "web")));
    node.pod(&first).await;
    assert_eq!(node.imds(10), None);
    node.cgroup_created(first.uid, 10).await;
    assert_eq!(node.imds(10), Some(IMDS_AUDIT));

    node.cgroup_created(second.uid, 20).await;
    assert_eq!(node.imds(20), None);
    node.pod(&second).await;
    assert_eq!(node.imds(20), Some(IMDS_AUDIT));
}

#[tokio::test]
async fn a_change_of_the_pod_or_its_namespace_changes_its_policy() {
    let mut node = Node::new();
    let before = pod("app", "web");
    node.cgroup_created(before.uid, 10).await;
    node.pod(&Arc::new(before.clone())).await;
    node.namespace("app", "intercept").await;
    assert_eq!(node.imds(10), Some(IMDS_INTERCEPT));
    let annotations = [(ANNOTATION_IMDS.to_owned(), "deny".to_owned())].into();
    node.pod(&Arc::new(Pod { annotations, ..before })).await;
    assert_eq!(node.imds(10), Some(IMDS_DENY));
}

#[tokio::test]
async fn a_pod_of_a_namespace_that_is_not_known_yet_stays_unknown() {
    let mut node = Node::new();
    let pod = Arc::new(pod("new", "web"));
    node.cgroup_created(pod.uid, 10).await;
    node.pod(&pod).await;
    assert_eq!(node.imds(10), None);
    node.namespace("new", "deny").await;
    assert_eq!(node.imds(10), Some(IMDS_DENY));
}

#[tokio::test]
async fn unknown_pods_are_intercepted_while_anybody_may_be() {
    let mut node = Node::new();
    node.cluster(ClusterEvent::NamespacesSynced).await;
    assert_eq!(node.unknown(), (IMDS_AUDIT, IMDS_OFF));
    // A pod with an identity of its own, on this node.
    let injected = Arc::new(Pod { injected: true, ..pod("app", "web") });
    node.cgroup_created(injected.uid, 10).await;
    node.pod(&injected).await;
    assert_eq!(node.unknown(), (IMDS_INTERCEPT, IMDS_OFF));
    node.cgroup_removed(injected.uid, 10).await;
    node.cluster(ClusterEvent::PodDeleted(injected.uid)).await;
    assert_eq!(node.unknown(), (IMDS_AUDIT, IMDS_OFF));
    // A namespace asks, for its pods on the host's network too.
    node.namespace("strict", "deny").await;
    assert_eq!(node.unknown(), (IMDS_INTERCEPT, IMDS_INTERCEPT));
}

#[tokio::test]
async fn unknown_pods_are_intercepted_in_every_mode_but_off() {
    let mut node = Node::new();
    node.reconciler.policies.defaults.imds_unknown = UnknownPods::Strict;
    for (imds, unknown) in [
        (ImdsMode::Audit, IMDS_INTERCEPT),
        (ImdsMode::Intercept, IMDS_INTERCEPT),
        (ImdsMode::Deny, IMDS_INTERCEPT),
        (ImdsMode::Off, IMDS_OFF),
    ] {
        node.reconciler.policies.defaults.imds = imds;
        node.cluster(ClusterEvent::NamespacesSynced).await;
        assert_eq!(node.unknown(), (unknown, IMDS_OFF), "{imds:?}");
    }
    // Even where the cluster is off, one that is unknown may be of this namespace.
    node.namespace("strict", "intercept").await;
    assert_eq!(node.unknown(), (IMDS_INTERCEPT, IMDS_INTERCEPT));
}

#[tokio::test]
async fn unknown_pods_are_intercepted_before_the_first_strict_pod_has_a_cgroup() {
    let mut node = Node::new();
    node.cluster(ClusterEvent::NamespacesSynced).await;
    let annotations = |mode: &str| [(policy::ANNOTATION_IMDS.to_owned(), mode.to_owned())].into();
    node.pod(&Arc::new(Pod { annotations: annotations("deny"), ..pod("app", "web") })).await;
    assert_eq!(node.unknown(), (IMDS_INTERCEPT, IMDS_OFF));
    // One on the host's network, by its own annotation.
    let on_host = Pod { host_network: true, annotations: annotations("intercept"), ..pod("app", "cni") };
    node.pod(&Arc::new(on_host)).await;
    assert_eq!(node.unknown(), (IMDS_INTERCEPT, IMDS_INTERCEPT));
}

#[tokio::test]
async fn a_static_pod_has_the_policy_of_its_mirror_pod_and_no_credentials() {
    let mut node = Node::new();
    let config_hash = ConfigHash::parse("fc407168c6823ed1e0a61410d6621724").unwrap();
    let static_cgroup = StaticCgroup { config_hash, id: 10 };
    let annotations = |mode: &str| [(ANNOTATION_IMDS.to_owned(), mode.to_owned())].into();
    let mirror = Pod { static_pod: Some(config_hash), injected: false, ..pod("app", "proxy") };
    node.reconciler.on_tree(&mut node.state, TreeEvent::StaticCreated(static_cgroup)).await;
    assert_eq!(node.imds(10), None);
    node.pod(&Arc::new(mirror.clone())).await;
    assert_eq!(node.imds(10), Some(IMDS_AUDIT));
    // A namespace elsewhere is strict, which unknown pods feel, and its own, which it feels too.
    node.namespace("strict", "deny").await;
    assert_eq!((node.unknown().0, node.imds(10)), (IMDS_INTERCEPT, Some(IMDS_AUDIT)));
    node.namespace("app", "intercept").await;
    assert_eq!(node.imds(10), Some(IMDS_INTERCEPT));
    node.namespace("app", "off").await;
    // The kubelet makes another mirror pod.
    node.cluster(ClusterEvent::PodDeleted(mirror.uid)).await;
    assert_eq!(node.imds(10), Some(IMDS_OFF));
    node.pod(&Arc::new(Pod { uid: pod("app", "proxy").uid, ..mirror.clone() })).await;
    // Somebody else makes one, which can only tighten. No credentials are fetched for any of them.
    let forged = Pod { injected: true, annotations: annotations("intercept"), ..mirror.clone() };
    node.pod(&Arc::new(Pod { uid: pod("app", "proxy").uid, ..forged })).await;
    assert_eq!(node.imds(10), Some(IMDS_INTERCEPT));
    assert!(node.reconciler.lifecycle.prefetched.lock().is_empty());
    node.reconciler.on_tree(&mut node.state, TreeEvent::StaticRemoved(static_cgroup)).await;
    assert_eq!(node.imds(10), None);
}

#[tokio::test]
async fn a_terminating_pod_is_removed_with_its_cgroup_and_not_before() {
    let mut node = Node::new();
    let pod = Arc::new(pod("app", "web"));
    node.pod(&pod).await;
    node.cgroup_created(pod.uid, 10).await;
    node.cluster(ClusterEvent::PodDeleted(pod.uid)).await;
    assert!(node.reconciler.pods.get(pod.uid).is_some() && node.imds(10).is_some());
    assert_eq!(node.reconciler.lifecycle.told(pod.uid), [Told::Pending, Told::CgroupCreated]);
    node.cgroup_removed(pod.uid, 10).await;
    assert!(node.reconciler.pods.get(pod.uid).is_none() && node.imds(10).is_none());
    assert_eq!(node.reconciler.lifecycle.told(pod.uid), [Told::Pending, Told::CgroupCreated, Told::Deleted]);
}

#[tokio::test]
async fn a_pod_without_its_cgroup_stays_removed_until_it_has_another() {
    use Told::{CgroupCreated, CgroupRemoved, Deleted, Pending};
    let mut node = Node::new();
    let [restarted, deleted, finished] = std::array::from_fn(|_| Arc::new(pod("app", "web")));
    for (pod, id) in [(&restarted, 10), (&deleted, 20), (&finished, 30)] {
        node.pod(pod).await;
        node.cgroup_created(pod.uid, id).await;
        node.cgroup_removed(pod.uid, id).await;
        assert_eq!(node.reconciler.lifecycle.told(pod.uid), [Pending, CgroupCreated, CgroupRemoved]);
        assert!(node.reconciler.pods.get(pod.uid).is_some());
    }
    node.cgroup_created(restarted.uid, 11).await;
    assert_eq!(
        node.reconciler.lifecycle.told(restarted.uid),
        [Pending, CgroupCreated, CgroupRemoved, CgroupCreated]
    );
    node.cluster(ClusterEvent::PodDeleted(deleted.uid)).await;
    assert_eq!(node.reconciler.lifecycle.told(deleted.uid), [Pending, CgroupCreated, CgroupRemoved, Deleted]);
    node.pod(&Arc::new(Pod { finished: true, ..(*finished).clone() })).await;
    assert_eq!(
        node.reconciler.lifecycle.told(finished.uid),
        [Pending, CgroupCreated, CgroupRemoved],
        "once is enough"
    );
}

#[tokio::test]
async fn a_pod_has_the_cgroup_that_is_made_anew_under_the_same_name() {
    use Told::{CgroupCreated, CgroupRemoved, Pending};
    let mut node = Node::new();
    let pod = Arc::new(pod("app", "web"));
    node.pod(&pod).await;
    node.cgroup_created(pod.uid, 10).await;
    node.cgroup_removed(pod.uid, 10).await;
    node.cgroup_created(pod.uid, 11).await;
    node.cgroup_removed(pod.uid, 10).await;
    assert_eq!(
        node.reconciler.lifecycle.told(pod.uid),
        [Pending, CgroupCreated, CgroupRemoved, CgroupCreated]
    );
}

#[tokio::test]
async fn pods_that_ended_before_the_agent_started_are_removed() {
    use Told::{CgroupCreated, CgroupRemoved, Deleted};
    let mut node = Node::new();
    let finished = Arc::new(Pod { finished: true, ..pod("app", "web") });
    node.pod(&finished).await;
    assert_eq!(node.reconciler.lifecycle.told(finished.uid), [CgroupRemoved]);
    let unshown = pod("app", "web").uid;
    node.cgroup_created(unshown, 10).await;
    node.cgroup_removed(unshown, 10).await;
    assert_eq!(
        node.reconciler.lifecycle.told(unshown),
        [CgroupCreated, CgroupRemoved],
        "the watch may be late"
    );
    node.cluster(ClusterEvent::PodsSynced).await;
    assert_eq!(node.reconciler.lifecycle.told(unshown), [CgroupCreated, CgroupRemoved, Deleted]);
    assert_eq!(node.reconciler.lifecycle.told(finished.uid), [CgroupRemoved]);
}

#[tokio::test]
async fn a_deleted_pod_without_a_cgroup_is_removed_at_once() {
    let mut node = Node::new();
    let pod = Arc::new(pod("app", "web"));
    node.pod(&pod).await;
    node.cluster(ClusterEvent::PodDeleted(pod.uid)).await;
    assert!(node.reconciler.pods.get(pod.uid).is_none());
}

#[tokio::test]
async fn the_agents_own_pod_keeps_its_exemption() {
    let mut node = Node::new();
    node.map.set(1, PodPolicy::EXEMPT).await.unwrap();
    let own = Arc::new(pod("app", "podgate"));
    node.cgroup_created(own.uid, 1).await;
    node.pod(&own).await;
    assert_eq!(node.imds(1), Some(IMDS_OFF));
}

#[tokio::test]
async fn the_eks_agent_is_exempt_and_counts_while_the_api_server_has_it() {
    let mut node = Node::new();
    node.reconciler.policies.namespaces.insert("aws", policy::Annotations::new());
    let is_here = |node: &Node| *node.reconciler.eks_agent_is_here.borrow();
    let exempt = |node: &Node| node.map.0.lock().exempt.clone();
    let eks_agent = Pod { daemon_set: Some("agent".into()), ..pod("aws", "agent") };
    let copy = Arc::new(Pod { daemon_set: Some("agent".into()), ..pod("app", "agent") });
    node.cgroup_created(copy.uid, 20).await;
    node.pod(&copy).await;
    assert!(!is_here(&node) && exempt(&node).is_empty(), "of another namespace");

    node.pod(&Arc::new(eks_agent.clone())).await;
    assert!(is_here(&node), "before it has a cgroup");
    node.cgroup_created(eks_agent.uid, 10).await;
    assert_eq!((exempt(&node), node.imds(10)), (HashSet::from([10]), None));
    node.cluster(ClusterEvent::PodDeleted(eks_agent.uid)).await;
    assert!(!is_here(&node));
    assert_eq!(exempt(&node), HashSet::from([10]), "while it terminates");
    node.cgroup_removed(eks_agent.uid, 10).await;
    assert!(exempt(&node).is_empty());
}

#[tokio::test]
async fn a_pod_that_its_daemon_set_has_let_go_of_is_one_like_any_other() {
    let mut node = Node::new();
    node.reconciler.policies.namespaces.insert("aws", policy::Annotations::new());
    let eks_agent = Pod { daemon_set: Some("agent".into()), ..pod("aws", "agent") };
    node.cgroup_created(eks_agent.uid, 10).await;
    node.pod(&Arc::new(eks_agent.clone())).await;
    node.pod(&Arc::new(Pod { daemon_set: None, ..eks_agent })).await;
    assert!(!*node.reconciler.eks_agent_is_here.borrow());
    assert!(node.map.0.lock().exempt.is_empty());
    assert_eq!(node.imds(10), Some(IMDS_AUDIT));
}

#[tokio::test]
async fn what_will_ask_is_fetched_ahead_and_nothing_else() {
    let mut node = Node::new();
    let annotated = |mode: &str| [(ANNOTATION_IMDS.to_owned(), mode.to_owned())].into();
    let kept_out = [(ANNOTATION_IMDS, "deny"), ("podgate.dev/pod-identity", "off")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    for (pod, will_ask) in [
        (pod("app", "web"), false),
        (Pod { injected: true, ..pod("app", "web") }, true),
        (Pod { annotations: annotated("intercept"), ..pod("app", "web") }, true),
        (Pod { annotations: annotated("deny"), ..pod("app", "web") }, false),
        (Pod { injected: true, finished: true, ..pod("app", "web") }, false),
        (Pod { injected: true, annotations: kept_out, ..pod("app", "web") }, false),
    ] {
        let pod = Arc::new(pod);
        node.pod(&pod).await;
        let prefetched = node.reconciler.lifecycle.prefetched.lock().contains(&pod.uid);
        assert_eq!(prefetched, will_ask, "{pod:?}");
    }
    node.reconciler.prefetch = false;
    let off = Arc::new(Pod { injected: true, ..pod("app", "web") });
    node.pod(&off).await;
    assert!(!node.reconciler.lifecycle.prefetched.lock().contains(&off.uid));
}
