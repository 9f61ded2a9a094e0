//! The one composition root: builds every component once, in the order that keeps pods safe.
//!
//! Owns that order; never parses a setting, never decides for a pod. `podgate run`, the pipeline tests and the golden
//! tests all come through [`build`]; they differ in their [`Seams`] alone.

use std::{
    hash::{BuildHasher as _, RandomState},
    io,
    net::SocketAddr,
    path::PathBuf,
    pin::pin,
    sync::{Arc, atomic::AtomicBool},
};

use futures::FutureExt;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};

mod node_facts;
mod pod_state;
pub mod seams;
mod signal;

use self::{
    pod_state::PodState,
    seams::{Cgroups, ClusterWatch, Seams, Services},
    signal::Signals,
};
use crate::{
    accept::Accepted,
    admin::{self, Probes},
    config::Config,
    control::{kernel_events, policy_map::PolicyMap, reconcile::Reconciler},
    credentials::{
        aws,
        cache::{self, CredentialCache, Transferred},
        kube_identity,
        metrics::CacheMetrics,
        source::CredentialSource,
    },
    dialect::imds_token::ImdsTokens,
    drain::DrainWatch,
    identity::{CallerResolver, Pods, cgroupfs, networks::Networks, peer::Peers},
    intercept,
    policy::lookup::Policies,
    serve::{ConnectionLimit, Server, metrics::RequestMetrics},
    takeover::{
        self, Parts, Serve, Settings, Takeover,
        dataplane::Dataplane,
        pod_listeners::{self, PodListenerMetrics, PodListeners},
        transfer::{self, HandoverMetrics, Predecessor},
    },
    tasks::{TaskEnded, Tasks},
    whois::Whois,
};

/// Changes of pods and namespaces that wait to be applied.
const CLUSTER_EVENTS: usize = 1024;

