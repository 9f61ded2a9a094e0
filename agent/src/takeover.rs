//! The takeover flow: which agent of this node is active, and who owns which address.
//!
//! ```text
//!             credentials (transfer)
//! predecessor ─────────────────────▶ successor: standby ── become_active ──▶ active ── shutdown ─▶ drains
//!      ▲                                                                       │
//!      └── takes back when the successor is silent for a second (standby) ◀────┘ superseded
//! ```
//!
//! Owns the order in which addresses, listeners and programs change hands, so that at every moment a pod's connection is
//! served or refused at once; never parses a request, never decides for a pod. Called by `app` alone. The parts:
//! `active` (becoming active, and what the active agent keeps right), `standby`, `shutdown`, `heartbeat_task`, `listeners` (on
//! the node), `pod_listeners` (in pods' own networks, which `pod_networks` enters), `eks_agent` (whether the EKS Pod Identity
//! Agent answers), `coexistence` with it, `transfer` of credentials, and `dataplane`, the seam to the node.

use std::{
    io,
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use agent_common::target::Target;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::{error, info};

mod active;
mod coexistence;
pub mod dataplane;
mod eks_agent;
pub mod heartbeat_task;
mod listeners;
pub mod pod_listeners;
pub mod pod_networks;
mod shutdown;
mod standby;
pub mod transfer;

pub(crate) use self::listeners::Serve;
use self::{
    dataplane::Dataplane,
    eks_agent::EksAgent,
    listeners::{Acceptor, ListenerSet},
    pod_listeners::PodListeners,
};
use crate::{
    config::{Config, TargetMode, WhenDown},
    intercept::{self, OriginLookup},
    netdev,
    tasks::{TaskEnded, Tasks},
};

/// Time between two looks at which agent is active.
const STANDING_INTERVAL: Duration = Duration::from_millis(250);
/// For how long becoming active again may fail: longer than any shortage that passes. Then the agent stops, and whoever
/// looks after its pod restarts it.
const FAILING_MAX: Duration = Duration::from_secs(10);

/// Why pods cannot be served, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel side failed.
    #[error(transparent)]
    Intercept(#[from] intercept::Error),
    /// The network interface failed.
    #[error(transparent)]
    Netdev(#[from] netdev::Error),
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}{}", in_use(source))]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A listener's descriptor cannot be copied.
    #[error("cannot copy a listener's descriptor: {0}; is the limit of open files reached?")]
    Descriptor(#[source] io::Error),
    /// No address is left to listen on.
    #[error("no address to serve pods on: IPv6 is switched off on this node and --target-v4 is \"none\"")]
    NoTarget,
    /// An operator has detached podgate from the node.
    #[error("`podgate detach` was run on this node: this agent stops; one that is started attaches again")]
    Detached,
    /// A background task has ended.
    #[error(transparent)]
    TaskEnded(#[from] TaskEnded),
}

/// The settings that say who owns which address.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    target: TargetMode,
    target_v4: Option<SocketAddrV4>,
    target_v6: Option<SocketAddrV6>,
    when_down: WhenDown,
    drain: Duration,
}

/// This agent among those of its node.
pub(crate) struct Takeover<D> {
    settings: Settings,
    dataplane: Arc<D>,
    acceptor: Acceptor<D>,
    eks_agent: EksAgent,
    /// Whether pods are served, for the kubelet.
    ready: Arc<AtomicBool>,
    /// Whether this agent is active, for those parts that only the active agent has.
    active: watch::Sender<bool>,
    /// The listeners in pods' own networks.
    pod_listeners: PodListeners,
    /// Podgate's own pair of addresses: always open, except where the settings never need it.
    own: Option<ListenerSet>,
    /// EKS Pod Identity's addresses, while the EKS Pod Identity Agent leaves them to podgate.
    pod_identity: Option<ListenerSet>,
    /// The target that this agent last gave to the programs.
    effective: watch::Sender<Option<Target>>,
    /// When EKS Pod Identity's addresses may be tried again.
    retry_at: Instant,
    /// When addresses that no agent uses any more are to be removed.
    tidy_at: Option<Instant>,
}

/// What a takeover is made of.
pub(crate) struct Parts<D> {
    pub(crate) dataplane: Arc<D>,
    pub(crate) origins: Arc<dyn OriginLookup>,
    pub(crate) serve: Serve,
    /// Whether a pod of the EKS Pod Identity Agent is on the node.
    pub(crate) eks_agent_is_here: watch::Receiver<bool>,
    pub(crate) ready: Arc<AtomicBool>,
    pub(crate) active: watch::Sender<bool>,
    pub(crate) pod_listeners: PodListeners,
}

// === impl Settings ===

impl From<&Config> for Settings {
    fn from(config: &Config) -> Self {
        Self {
            target: config.target,
            target_v4: config.target_v4,
            target_v6: config.target_v6,
            when_down: config.when_down,
            drain: config.drain,
        }
    }
}

// === impl Takeover ===

impl<D: Dataplane> Takeover<D> {
    /// Listens wherever pods are to be served. Nothing changes for pods before [`run`](Self::run).
    pub(crate) async fn bind(settings: Settings, parts: Parts<D>, tasks: &mut Tasks) -> Result<Self, Error> {
        let Parts { dataplane, origins, serve, eks_agent_is_here, ready, active, pod_listeners } = parts;
        let acceptor = Acceptor {
            dataplane: Arc::clone(&dataplane),
            origins,
            serve,
            yields: settings.target == TargetMode::Auto,
        };
        let mut takeover = Self {
            settings,
            dataplane,
            acceptor,
            eks_agent: EksAgent::new(eks_agent_is_here, tasks),
            ready,
            active,
            pod_listeners,
            own: None,
            pod_identity: None,
            effective: watch::Sender::default(),
            retry_at: Instant::now(),
            tidy_at: None,
        };
        takeover.open(tasks).await?;
        Ok(takeover)
    }

    /// Becomes active and serves until `shutdown`. While another agent is active this one stands by, and becomes active
    /// again should that one fall silent.
    pub(crate) async fn run(
        mut self,
        tasks: &mut Tasks,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), Error> {
        self.pod_listeners.first_round().await;
        self.become_active().await?;
        let dataplane = Arc::clone(&self.dataplane);
        tasks.spawn("the heartbeat", heartbeat_task::run(move || dataplane.heartbeat()));
        self.ready.store(true, Relaxed);
        info!("pods are served");
        let end = self.serve_until(pin!(shutdown), tasks).await;
        self.ready.store(false, Relaxed);
        self.shut_down(matches!(end, Err(Error::Detached))).await;
        end
    }

    /// Where pods are sent, or may be.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.listener_sets().flat_map(ListenerSet::addresses)
    }

    /// Follows which agent is active, and where the EKS Pod Identity Agent is.
    async fn serve_until(
        &mut self,
        mut shutdown: Pin<&mut (impl Future<Output = ()> + Send)>,
        tasks: &mut Tasks,
    ) -> Result<(), Error> {
        let mut looks = interval(STANDING_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing_since = None;
        loop {
            match self.follow_standing().await {
                Err(Error::Detached) => return Err(Error::Detached),
                // Not after the first failure: without an active agent pods are refused.
                Err(error) => {
                    if failing_since.get_or_insert_with(Instant::now).elapsed() >= FAILING_MAX {
                        return Err(error);
                    }
                    error!(%error, "cannot tell which agent is active, or become active; trying again");
                }
                Ok(()) => failing_since = None,
            }
            if let Err(error) = self.follow_eks_agent(tasks).await {
                error!(%error, "cannot change where pods are sent; trying again");
            }
            tokio::select! {
                () = shutdown.as_mut() => return Ok(()),
                ended = tasks.ended() => return Err(ended.into()),
                () = self.eks_agent.changed() => {}
                _ = looks.tick() => {}
            }
        }
    }

    fn listener_sets(&self) -> impl Iterator<Item = &ListenerSet> {
        self.own.iter().chain(&self.pod_identity)
    }
}

fn in_use(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "; another process listens there, perhaps the EKS Pod Identity Agent: `ss -ltnp` tells which"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests;
