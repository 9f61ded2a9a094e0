//! The time in which pods are served: from the first listener to the last answer.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, atomic::Ordering::Relaxed},
};

use agent_common::{net::Endpoint, target::Target};
use tracing::{info, warn};

use super::{Error, lock, signal::Signals, tasks::Tasks};
use crate::{
    accept,
    admin::Probes,
    config::Config,
    credentials::cache::NodeSource,
    drain::drain,
    intercept::{Interceptor, OriginLookup},
    link::Addresses,
    serve::Server,
};

/// The maps are made anew with each agent, so each is the first to use them.
const GENERATION: u64 = 1;

/// The time in which pods are served.
pub(super) struct Serving<'a> {
    pub(super) config: &'a Config,
    pub(super) interceptor: &'a Mutex<Interceptor>,
    pub(super) probes: &'a Probes,
}

// === impl Serving ===

impl Serving<'_> {
    /// Listens, attaches, and serves until the end.
    pub(super) async fn run(
        &self,
        addresses: Addresses,
        server: Arc<Server<NodeSource>>,
        origins: Arc<dyn OriginLookup>,
        tasks: &mut Tasks,
        signals: &mut Signals,
    ) -> Result<(), Error> {
        let (drain, watch) = drain();
        let v4 = self.config.target_v4.filter(|_| addresses.v4.is_some()).map(SocketAddr::V4);
        let v6 = self.config.target_v6.filter(|_| addresses.v6.is_some()).map(SocketAddr::V6);
        if v4.is_none() && v6.is_none() {
            return Err(Error::NoTarget);
        }
        for address in [v4, v6].into_iter().flatten() {
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
        drop(watch);
        self.interceptor().set_target(target(v4, v6))?;
        self.interceptor().attach()?;
        self.probes.ready.store(true, Relaxed);
        info!("pods are served");

        let end = tokio::select! {
            () = signals.end() => Ok(()),
            ended = tasks.ended() => Err(ended),
        };
        self.probes.ready.store(false, Relaxed);
        // New dials are refused at once, and none is sent to an address that is about to go.
        self.interceptor().set_target(target(None, None))?;
        info!("stopping: requests in flight are finished");
        if !drain.run(self.config.drain).await {
            let seconds = self.config.drain.as_secs();
            warn!(seconds, "requests were still in flight at the end of the drain time");
        }
        end
    }

    fn interceptor(&self) -> MutexGuard<'_, Interceptor> {
        lock(self.interceptor)
    }
}

/// The target as the programs read it.
fn target(v4: Option<SocketAddr>, v6: Option<SocketAddr>) -> Target {
    let endpoint = |address: Option<SocketAddr>| {
        address.map_or(Endpoint::NONE, |address| Endpoint::new(address.ip(), address.port()))
    };
    Target { generation: GENERATION, v4: endpoint(v4), v6: endpoint(v6) }
}
