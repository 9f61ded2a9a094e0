//! What crosses the boundary of the process: everything else of an agent is built by [`build`](super::build).
//!
//! Owns the list of seams and the real ones of a node. Tests bring their own.
#![expect(missing_debug_implementations, reason = "there are keys, futures and closures in them")]

use std::sync::Arc;

use agent_common::{counter::Counter, event::Event};
use futures::{
    StreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use jiff::Timestamp;
use kube::Api;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};

use super::{Error, node_facts::Node};
use crate::{
    config::Config,
    control::{
        fence::{self, FenceMetrics},
        kernel_events,
    },
    credentials::{
        Clock,
        aws::{
            self,
            eks_auth::{self, EksAuth},
        },
        kube_identity::{self, Clients},
        source::NodeSource,
    },
    identity::{
        Namespaces, NodeFacts, Pods,
        cgroupfs::{CgroupPaths as _, Kubepods},
        peer::ProcessCgroups,
        sandboxes::Sandboxes,
        tree::{self, TreeEvent},
        watch::ClusterEvent,
    },
    instance_metadata::{self, Instance},
    intercept::{self, HandoverKey, Interceptor, InterceptorHandle, OriginLookup},
    takeover::{
        dataplane::NodeDataplane,
        pod_networks::{NodeNetworks, PodNetworks},
    },
};

/// Everything outside the process that an agent depends on.
pub struct Seams<D, M, S> {
    /// The time.
    pub clock: Clock,
    /// The cgroups of the node.
    pub cgroups: Cgroups,
    /// The kernel side.
    pub kernel: Kernel<D, M>,
    /// What is reached over the network; ready when it is connected, which may take seconds.
    pub services: BoxFuture<'static, Result<Services<S>, Error>>,
}

/// The cgroups and processes of the node.
pub struct Cgroups {
    /// The paths of pods' cgroups, and the networks of pods.
    pub facts: Arc<dyn NodeFacts>,
    /// The cgroups of processes.
    pub processes: Arc<dyn ProcessCgroups>,
    /// The cgroups that exist already.
    pub existing: Vec<TreeEvent>,
    /// What happens to cgroups from now on.
    pub events: BoxStream<'static, TreeEvent>,
    /// The cgroup of podgate's own pod, unless it does not run as one.
    pub own_pod: Option<u64>,
    /// The network namespace of the node.
    pub host_netns_cookie: u64,
    /// The networks of pods.
    pub networks: Arc<dyn PodNetworks>,
}

/// The programs and maps in the kernel, and the node's addresses.
pub struct Kernel<D, M> {
    /// What a takeover changes.
    pub dataplane: Arc<D>,
    /// Where the policies of pods go.
    pub policies: M,
    /// Who made an accepted connection.
    pub origins: Arc<dyn OriginLookup>,
    /// What the programs report.
    pub events: BoxStream<'static, Result<(Counter, Event), intercept::Error>>,
    /// Whether the pod with this cgroup is podgate's, by the maps.
    pub is_podgate_pod: PodgatePods,
    /// The keys that are in the maps.
    pub keys: Keys,
    /// The programs' own counters.
    pub metrics: Registry,
    /// What keeps all of that going.
    pub background: Vec<Background>,
}

/// Keys that live in the kernel, where only root reads them.
pub struct Keys {
    /// That of IMDS session tokens, the same for every agent of the node since it was started.
    pub imds: [u8; 32],
    /// By which a successor knows this agent.
    pub handover: HandoverKey,
    /// Finds that of the agent that is active now, if there is one.
    pub predecessor: PredecessorKey,
}

/// Tells whether the pod with this cgroup is podgate's.
pub type PodgatePods = Box<dyn Fn(u64) -> bool + Send + Sync>;

/// Finds the key of the predecessor.
pub type PredecessorKey = Box<dyn Fn() -> Result<Option<HandoverKey>, intercept::Error> + Send + Sync>;

/// A task that runs for as long as the agent does, with its name.
pub type Background = (&'static str, BoxFuture<'static, ()>);

/// What is reached over the network.
pub struct Services<S> {
    /// Where credentials come from.
    pub source: S,
    /// What is known of the instance.
    pub instance: watch::Receiver<Instance>,
    /// Where pods and namespaces are watched.
    pub cluster: Box<dyn ClusterWatch>,
    /// What keeps all of that up to date.
    pub background: Vec<Background>,
}

/// Follows the pods of this node and the namespaces of the cluster. A trait because the API server is another process.
pub trait ClusterWatch: Send + Sync {
    /// Keeps `pods` equal to those of this node, and reports each change, forever.
    fn follow_pods(&self, pods: Arc<Pods>, events: mpsc::Sender<ClusterEvent>) -> BoxFuture<'static, ()>;
    /// Keeps `namespaces` equal to those of the cluster, and reports each change, forever.
    fn follow_namespaces(
        &self,
        namespaces: Arc<Namespaces>,
        events: mpsc::Sender<ClusterEvent>,
    ) -> BoxFuture<'static, ()>;
}

/// The watches of the API server.
pub struct ApiServer {
    /// The clients.
    pub clients: Clients,
    /// The node whose pods are followed.
    pub node_name: String,
}

