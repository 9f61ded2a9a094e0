//! Builds every component once, in the order that keeps pods safe, and takes them down again.
//!
//! Owns that order; never parses a setting, never decides for a pod.

use std::{
    hash::{BuildHasher as _, RandomState},
    io,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
};

use jiff::Timestamp;
use kube::Api;
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

mod node;
mod pod_state;
mod signal;

pub(crate) use self::signal::Signals;
use self::{node::Node, pod_state::PodState};
use crate::{
    admin::{self, Probes},
    config::{Config, TargetMode},
    control::{kernel_events, reconcile::Reconciler},
    credentials::{
        Clock,
        aws::{
            self,
            eks_auth::{self, EksAuth},
        },
        cache::{self, CredentialCache},
        kube_identity::{self, Clients},
        metrics::CacheMetrics,
        source::NodeSource,
        token::{TokenProvider, TokenVerifier},
    },
    dialect::imds_token::ImdsTokens,
    identity::{
        CallerResolver, Pods,
        cgroupfs::{self, CgroupPaths as _},
        network::Networks,
        tree,
    },
    instance_metadata::{self, Instance},
    intercept::{
        self, DebugLog, Events, HandoverKey, Interceptor, InterceptorHandle, OriginLookup, PodgatePods,
    },
    netdev::{self, Link},
    policy::lookup::Policies,
    serve::{ConnectionLimit, Server, metrics::RequestMetrics},
    takeover::{
        active::Serving,
        eks_agent::EksAgent,
        listeners::Opener,
        transfer::{self, HandoverMetrics, Predecessor},
    },
    tasks::Tasks,
    whois::Whois,
};

/// News of pods and namespaces that wait to be applied.
const CLUSTER_EVENTS: usize = 1024;

