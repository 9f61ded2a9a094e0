//! Builds every component once, in the order that keeps pods safe, and takes them down again.
//!
//! Owns that order; never parses a setting, never decides for a pod.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use agent_common::policy::PodPolicy;
use aws_config::SdkConfig;
use kube::Api;
use prometheus_client::registry::Registry;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
};
use tracing::{info, warn};

use crate::{
    accept,
    admin::{self, Probes},
    config::Config,
    credentials::{
        aws,
        cache::{Engine, NodeSource},
        eks_auth::EksAuth,
        kube_identity,
        token::Tokens,
    },
    dialect::imds_token::ImdsTokens,
    drain::drain,
    enforce::Enforcer,
    identity::{
        CallerResolver, Pods, cgroup,
        cgroupfs::{self, CgroupPaths, Kubepods},
        tree,
    },
    intercept::{self, Interceptor, OriginLookup, Settings, TicketKey},
    link::{self, Addresses, Link},
    policy,
    serve::{Server, metrics::RequestMetrics},
    whois::Whois,
};

/// The maps are made anew with each agent, so each is the first to use them.
const GENERATION: u64 = 1;
/// News of pods that wait to be applied.
const POD_EVENTS: usize = 1024;

/// Why the agent cannot run, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The node's cgroups are not as they must be.
    #[error(transparent)]
    Cgroup(#[from] cgroupfs::Error),
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
    Link(#[from] link::Error),
    /// An address or socket cannot be listened on.
    #[error("cannot listen on {address}: {source}{}", in_use(source))]
    Listen {
        /// The address or path.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// No randomness for a key.
    #[error("the kernel gives no random numbers: {0}")]
    Randomness(#[source] getrandom::Error),
    /// The signals cannot be watched.
    #[error("cannot watch for signals: {0}")]
    Signal(#[source] io::Error),
    /// A part that runs for ever has ended.
    #[error("BUG: {0} has ended; the agent stops rather than serve without it")]
    Ended(&'static str),
}

/// Runs the agent until `SIGTERM` or `SIGINT`.
pub async fn run(config: Config) -> Result<(), Error> {
    let node = Node::find(&config)?;
    let pods = Arc::<Pods>::default();
    let probes_listener = listen_tcp(config.admin).await?;
    let commands_listener = admin::bind_commands(&config.socket)
        .map_err(|source| Error::Listen { address: config.socket.display().to_string(), source })?;

    let mut interceptor = Interceptor::load(&node.settings()?)?;
    interceptor.set_unknown_pod(policy::unknown_pod(&config.defaults))?;
    // Before anything is attached: the agent's own calls must never meet its own programs.
    if let Some(own) = node.own_pod {
        interceptor.set_policy(own, PodPolicy::EXEMPT)?;
    }
    let origins: Arc<dyn OriginLookup> = Arc::new(interceptor.origins()?);
    let interceptor = Arc::new(Mutex::new(interceptor));

    let mut registry = Registry::default();
    let request_metrics = RequestMetrics::register(&mut registry);
    intercept::metrics::register(&mut registry, Arc::clone(&interceptor));
    let probes = Arc::new(Probes { ready: AtomicBool::new(false), registry });
    let whois =
        Whois { kubepods: Arc::clone(&node.kubepods), pods: Arc::clone(&pods), defaults: config.defaults };
    let mut tasks = Tasks::default();
    tasks.spawn("the probes' server", admin::serve_probes(probes_listener, Arc::clone(&probes)));
    tasks.spawn("the commands' server", admin::serve_commands(commands_listener, Arc::new(whois)));

    let kube = kube_identity::client(config.kube_identity, &config.node_name).await?;
    let aws = aws::config().await;
    let cgroups = Arc::clone(&node.kubepods);
    let server = Arc::new(server(&config, cgroups, &pods, kube.clone(), &aws, request_metrics)?);

    let (pod_events, received) = mpsc::channel(POD_EVENTS);
    let (synced, mut is_synced) = watch::channel(false);
    let (first, cgroups) = tree::follow(node.kubepods.path())
        .map_err(|source| Error::CgroupRead { path: node.kubepods.path().to_owned(), source })?;
    let enforcer = Enforcer {
        defaults: config.defaults,
        map: Arc::clone(&interceptor),
        own: node.own_pod,
        pods: Arc::clone(&pods),
        engine: Arc::clone(&server.engine),
    };
    tasks.spawn("the policies' upkeep", enforcer.run(first, cgroups, received, synced));
    let node_name = config.node_name.clone();
    tasks.spawn("the watch of pods", async move {
        pods.follow(Api::all(kube), &node_name, pod_events).await;
    });
    // Existing pods have their policies before the first of their dials is decided. Without the API server
    // nothing is intercepted yet, and the agent is not ready.
    tokio::select! {
        _ = is_synced.wait_for(|synced| *synced) => {}
        ended = tasks.ended() => return Err(ended),
        signal = signalled() => return signal,
    }

    let wanted = Addresses {
        v4: config.target_v4.map(|target| *target.ip()),
        v6: config.target_v6.map(|target| *target.ip()),
    };
    let (link, addresses) = Link::up(&config.link, wanted).await?;
    let outcome = serve(&config, addresses, server, &interceptor, origins, &probes, &mut tasks).await;
    let removed = link.down().await;
    outcome?;
    Ok(removed?)
}

/// Builds the stages behind an accepted connection.
pub fn server(
    config: &Config,
    cgroups: impl CgroupPaths,
    pods: &Arc<Pods>,
    kube: kube::Client,
    aws: &SdkConfig,
    metrics: RequestMetrics,
) -> Result<Server<NodeSource>, Error> {
    let mut imds_key = [0; 32];
    getrandom::fill(&mut imds_key).map_err(Error::Randomness)?;
    Ok(Server {
        defaults: config.defaults,
        resolver: CallerResolver::new(cgroups, Arc::clone(pods)),
        engine: Arc::new(Engine::new(NodeSource {
            tokens: Tokens::new(&config.kubelet_root, kube),
            eks_auth: EksAuth::new(aws, &config.cluster_name, &config.node_name),
        })),
        imds_tokens: ImdsTokens::new(&imds_key),
        metrics,
    })
}

/// Listens, attaches, and serves until the end.
async fn serve(
    config: &Config,
    addresses: Addresses,
    server: Arc<Server<NodeSource>>,
    interceptor: &Mutex<Interceptor>,
    origins: Arc<dyn OriginLookup>,
    probes: &Probes,
    tasks: &mut Tasks,
) -> Result<(), Error> {
    let (drain, watch) = drain();
    let mut target = config.clone();
    target.target_v6 = target.target_v6.filter(|_| addresses.v6.is_some());
    for address in [target.target_v4.map(SocketAddr::V4), target.target_v6.map(SocketAddr::V6)] {
        let Some(address) = address else { continue };
        let listener = accept::listen(address)
            .map_err(|source| Error::Listen { address: address.to_string(), source })?;
        let (server, origins, watch) = (Arc::clone(&server), Arc::clone(&origins), watch.clone());
        let of_connections = watch.clone();
        tasks.spawn("a listener", async move {
            let serve = |accepted| {
                tokio::spawn(Arc::clone(&server).connection(accepted, of_connections.clone()));
            };
            if let Err(error) = accept::accept(listener, origins, watch, serve).await {
                warn!(%error, %address, "cannot accept connections");
            }
        });
    }
    {
        let mut interceptor = interceptor.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        interceptor.set_target(target.target(GENERATION))?;
        interceptor.attach()?;
    }
    drop(watch);
    probes.ready.store(true, Relaxed);
    info!("pods are served");

    let end = tokio::select! {
        signal = signalled() => signal,
        ended = tasks.ended() => Err(ended),
    };
    probes.ready.store(false, Relaxed);
    info!("stopping: requests in flight are finished");
    if !drain.run(config.drain).await {
        warn!(seconds = config.drain.as_secs(), "requests were still in flight at the end of the drain time");
    }
    end
}

/// Where this node's pods are, and podgate among them.
struct Node {
    kubepods: Arc<Kubepods>,
    agent_cgroup: PathBuf,
    own_pod: Option<u64>,
}

/// What runs as long as the agent does.
#[derive(Default)]
struct Tasks(JoinSet<&'static str>);

// === impl Node ===

impl Node {
    fn find(config: &Config) -> Result<Self, Error> {
        let kubepods = Kubepods::find(&config.cgroup_root)?;
        let agent_cgroup = kubepods.of_process(None)?;
        let below = agent_cgroup.strip_prefix(kubepods.path()).ok();
        let own_pod = below.and_then(cgroup::parse).map(|own| kubepods.path().join(own.pod));
        let own_pod = own_pod.map(|path| read_id(&path)).transpose()?;
        if own_pod.is_none() {
            info!(cgroup = %agent_cgroup.display(), "podgate is not in a pod's cgroup");
        }
        Ok(Self { kubepods: Arc::new(kubepods), agent_cgroup, own_pod })
    }

    fn settings(&self) -> Result<Settings, Error> {
        Ok(Settings {
            kubepods: self.kubepods.path().to_owned(),
            agent_cgroup: self.agent_cgroup.clone(),
            kubepods_level: self.kubepods.level(),
            kubepods_id: read_id(self.kubepods.path())?,
            ticket_key: TicketKey::random()?,
        })
    }
}

// === impl Tasks ===

impl Tasks {
    fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(async move {
            task.await;
            name
        });
    }

    /// Waits for one that should not have ended.
    async fn ended(&mut self) -> Error {
        match self.0.join_next().await {
            Some(Ok(name)) => Error::Ended(name),
            Some(Err(_)) | None => Error::Ended("a part of the agent, by a panic,"),
        }
    }
}

fn read_id(path: &std::path::Path) -> Result<u64, Error> {
    cgroupfs::cgroup_id(path).map_err(|source| Error::CgroupRead { path: path.to_owned(), source })
}

async fn listen_tcp(address: SocketAddr) -> Result<TcpListener, Error> {
    let listening = TcpListener::bind(address).await;
    listening.map_err(|source| Error::Listen { address: address.to_string(), source })
}

/// Returns at `SIGTERM` or `SIGINT`.
async fn signalled() -> Result<(), Error> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::Signal)?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

fn in_use(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; another agent, podgate's or AWS's own, listens there: see `ss -ltnp`",
        _ => "",
    }
}
