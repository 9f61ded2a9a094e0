//! The time in which pods are served: from the first listener to the last answer.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex, MutexGuard, atomic::Ordering::Relaxed},
    time::Duration,
};

use agent_common::{
    net::Endpoint,
    target::{Target, WHEN_DOWN_DENY},
};
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tracing::{error, info, warn};

use super::{Error, lock, signal::Signals, tasks::Tasks};
use crate::{
    accept,
    admin::Probes,
    config::Config,
    credentials::cache::NodeSource,
    drain::drain,
    intercept::{Interceptor, OriginLookup, Standing},
    link::Addresses,
    serve::Server,
};

/// Time between two beats: a few may be late before pods are refused.
const BEAT: Duration = Duration::from_millis(250);
/// When the agent that has taken over has not beaten for so long, this one takes charge again: before pods are refused.
const TAKE_BACK_AFTER: Duration = Duration::from_secs(1);

/// The time in which pods are served.
pub(super) struct Serving<'a> {
    pub(super) config: &'a Config,
    pub(super) interceptor: &'a Mutex<Interceptor>,
    pub(super) probes: &'a Probes,
    /// Tells the others whether this agent is in charge of the node.
    pub(super) in_charge: watch::Sender<bool>,
}

/// Where this agent listens.
struct Listeners {
    target: Target,
    v4: Option<TcpListener>,
    v6: Option<TcpListener>,
}

// === impl Serving ===

impl Serving<'_> {
    /// Listens, takes charge, and serves until the end: also while another agent is in charge, whose place this one
    /// takes again should it die.
    pub(super) async fn run(
        &self,
        addresses: Addresses,
        server: Arc<Server<NodeSource>>,
        origins: Arc<dyn OriginLookup>,
        tasks: &mut Tasks,
        signals: &mut Signals,
    ) -> Result<(), Error> {
        let (drain, watch) = drain();
        let listeners = self.listen(addresses)?;
        for listener in [&listeners.v4, &listeners.v6].into_iter().flatten() {
            let listener = listener.try_clone().map_err(Error::Descriptor)?;
            let (server, origins, watch) = (Arc::clone(&server), Arc::clone(&origins), watch.clone());
            let of_connections = watch.clone();
            tasks.spawn("a listener", async move {
                let serve = |accepted| {
                    tokio::spawn(Arc::clone(&server).connection(accepted, of_connections.clone()));
                };
                if let Err(error) = accept::accept(listener, origins, watch, serve).await {
                    warn!(%error, "cannot accept connections");
                }
            });
        }
        drop(watch);
        self.take_over(&listeners)?;
        self.probes.ready.store(true, Relaxed);
        info!("pods are served");

        let end = self.keep_charge(&listeners, tasks, signals).await;
        self.probes.ready.store(false, Relaxed);
        // Where nobody has taken over, new dials are refused at once.
        if let Err(error) = self.interceptor().stop() {
            error!(%error, "cannot tell the kernel that this agent stops; its pods are refused after 2 s");
        }
        self.in_charge.send_replace(false);
        drop(listeners);
        info!("stopping: requests in flight are finished");
        if !drain.run(self.config.drain).await {
            let seconds = self.config.drain.as_secs();
            warn!(seconds, "requests were still in flight at the end of the drain time");
        }
        end
    }

    /// Listens at the target, where nobody may listen but podgate.
    fn listen(&self, addresses: Addresses) -> Result<Listeners, Error> {
        let v4 = self.config.target_v4.filter(|_| addresses.v4.is_some()).map(SocketAddr::V4);
        let v6 = self.config.target_v6.filter(|_| addresses.v6.is_some()).map(SocketAddr::V6);
        if v4.is_none() && v6.is_none() {
            return Err(Error::NoTarget);
        }
        let target = target(v4, v6);
        let was_guarded = self.interceptor().guard_addresses(target)?;
        let listen = |address: Option<SocketAddr>| {
            let Some(address) = address else { return Ok(None) };
            let checked = if was_guarded { Ok(()) } else { accept::check_free(address) };
            let listener = checked.and_then(|()| accept::listen(address));
            listener.map(Some).map_err(|source| Error::Listen { address: address.to_string(), source })
        };
        Ok(Listeners { target, v4: listen(v4)?, v6: listen(v6)? })
    }

    fn take_over(&self, listeners: &Listeners) -> Result<(), Error> {
        let mut interceptor = self.interceptor();
        interceptor.take_over(listeners.target)?;
        interceptor.steer(listeners.v4.as_ref(), listeners.v6.as_ref())?;
        self.in_charge.send_replace(true);
        Ok(())
    }

    /// Beats, and takes charge again when the agent that took it falls silent. Until the end is asked for.
    async fn keep_charge(
        &self,
        listeners: &Listeners,
        tasks: &mut Tasks,
        signals: &mut Signals,
    ) -> Result<(), Error> {
        let mut beats = interval(BEAT);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = signals.end() => return Ok(()),
                ended = tasks.ended() => return Err(ended),
                _ = beats.tick() => {}
            }
            // Charge is not left for one failure: what pods get without a heartbeat is a refusal.
            if let Err(error) = self.beat(listeners) {
                error!(%error, "cannot tell the kernel that this agent is alive; its pods are refused after 2 s");
            }
        }
    }

    fn beat(&self, listeners: &Listeners) -> Result<(), Error> {
        let standing = self.interceptor().beat()?;
        match standing {
            Standing::InCharge => {}
            Standing::Succeeded { silent } if silent >= TAKE_BACK_AFTER => {
                warn!(?silent, "the podgate that took over is silent: taking charge again");
                self.take_over(listeners)?;
            }
            Standing::Succeeded { .. } => {
                if self.in_charge.send_replace(false) {
                    info!("another podgate has taken over; this one is ready to take charge again");
                }
            }
        }
        Ok(())
    }

    fn interceptor(&self) -> MutexGuard<'_, Interceptor> {
        lock(self.interceptor)
    }
}

/// The target as the programs read it; its generation is chosen when it comes into force.
fn target(v4: Option<SocketAddr>, v6: Option<SocketAddr>) -> Target {
    let endpoint = |address: Option<SocketAddr>| {
        address.map_or(Endpoint::NONE, |address| Endpoint::new(address.ip(), address.port()))
    };
    Target { generation: 0, v4: endpoint(v4), v6: endpoint(v6), when_down: WHEN_DOWN_DENY, _pad: 0 }
}