/// Why the agent cannot run, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node's cgroups are not as they must be.
    #[error(transparent)]
    Cgroup(#[from] cgroupfs::Error),
    /// AWS cannot be spoken to.
    #[error(transparent)]
    Aws(#[from] aws::Error),
    /// A cgroup that was just there cannot be read.
    #[error("cannot read cgroup {path}: {source}")]
    CgroupRead {
        /// The cgroup.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel side failed.
    #[error(transparent)]
    Intercept(#[from] intercept::Error),
    /// There is no way to the API server.
    #[error(transparent)]
    Kube(#[from] kube_identity::Error),
    /// The link failed.
    #[error(transparent)]
    Link(#[from] netdev::Error),
    /// An address or socket cannot be listened on.
    #[error("cannot listen on {address}: {source}{}", in_use(source))]
    Listen {
        /// The address or path.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// A descriptor cannot be copied.
    #[error("cannot copy a listener's descriptor: {0}; is the limit of open files reached?")]
    Descriptor(#[source] io::Error),
    /// There is no address left to listen on.
    #[error("no address to serve pods on: IPv6 is switched off on this node and --target-v4 is \"none\"")]
    NoTarget,
    /// The kernel does not tell which network the agent is in.
    #[error("cannot read the cookie of the host's network namespace: {0}")]
    NetworkNamespace(#[source] io::Error),
    /// The signals cannot be watched.
    #[error("cannot watch for signals: {0}")]
    Signal(#[source] io::Error),
    /// An operator wants podgate off the node.
    #[error("`podgate detach` was run on this node: this agent ends; one that is started attaches again")]
    Detached,
    /// A part that runs forever has ended.
    #[error("BUG: {0} has ended; the agent stops rather than serve without it")]
    Ended(&'static str),
}

/// The kernel side: who steers it, and what is read without its owner.
struct Kernel {
    interceptor: InterceptorHandle,
    origins: Arc<dyn OriginLookup>,
    events: Events,
    debug_log: Option<DebugLog>,
    podgate_pods: PodgatePods,
    handover_key: HandoverKey,
    imds_key: [u8; 32],
}

/// What is known of the cluster and its pods, by whoever follows it.
#[derive(Clone)]
struct Known {
    pods: Arc<Pods>,
    networks: Arc<Networks>,
    policies: Policies,
}

/// Runs the agent until `SIGTERM` or `SIGINT`.
pub async fn run(config: Config) -> Result<(), Error> {
    let mut signals = Signals::watch()?;
    let mut tasks = Tasks::default();
    let node = Node::find(&config.cgroup_root)?;
    let Kernel { interceptor, origins, events, debug_log, podgate_pods, handover_key, imds_key } =
        load(&config, &node)?;
    tasks.spawn("the owner of the eBPF programs", interceptor.clone().ended());
    let known = Known {
        pods: Arc::default(),
        networks: Arc::new(Networks::new(node.host_netns_cookie)),
        policies: Policies { defaults: config.defaults(), namespaces: Arc::default() },
    };

    let mut registry = Registry::default();
    let request_metrics = RequestMetrics::register(&mut registry);
    let engine_metrics = CacheMetrics::register(&mut registry);
    let handovers = HandoverMetrics::register(&mut registry);
    intercept::metrics::register(&mut registry, interceptor.counters().clone());
    let probes = Arc::new(Probes { ready: AtomicBool::new(false), registry });
    let (active, is_active) = watch::channel(false);
    let answers = admin::serve_probes(config.admin, Arc::clone(&probes), is_active.clone());
    tasks.spawn("the probes' server", answers);
    let whois = Arc::new(Whois {
        kubepods: Arc::clone(&node.kubepods),
        pods: Arc::clone(&known.pods),
        policies: known.policies.clone(),
        own: node.own_pod,
        eks_agent: config.eks_agent.clone(),
    });
    serve_commands(&config, &probes, &whois, &mut tasks)?;

    let kube = kube_identity::clients(config.kube_identity, &config.node_name).await?;
    let (aws, connections) = aws::config().await?;
    aws::check(&aws).await;
    let (instance, of_instance) = watch::channel(Instance::in_region(aws.region().map(ToString::to_string)));
    tasks.spawn(
        "the copy of the instance's metadata",
        instance_metadata::follow(instance_metadata::imds(), instance),
    );
    let eks_auth = EksAuth::new(&aws, &config.cluster_name, &config.node_name, of_instance.clone());
    let warm = eks_auth.clone().keep_warm(connections, eks_auth::WARM_INTERVAL);
    tasks.spawn("the connection to EKS Auth", warm);
    let (cgroups, networks) = (Arc::clone(&node.kubepods), Arc::clone(&known.networks));
    let resolver = CallerResolver::new(cgroups, Arc::clone(&known.pods), networks);
    let imds_tokens = ImdsTokens::new(&imds_key);
    let server = Arc::new(Server {
        policies: known.policies.clone(),
        resolver,
        engine: engine(&config, &kube, eks_auth, engine_metrics),
        imds_tokens,
        token_delegates: config.token_delegates.clone(),
        instance: of_instance,
        connections: ConnectionLimit::default(),
        metrics: request_metrics,
    });
    let (engine, pods) = (Arc::clone(&server.engine), Arc::clone(&known.pods));
    let is_podgate_pod = move |pod| podgate_pods.contains(pod).is_ok_and(|is| is);
    let former = Predecessor {
        directory: config.handover_dir.clone(),
        key: handover_key,
        entries: move || engine.to_transfer(),
        may_be_next: move |pid| whois.is_in_no_pod_but(pid, &is_podgate_pod),
        metrics: handovers.clone(),
    };
    tasks.spawn("the handover of credentials", former.serve(is_active));
    tasks.spawn("the kernel's events", kernel_events::run(events, Arc::clone(&server)));
    if let Some(log) = debug_log {
        kernel_events::follow(log);
    }

    let (eks_agent_is_here, is_here) = watch::channel(false);
    let enforcer = Reconciler {
        policies: known.policies.clone(),
        map: interceptor.clone(),
        own: node.own_pod,
        eks_agent: config.eks_agent.clone(),
        eks_agent_is_here,
        pods: Arc::clone(&known.pods),
        networks: Arc::clone(&known.networks),
        kept: PodState { engine: Arc::clone(&server.engine), connections: server.connections.clone() },
        prefetch: config.prefetch,
    };
    // Before any of its pods is known: what was handed over is not fetched ahead again.
    inherit(&config, &server.engine, &handovers).await;
    let mut is_synced = follow(&config, &node, kube, known, enforcer, &mut tasks)?;
    // Existing pods have their policies before the first of their dials is decided. Without the API server this agent
    // does not become active, and is not ready; the one before it goes on as it can.
    tokio::select! {
        Ok(_) = is_synced.wait_for(|synced| *synced) => {}
        ended = tasks.ended() => return Err(ended),
        () = signals.end() => return Ok(()),
    }
    // Once more, for what has changed since: it may have taken long.
    inherit(&config, &server.engine, &handovers).await;
    server.engine.adopt(&pods);

    // It stays when the agent goes, as its programs do: dials that are sent there are refused at once, and not lost.
    let link = Link::up(&config.netdev).await?;
    let yields = config.target == TargetMode::Auto;
    let opener = Opener { link, interceptor, server, origins, yields };
    let eks_agent = EksAgent::new(is_here, &mut tasks);
    Serving::new(&config, opener, &probes, active, eks_agent).run(&mut tasks, &mut signals).await
}

/// Takes over the credentials of the active agent, if one is alive. Whatever is in the way of that, they can be fetched.
async fn inherit(config: &Config, engine: &CredentialCache<NodeSource>, handovers: &HandoverMetrics) {
    let key = match intercept::handover_key(&config.bpffs) {
        Ok(Some(key)) => key,
        Ok(None) => return,
        Err(error) => {
            warn!(%error, "cannot find the key of the predecessor: all credentials are fetched again");
            return;
        }
    };
    match transfer::ask(&config.handover_dir, &key, handovers).await {
        Ok(entries) => engine.stage(entries),
        Err(transfer::Error::Nobody) => info!("no agent before this one is alive: credentials are fetched"),
        Err(error) => {
            warn!(directory = %config.handover_dir.display(), %error, "no credentials were handed over: they are fetched again");
        }
    }
}

/// Follows pods, namespaces and cgroups from now on. The receiver learns when the enforcer has seen all there is.
fn follow(
    config: &Config,
    node: &Node,
    kube: Clients,
    known: Known,
    enforcer: Reconciler<InterceptorHandle, PodState<NodeSource>>,
    tasks: &mut Tasks,
) -> Result<watch::Receiver<bool>, Error> {
    let (events, received) = mpsc::channel(CLUSTER_EVENTS);
    let (synced, is_synced) = watch::channel(false);
    let (first, cgroups) = tree::follow(node.kubepods.path())
        .map_err(|source| Error::CgroupRead { path: node.kubepods.path().to_owned(), source })?;
    tasks.spawn("the policies' upkeep", enforcer.run(first, cgroups, received, synced));
    let (node_name, of_pods) = (config.node_name.clone(), events.clone());
    tasks.spawn("the watch of pods", async move {
        known.pods.follow(Api::all(kube.node), &node_name, of_pods).await;
    });
    tasks.spawn("the watch of namespaces", async move {
        known.policies.namespaces.follow(Api::all(kube.own), events).await;
    });
    Ok(is_synced)
}

/// Builds what gives pods their credentials.
pub fn engine(
    config: &Config,
    kube: &Clients,
    eks_auth: EksAuth,
    metrics: CacheMetrics,
) -> Arc<CredentialCache<NodeSource>> {
    let verifier = TokenVerifier::new(kube.own.clone());
    verifier.prepare();
    let clock: Clock = Arc::new(Timestamp::now);
    let tokens =
        TokenProvider::new(&config.kubelet_root, kube.node.clone(), verifier.clone(), Arc::clone(&clock));
    let source = NodeSource { verifier, tokens, eks_auth };
    // JitterSource that differ between nodes are enough.
    let seed = RandomState::new().hash_one(&config.node_name);
    CredentialCache::start(source, cache::BUDGET, clock, seed, metrics)
}

/// Loads the kernel side. Nothing changes for pods yet.
fn load(config: &Config, node: &Node) -> Result<Kernel, Error> {
    let mut interceptor = Interceptor::load(&node.settings(config)?)?;
    interceptor.forget_exempt(|former| node.kubepods.below_kubepods(former).is_err())?;
    // Before anything is attached: the agent's own calls must never meet its own programs.
    if let Some(own) = node.own_pod {
        interceptor.exempt(own)?;
    }
    Ok(Kernel {
        origins: Arc::new(interceptor.origins()?),
        events: interceptor.events()?,
        debug_log: interceptor.debug_log()?,
        podgate_pods: interceptor.podgate_pods()?,
        handover_key: interceptor.handover_key(),
        imds_key: interceptor.imds_key()?,
        interceptor: InterceptorHandle::spawn(interceptor)?,
    })
}

/// Answers commands from now on.
fn serve_commands(
    config: &Config,
    probes: &Arc<Probes>,
    whois: &Arc<Whois>,
    tasks: &mut Tasks,
) -> Result<(), Error> {
    let refused = |source| Error::Listen { address: config.socket.display().to_string(), source };
    let listener = admin::bind_commands(&config.socket).map_err(refused)?;
    let (whois, probes) = (Arc::clone(whois), Arc::clone(probes));
    tasks.spawn("the commands' server", admin::serve_commands(listener, whois, probes));
    Ok(())
}

fn in_use(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "; somebody else listens there, perhaps the EKS Pod Identity Agent: `ss -ltnp` tells who"
        }
        _ => "",
    }
}
