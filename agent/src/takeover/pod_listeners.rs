//! The listeners in pods' own networks: opened as soon as a pod has its network, published once they answer, closed with
//! the pod's last process.
//!
//! Owns their life, and what becomes of a pod's connections with it; never serves a request. Where a pod has none, its
//! connections go to the target on the node.

use std::{
    collections::HashMap,
    fmt, io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use agent_common::pod_listener::PodListener;
use futures::future;
use parking_lot::Mutex;
use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::{debug, info, warn};

use super::{
    dataplane::Dataplane,
    listeners::Serve,
    pod_networks::{OpenNetwork, PodNetworks},
};
use crate::{
    accept::{self, Accepted, Ended},
    drain::{Drain, DrainWatch, drain},
    identity::{Pod, PodUid, Pods, networks::Networks},
    intercept::OriginLookup,
    log_limit::LogLimit,
};

/// Between two proofs that a pod's listeners answer.
const PROBE_INTERVAL: Duration = Duration::from_secs(30);
/// After a failure, and twice as long after the next, up to the time between two proofs: a pod that closes its listeners, or
/// drops what is sent to them, makes no more work than this.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Lines about failures, of all pods together.
const LINES_MAX: u32 = 10;
const LOG_INTERVAL: Duration = Duration::from_mins(1);
/// Between two looks at whether all that accept have ended.
const FINISH_INTERVAL: Duration = Duration::from_millis(10);
/// How long a start waits for the listeners of the pods that are there already.
const FIRST_ROUND_TIMEOUT: Duration = Duration::from_secs(2);

/// What happens to pods' cgroups.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PodEvent {
    /// One was created, with this id.
    Created(PodUid, u64),
    /// It was removed.
    Removed(PodUid),
    /// Those that were there at the start are known.
    Synced,
}

/// What the listeners are made of.
pub(crate) struct Parts<D> {
    pub(crate) networks: Arc<dyn PodNetworks>,
    pub(crate) dataplane: Arc<D>,
    pub(crate) origins: Arc<dyn OriginLookup>,
    pub(crate) serve: Serve,
    pub(crate) pods: Arc<Pods>,
    /// Where the networks of pods become known.
    pub(crate) known: Arc<Networks>,
    pub(crate) metrics: PodListenerMetrics,
}

/// How many pods have listeners.
#[derive(Clone, Debug, Default)]
pub struct PodListenerMetrics {
    published: Gauge,
    failed: Gauge,
}

/// Ends all listeners.
pub(crate) struct PodListeners {
    drain: Drain,
    events: mpsc::UnboundedSender<PodEvent>,
    first_round: watch::Sender<()>,
    since: Instant,
    published: Gauge,
}

/// Follows the pods.
struct Follower<D> {
    parts: Parts<D>,
    unanswered: watch::Receiver<u64>,
    drain: DrainWatch,
    log: Mutex<LogLimit>,
}

/// Why listeners were closed.
enum End {
    /// The pod's last process has ended: another one may follow, in another network.
    Over,
    /// This agent shuts down.
    Drained,
    /// They have failed.
    Failed { reason: String, was_published: bool },
}

/// The connections of one pod's listeners. Dropped, it resets them at once: one that is left holds the pod's network and
/// its interface.
#[derive(Debug)]
struct Connections(watch::Sender<Fate>);

/// Starts connections.
#[derive(Clone, Debug)]
struct ConnectionsWatch(watch::Receiver<Fate>);

/// What becomes of connections that are open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Served,
    Reset,
    Finished,
}

/// One pod that is counted, for as long as it is.
struct Counted(Gauge);

/// One pod whose listeners are published, for as long as they are.
struct Published {
    known: Arc<Networks>,
    uid: PodUid,
    _counted: Counted,
}

// === impl PodListenerMetrics ===

impl PodListenerMetrics {
    /// Registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "podgate_pod_listeners",
            "Pods that are served in their own network",
            metrics.published.clone(),
        );
        registry.register(
            "podgate_pod_listeners_failed",
            "Pods whose own network does not let podgate serve them there; they are served on the node's addresses",
            metrics.failed.clone(),
        );
        metrics
    }
}

// === impl PodListeners ===

impl PodListeners {
    /// Follows what happens to pods' cgroups, and in which networks, by their cookies, nothing has answered a pod.
    pub(crate) fn follow<D: Dataplane>(
        parts: Parts<D>,
        unanswered: watch::Receiver<u64>,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (events, received) = mpsc::unbounded_channel();
        let (drain, watch) = drain();
        let (first_round, opening) = watch::channel(());
        let log = Mutex::new(LogLimit::new(LINES_MAX, LOG_INTERVAL));
        let published = parts.metrics.published.clone();
        let follower = Arc::new(Follower { parts, unanswered, drain: watch, log });
        let listeners = Self { drain, events, first_round, since: Instant::now(), published };
        (listeners, follower.run(received, opening))
    }

    /// Where it is told what happens to cgroups.
    pub(crate) fn events(&self) -> mpsc::UnboundedSender<PodEvent> {
        self.events.clone()
    }