// === impl Seams ===

impl Seams<NodeDataplane, InterceptorHandle, NodeSource> {
    /// Those of this node. Loads the programs; nothing changes for pods yet.
    pub(super) fn of_node(config: &Config) -> Result<Self, Error> {
        let node = Node::find(&config.cgroup_root)?;
        let kernel = kernel(config, &node)?;
        let path = node.kubepods.path();
        let (existing, events) =
            tree::follow(path).map_err(|source| Error::CgroupRead { path: path.to_owned(), source })?;
        let networks = NodeNetworks::new(Arc::clone(&node.kubepods)).map_err(Error::NetworkNamespace)?;
        let cgroups = Cgroups {
            facts: Arc::new(Arc::clone(&node.kubepods)),
            processes: Arc::<Kubepods>::clone(&node.kubepods),
            existing,
            events: events.boxed(),
            own_pod: node.own_pod,
            host_netns_cookie: node.host_netns_cookie,
            networks: Arc::new(networks),
        };
        let clock: Clock = Arc::new(Timestamp::now);
        let services = Box::pin(services(config.clone(), Arc::clone(&clock)));
        Ok(Self { clock, cgroups, kernel, services })
    }
}

// === impl ApiServer ===

impl ClusterWatch for ApiServer {
    fn follow_pods(&self, pods: Arc<Pods>, events: mpsc::Sender<ClusterEvent>) -> BoxFuture<'static, ()> {
        let (api, node_name) = (Api::all(self.clients.node.clone()), self.node_name.clone());
        Box::pin(async move { pods.follow(api, &node_name, events).await })
    }

    fn follow_namespaces(
        &self,
        namespaces: Arc<Namespaces>,
        events: mpsc::Sender<ClusterEvent>,
    ) -> BoxFuture<'static, ()> {
        let api = Api::all(self.clients.own.clone());
        Box::pin(async move { namespaces.follow(api, events).await })
    }
}

/// Loads the programs, and gives them to their owner.
fn kernel(config: &Config, node: &Node) -> Result<Kernel<NodeDataplane, InterceptorHandle>, Error> {
    let mut interceptor = Interceptor::load(&node.settings(config)?)?;
    interceptor.unexempt_removed(|pod| node.kubepods.below_kubepods(pod).is_err())?;
    // Before anything is attached: the agent's own connections must never meet its own programs.
    if let Some(own) = node.own_pod {
        interceptor.exempt(own)?;
    }
    if let Some(log) = interceptor.debug_log()? {
        kernel_events::copy_debug_log(log);
    }
    let origins = Arc::new(interceptor.origins()?);
    let events =
        stream::unfold(interceptor.events()?, |mut events| async { Some((events.next().await, events)) });
    let podgate_pods = interceptor.podgate_pods()?;
    let bpffs = config.bpffs.clone();
    let keys = Keys {
        imds: interceptor.imds_key()?,
        handover: interceptor.handover_key(),
        predecessor: Box::new(move || intercept::handover_key(&bpffs)),
    };
    let interceptor = InterceptorHandle::spawn(interceptor)?;
    let mut metrics = Registry::default();
    intercept::metrics::register(&mut metrics, interceptor.counters().clone());
    let fence = {
        let pods = Sandboxes::new(Arc::clone(&node.kubepods)).map_err(Error::NetworkNamespace)?;
        let (metrics, interceptor) = (FenceMetrics::register(&mut metrics), interceptor.clone());
        fence::run(pods, metrics, async move |netdevs| interceptor.set_netdevs(netdevs).await)
    };
    Ok(Kernel {
        dataplane: Arc::new(NodeDataplane::new(interceptor.clone(), &config.netdev)),
        origins,
        events: events.boxed(),
        is_podgate_pod: Box::new(move |pod| podgate_pods.contains(pod).unwrap_or(false)),
        keys,
        metrics,
        background: vec![
            ("the owner of the eBPF programs", Box::pin(interceptor.clone().ended())),
            ("the second fence", Box::pin(fence)),
        ],
        policies: interceptor,
    })
}

/// Connects to the API server and to AWS.
async fn services(config: Config, clock: Clock) -> Result<Services<NodeSource>, Error> {
    let clients = kube_identity::clients(config.kube_identity, &config.node_name).await?;
    let (aws, connections) = aws::config().await?;
    aws::check(&aws).await;
    let (sender, instance) = watch::channel(Instance::in_region(aws.region().map(ToString::to_string)));
    let eks_auth = EksAuth::new(&aws, &config.cluster_name, &config.node_name, instance.clone());
    let warm = eks_auth.clone().keep_warm(connections, eks_auth::WARM_INTERVAL);
    let copy = instance_metadata::follow(instance_metadata::imds(), sender);
    Ok(Services {
        source: NodeSource::new(&config.kubelet_root, &clients, eks_auth, clock),
        instance,
        cluster: Box::new(ApiServer { clients, node_name: config.node_name }),
        background: vec![
            ("the copy of the instance's metadata", Box::pin(copy)),
            ("the connection to EKS Auth", Box::pin(warm)),
        ],
    })
}