/// Why the agent cannot start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node's cgroups are not as they must be.
    #[error(transparent)]
    Cgroup(#[from] cgroupfs::Error),
    /// No client for AWS.
    #[error(transparent)]
    Aws(#[from] aws::Error),
    /// A cgroup that exists cannot be read.
    #[error("cannot read cgroup {path}: {source}")]
    CgroupRead {
        /// The cgroup.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The programs cannot be loaded.
    #[error(transparent)]
    Intercept(#[from] intercept::Error),
    /// No client for the API server.
    #[error(transparent)]
    Kube(#[from] kube_identity::Error),
    /// The socket for commands cannot be made.
    #[error("cannot listen on {}: {source}", path.display())]
    CommandSocket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel does not tell which network namespace the agent is in.
    #[error("cannot read the cookie of the host's network namespace: {0}")]
    NetworkNamespace(#[source] io::Error),
    /// Signals cannot be watched.
    #[error(transparent)]
    Signal(#[from] signal::Error),
    /// Pods cannot be served.
    #[error(transparent)]
    Takeover(#[from] takeover::Error),
    /// A background task has ended.
    #[error(transparent)]
    TaskEnded(#[from] TaskEnded),
}

/// An agent that listens and knows its pods, but to which no pod is sent yet.
pub struct Bound<D, S> {
    /// The addresses to which pods are sent once it [runs](Self::run).
    pub addresses: Vec<SocketAddr>,
    /// The Unix socket for commands, which answers probes and `/metrics` as well.
    pub command_socket: PathBuf,
    /// Whether it serves pods.
    pub ready: Arc<AtomicBool>,
    /// The credentials that it has.
    pub cache: Arc<CredentialCache<S>>,
    takeover: Takeover<D>,
    tasks: Tasks,
}

/// What is known of the cluster and of its pods, by those that follow it.
#[derive(Clone)]
struct Known {
    pods: Arc<Pods>,
    networks: Arc<Networks>,
    policies: Policies,
}

/// Everything that is counted.
struct Metrics {
    requests: RequestMetrics,
    cache: CacheMetrics,
    handovers: HandoverMetrics,
    pod_listeners: PodListenerMetrics,
}

/// Which agent is active, as the rest of this agent learns it.
struct Activity {
    ready: Arc<AtomicBool>,
    sender: watch::Sender<bool>,
    receiver: watch::Receiver<bool>,
}

/// Runs the agent of this node until `SIGTERM` or `SIGINT`.
pub async fn run(config: Config) -> Result<(), Error> {
    let mut signals = Signals::watch()?;
    let mut shutdown = pin!(signals.received());
    let seams = Seams::of_node(&config)?;
    let bound = tokio::select! {
        bound = build(config, seams) => bound?,
        () = &mut shutdown => return Ok(()),
    };
    bound.run(shutdown).await
}

/// Builds the agent. Returns once it knows every pod that exists, so that pods have their policies before the first of
/// their connections is decided: without the API server an agent does not become active, and its predecessor goes on.
pub async fn build<D, M, S>(config: Config, seams: Seams<D, M, S>) -> Result<Bound<D, S>, Error>
where
    D: Dataplane,
    M: PolicyMap,
    S: CredentialSource,
{
    let Seams { clock, cgroups, kernel, services } = seams;
    let mut tasks = Tasks::default();
    let known = Known::new(&config, &cgroups);
    let mut registry = kernel.metrics;
    let metrics = Metrics::register(&mut registry);
    let activity = Activity::new();
    let peers = Peers::new(Arc::clone(&cgroups.processes), cgroups.own_pod);
    serve_operators(&config, registry, &activity, &peers, whois(&config, &cgroups, &known), &mut tasks)?;

    let Services { source, instance, cluster, background } = services.await?;
    for (name, task) in kernel.background.into_iter().chain(background) {
        tasks.spawn(name, task);
    }
    // Jitter that differs between nodes is enough.
    let seed = RandomState::new().hash_one(&config.node_name);
    let cache = CredentialCache::start(source, cache::BUDGET, clock, seed, metrics.cache);
    let server = Arc::new(Server {
        policies: known.policies.clone(),
        resolver: known.resolver(&cgroups),
        credentials: Arc::clone(&cache),
        imds_tokens: ImdsTokens::new(&kernel.keys.imds),
        token_delegates: config.token_delegates.clone(),
        instance,
        connections: ConnectionLimit::default(),
        metrics: metrics.requests,
    });
    let predecessor = Predecessor {
        directory: config.handover_dir.clone(),
        key: kernel.keys.handover,
        entries: entries_of(&cache),
        may_be_successor: transfer::may_be_successor(peers, kernel.is_podgate_pod),
        metrics: metrics.handovers.clone(),
    };
    tasks.spawn("the handover of credentials", predecessor.serve(activity.receiver));

    let (eks_agent_sender, eks_agent_is_here) = watch::channel(false);
    let pod_listeners = pod_listeners::Parts {
        networks: Arc::clone(&cgroups.networks),
        dataplane: Arc::clone(&kernel.dataplane),
        origins: Arc::clone(&kernel.origins),
        serve: serve(Arc::clone(&server)),
        pods: Arc::clone(&known.pods),
        known: Arc::clone(&known.networks),
        metrics: metrics.pod_listeners,
    };
    let (unanswered, is_unanswered) = watch::channel(0);
    tasks.spawn("the kernel's events", kernel_events::run(kernel.events, Arc::clone(&server), unanswered));
    let (pod_listeners, following) = PodListeners::follow(pod_listeners, is_unanswered);
    tasks.spawn_finite("the listeners in pods' networks", following.map(Ok));
    let lifecycle = PodState {
        cache: Arc::clone(&cache),
        connections: server.connections.clone(),
        listeners: pod_listeners.events(),
    };
    let reconciler = known.reconciler(&config, cgroups.own_pod, kernel.policies, eks_agent_sender, lifecycle);
    // Before any pod is known: inherited credentials are not prefetched again.
    transfer::inherit(&config.handover_dir, &kernel.keys.predecessor, &cache, &metrics.handovers).await;
    follow_cluster(reconciler, cgroups, cluster, &known, &mut tasks).await?;
    // Again, for what has changed meanwhile: the API server may have been unavailable for long.
    transfer::inherit(&config.handover_dir, &kernel.keys.predecessor, &cache, &metrics.handovers).await;
    cache.adopt(&known.pods);

    let parts = Parts {
        dataplane: kernel.dataplane,
        origins: kernel.origins,
        serve: serve(server),
        eks_agent_is_here,
        ready: Arc::clone(&activity.ready),
        active: activity.sender,
        pod_listeners,
    };
    let takeover = Takeover::bind(Settings::from(&config), parts, &mut tasks).await?;
    let addresses = takeover.addresses().collect();
    Ok(Bound { addresses, command_socket: config.socket, ready: activity.ready, cache, takeover, tasks })
}

// === impl Bound ===

impl<D: Dataplane, S> Bound<D, S> {
    /// Becomes active, and serves pods until `shutdown`.
    pub async fn run(mut self, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
        Ok(self.takeover.run(&mut self.tasks, shutdown).await?)
    }
}

impl<D, S> std::fmt::Debug for Bound<D, S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bound").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

// === impl Known ===

impl Known {
    fn new(config: &Config, cgroups: &Cgroups) -> Self {
        Self {
            pods: Arc::default(),
            networks: Arc::new(Networks::new(cgroups.host_netns_cookie)),
            policies: Policies { defaults: config.defaults(), namespaces: Arc::default() },
        }
    }

    fn resolver(&self, cgroups: &Cgroups) -> CallerResolver {
        CallerResolver::new(Arc::clone(&cgroups.facts), Arc::clone(&self.pods), Arc::clone(&self.networks))
    }

    fn reconciler<M: PolicyMap, S: CredentialSource>(
        &self,
        config: &Config,
        own_pod: Option<u64>,
        map: M,
        eks_agent_is_here: watch::Sender<bool>,
        lifecycle: PodState<S>,
    ) -> Reconciler<M, PodState<S>> {
        Reconciler {
            policies: self.policies.clone(),
            map,
            own_pod,
            eks_agent: config.eks_agent.clone(),
            eks_agent_is_here,
            pods: Arc::clone(&self.pods),
            networks: Arc::clone(&self.networks),
            lifecycle,
            prefetch: config.prefetch,
        }
    }
}

// === impl Metrics ===

impl Metrics {
    fn register(registry: &mut Registry) -> Self {
        Self {
            requests: RequestMetrics::register(registry),
            cache: CacheMetrics::register(registry),
            handovers: HandoverMetrics::register(registry),
            pod_listeners: PodListenerMetrics::register(registry),
        }
    }
}

// === impl Activity ===

impl Activity {
    fn new() -> Self {
        let (sender, receiver) = watch::channel(false);
        Self { ready: Arc::default(), sender, receiver }
    }
}

/// Answers probes and commands from now on, before anything that may take long.
fn serve_operators(
    config: &Config,
    registry: Registry,
    activity: &Activity,
    peers: &Peers,
    whois: Whois,
    tasks: &mut Tasks,
) -> Result<(), Error> {
    let probes = Arc::new(Probes { ready: Arc::clone(&activity.ready), registry });
    let active = activity.receiver.clone();
    tasks.spawn("the probes' server", admin::serve_probes(config.admin, Arc::clone(&probes), active));
    let listener = admin::bind_commands(&config.socket)
        .map_err(|source| Error::CommandSocket { path: config.socket.clone(), source })?;
    let commands = admin::serve_commands(listener, peers.clone(), Arc::new(whois), probes);
    tasks.spawn("the commands' server", commands);
    Ok(())
}

fn whois(config: &Config, cgroups: &Cgroups, known: &Known) -> Whois {
    Whois {
        cgroups: Arc::clone(&cgroups.processes),
        pods: Arc::clone(&known.pods),
        networks: Arc::clone(&known.networks),
        policies: known.policies.clone(),
        own_pod: cgroups.own_pod,
        eks_agent: config.eks_agent.clone(),
    }
}

/// Follows pods, namespaces and cgroups from now on. Returns once those that exist have been applied.
async fn follow_cluster<M: PolicyMap, S: CredentialSource>(
    reconciler: Reconciler<M, PodState<S>>,
    cgroups: Cgroups,
    cluster: Box<dyn ClusterWatch>,
    known: &Known,
    tasks: &mut Tasks,
) -> Result<(), Error> {
    let (events, received) = mpsc::channel(CLUSTER_EVENTS);
    let (synced, mut is_synced) = watch::channel(false);
    tasks.spawn("the reconciler", reconciler.run(cgroups.existing, cgroups.events, received, synced));
    tasks.spawn("the watch of pods", cluster.follow_pods(Arc::clone(&known.pods), events.clone()));
    let namespaces = Arc::clone(&known.policies.namespaces);
    tasks.spawn("the watch of namespaces", cluster.follow_namespaces(namespaces, events));
    tokio::select! {
        Ok(_) = is_synced.wait_for(|synced| *synced) => Ok(()),
        ended = tasks.ended() => Err(ended.into()),
    }
}

/// The credentials that a successor gets.
fn entries_of<S: CredentialSource>(
    cache: &Arc<CredentialCache<S>>,
) -> impl Fn() -> Vec<Transferred> + use<S> {
    let cache = Arc::clone(cache);
    move || cache.to_transfer()
}

/// What is done with an accepted connection.
fn serve<S: CredentialSource>(server: Arc<Server<S>>) -> Serve {
    Arc::new(move |accepted: Accepted, drain: DrainWatch| {
        Arc::clone(&server).admit(accepted, drain).map(FutureExt::boxed)
    })
}