    /// Those of a node without pods.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self {
            drain: drain().0,
            events: mpsc::unbounded_channel().0,
            first_round: watch::Sender::default(),
            since: Instant::now(),
            published: Gauge::default(),
        }
    }

    /// Waits a moment until the pods that were there at the start have their listeners.
    pub(crate) async fn first_round(&self) {
        // It has ended while the agent shuts down.
        let _ = self.events.send(PodEvent::Synced);
        let all = timeout(FIRST_ROUND_TIMEOUT, self.first_round.closed()).await.is_ok();
        let (pods, seconds) = (self.published.get(), self.since.elapsed().as_secs_f64());
        info!(pods, seconds, all, "listening in the networks of the pods that were there");
    }

    /// Accepts no more, and waits at most `limit` for requests in flight. Whether all were finished.
    pub(crate) async fn close(self, limit: Duration) -> bool {
        self.drain.run(limit).await
    }
}

impl fmt::Debug for PodListeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PodListeners").finish_non_exhaustive()
    }
}

// === impl Follower ===

impl<D: Dataplane> Follower<D> {
    /// `opening` is shared by the pods of the first round until each has been tried.
    async fn run(
        self: Arc<Self>,
        mut events: mpsc::UnboundedReceiver<PodEvent>,
        opening: watch::Receiver<()>,
    ) {
        let mut opening = Some(opening);
        let mut drain = self.drain.clone();
        let mut removals: HashMap<PodUid, watch::Sender<()>> = HashMap::new();
        loop {
            let event = tokio::select! {
                Some(event) = events.recv() => event,
                () = drain.begun() => break,
            };
            match event {
                PodEvent::Created(uid, id) => {
                    let (removal, removed) = watch::channel(());
                    // Dropped, the one before ends its pod.
                    removals.insert(uid, removal);
                    tokio::spawn(Arc::clone(&self).follow(uid, id, removed, opening.clone()));
                }
                PodEvent::Removed(uid) => {
                    removals.remove(&uid);
                }
                PodEvent::Synced => opening = None,
            }
        }
        // Those that follow pods end by themselves, once their connections are accepted. Until then no pod counts as removed.
        drop(events);
        while removals.values().any(|removal| !removal.is_closed()) {
            sleep(FINISH_INTERVAL).await;
        }
    }

    /// Serves one pod in its network, until its cgroup is removed.
    async fn follow(
        self: Arc<Self>,
        uid: PodUid,
        pod_cgroup_id: u64,
        mut removed: watch::Receiver<()>,
        opening: Option<watch::Receiver<()>>,
    ) {
        let mut drain = self.drain.clone();
        // A start waits for those only that can be served at once.
        let mut opening = match opening {
            Some(opening) if self.parts.networks.has_network(pod_cgroup_id).await => Some(opening),
            _ => None,
        };
        let mut delay = RETRY_DELAY;
        loop {
            let open = async {
                let pod = self.parts.pods.shown(uid).await;
                if pod.host_network {
                    return None;
                }
                let open = self.parts.networks.open(pod_cgroup_id, pod.container_ports.clone()).await;
                Some((pod, open))
            };
            let (pod, open) = tokio::select! {
                opened = open => match opened {
                    Some(opened) => opened,
                    None => return,
                },
                _ = removed.changed() => return,
                () = drain.begun() => return,
            };
            let end = match open {
                Ok(open) => self.serve(&pod, pod_cgroup_id, open, &mut removed, &mut opening).await,
                Err(error) => End::Failed { reason: error.to_string(), was_published: false },
            };
            opening = None;
            match end {
                End::Over => {}
                End::Drained => return,
                End::Failed { reason, was_published } => {
                    self.report(&pod, &reason);
                    let _counted = Counted::new(&self.parts.metrics.failed);
                    delay = if was_published { RETRY_DELAY } else { delay };
                    tokio::select! {
                        () = sleep(delay) => {}
                        _ = removed.changed() => return,
                        () = drain.begun() => return,
                    }
                    delay = (delay * 2).min(PROBE_INTERVAL);
                }
            }
        }
    }

    /// Serves a pod in one network of its, which it has until its last process ends.
    async fn serve(
        &self,
        pod: &Pod,
        pod_cgroup_id: u64,
        mut open: OpenNetwork,
        removed: &mut watch::Receiver<()>,
        opening: &mut Option<watch::Receiver<()>>,
    ) -> End {
        let (cookie, entry) = (open.cookie, entry(pod_cgroup_id, &open));
        let connections = Connections::default();
        let mut unanswered = self.unanswered.clone();
        let mut accepting = match self.accept(pod.uid, &open, &connections) {
            Ok(accepting) => accepting,
            Err(error) => return End::Failed { reason: error.to_string(), was_published: false },
        };
        let mut published = None;
        let failed = |reason: String, published: &Option<Published>| End::Failed {
            reason,
            was_published: published.is_some(),
        };
        let end = loop {
            if let Err(error) = self.check(pod, &open).await {
                break failed(error.to_string(), &published);
            }
            if published.is_none() {
                self.parts.known.learn(pod.uid, cookie);
                if let Err(error) = self.parts.dataplane.publish_pod_listener(cookie, entry).await {
                    break failed(error.to_string(), &published);
                }
                let port = open.sockets.port;
                debug!(pod.uid = %pod.uid, pod.name = pod.full_name(), port, "listening in the network of a pod");
                published = Some(self.published(pod.uid, port));
            }
            *opening = None;
            tokio::select! {
                ended = open.ended() => break match ended {
                    Ok(()) => End::Over,
                    Err(error) => failed(error.to_string(), &published),
                },
                _ = removed.changed() => break End::Over,
                ended = accepting.join_next() => match ended {
                    Some(Ok(Ok(Ended::Drained))) => {
                        while accepting.join_next().await.is_some() {}
                        connections.finish();
                        return End::Drained;
                    }
                    _ => break failed("its listeners were closed by somebody else".to_owned(), &published),
                },
                () = named(&mut unanswered, cookie) => {}
                () = sleep(PROBE_INTERVAL) => {}
            }
        };
        drop((accepting, connections, open));
        if let Err(error) = self.parts.dataplane.withdraw_pod_listener(cookie).await {
            warn!(%error, pod.uid = %pod.uid, "cannot tell the kernel that nothing listens in a pod's network any more");
        }
        end
    }

    /// Accepts at the listeners until the drain begins, or the result is dropped.
    fn accept(
        &self,
        uid: PodUid,
        open: &OpenNetwork,
        connections: &Connections,
    ) -> io::Result<JoinSet<io::Result<Ended>>> {
        let mut accepting = JoinSet::new();
        for listener in open.sockets.iter() {
            let (serve, drain) = (Arc::clone(&self.parts.serve), self.drain.clone());
            let (connections, watch) = (connections.watch(), drain.clone());
            let serve = move |mut accepted: Accepted| {
                accepted.in_network_of = Some(uid);
                if let Some(served) = serve(accepted, drain.clone()) {
                    connections.spawn(served);
                }
            };
            let (listener, origins) = (listener.try_clone()?, Arc::clone(&self.parts.origins));
            accepting.spawn(accept::accept(listener, origins, watch, serve));
        }
        Ok(accepting)
    }

    /// Makes sure that the pod is served by its listeners, and that they are in the pod's network.
    async fn check(&self, pod: &Pod, open: &OpenNetwork) -> io::Result<()> {
        let addresses = self.parts.networks.check(open).await?;
        let current = self.parts.pods.get(pod.uid);
        let expected = current.as_ref().map_or(&pod.ips, |current| &current.ips);
        match missing(expected, &addresses) {
            None => Ok(()),
            Some(ip) => Err(io::Error::other(format!(
                "the pod's address {ip} is not one of the network that its sandbox is in"
            ))),
        }
    }

    fn published(&self, uid: PodUid, port: u16) -> Published {
        let known = Arc::clone(&self.parts.known);
        known.set_listened(uid, Some(port));
        Published { known, uid, _counted: Counted::new(&self.parts.metrics.published) }
    }

    fn report(&self, pod: &Pod, reason: &str) {
        if let Some(suppressed) = self.log.lock().admit(Instant::now()) {
            warn!(pod.uid = %pod.uid, pod.name = pod.full_name(), reason, suppressed,
                "cannot serve a pod in its own network; its connections go to the node's addresses until that works");
        }
    }
}

// === impl Connections ===

impl Connections {
    fn watch(&self) -> ConnectionsWatch {
        ConnectionsWatch(self.0.subscribe())
    }

    /// Lets them end by themselves.
    fn finish(self) {
        self.0.send_replace(Fate::Finished);
    }
}

impl Default for Connections {
    fn default() -> Self {
        Self(watch::Sender::new(Fate::Served))
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.0.send_if_modified(|fate| {
            *fate == Fate::Served && {
                *fate = Fate::Reset;
                true
            }
        });
    }
}

// === impl ConnectionsWatch ===

impl ConnectionsWatch {
    fn spawn(&self, served: impl Future<Output = ()> + Send + 'static) {
        let mut fate = self.0.clone();
        tokio::spawn(async move {
            let reset = async {
                if fate.wait_for(|fate| *fate == Fate::Reset).await.is_err() {
                    future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = served => {}
                () = reset => {}
            }
        });
    }
}

// === impl Counted ===

impl Counted {
    fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        self.known.set_listened(self.uid, None);
    }
}

/// Returns when this network is the one in which nothing has answered.
async fn named(unanswered: &mut watch::Receiver<u64>, netns_cookie: u64) {
    while unanswered.changed().await.is_ok() {
        if *unanswered.borrow_and_update() == netns_cookie {
            return;
        }
    }
    future::pending::<()>().await;
}

/// The listeners as the programs know them.
fn entry(pod_cgroup_id: u64, open: &OpenNetwork) -> PodListener {
    let port = |listens: bool| if listens { open.sockets.port } else { 0 };
    PodListener::new(pod_cgroup_id, port(open.sockets.v4.is_some()), port(open.sockets.v6.is_some()))
}

/// An address of the pod that its network has not.
fn missing(expected: &[IpAddr], found: &[IpAddr]) -> Option<IpAddr> {
    expected.iter().copied().find(|ip| !found.contains(ip))
}
