//! A pair of addresses at which this agent listens.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex},
    time::Duration,
};

use agent_common::net::Endpoint;
use tracing::{info, warn};

use super::{Error, lock, tasks::Tasks};
use crate::{
    accept,
    credentials::source::NodeSource,
    drain::{Drain, drain},
    intercept::{Interceptor, OriginLookup},
    link::Link,
    serve::Server,
};

/// A pair of addresses at which this agent listens. Dropped, it accepts no more, and requests in flight are the last of
/// their connections.
pub(super) struct Place {
    listeners: Vec<(SocketAddr, TcpListener)>,
    drain: Drain,
}

/// What it takes to listen somewhere.
pub(super) struct Opener {
    pub(super) link: Link,
    pub(super) interceptor: Arc<Mutex<Interceptor>>,
    pub(super) server: Arc<Server<NodeSource>>,
    pub(super) origins: Arc<dyn OriginLookup>,
}

// === impl Opener ===

impl Opener {
    /// Listens at these addresses, where nobody may listen but podgate. An IPv6 address that the node cannot have is left
    /// out.
    pub(super) async fn open(&self, addresses: &[SocketAddr], tasks: &mut Tasks) -> Result<Place, Error> {
        let mut listeners = Vec::new();
        for &address in addresses {
            if self.link.add(address.ip()).await? {
                listeners.push((address, self.listen(address)?));
            } else {
                warn!(%address, "this node has IPv6 switched off: pods are served over IPv4 only");
            }
        }
        if listeners.is_empty() {
            return Err(Error::NoTarget);
        }
        let (drain, watch) = drain();
        for (_, listener) in &listeners {
            let listener = listener.try_clone().map_err(Error::Descriptor)?;
            let (server, watch) = (Arc::clone(&self.server), watch.clone());
            let of_connections = watch.clone();
            let serve = move |accepted| {
                if let Some(served) = Arc::clone(&server).admit(accepted, of_connections.clone()) {
                    tokio::spawn(served);
                }
            };
            let origins = Arc::clone(&self.origins);
            tasks.spawn_finite("a listener", accept::accept(listener, origins, watch, serve));
        }
        let place = Place { listeners, drain };
        info!(addresses = ?place.addresses().collect::<Vec<_>>(), "listening");
        Ok(place)
    }

    fn listen(&self, address: SocketAddr) -> Result<TcpListener, Error> {
        let listener = accept::listen(address);
        let listener = listener.map_err(|source| Error::Listen { address: address.to_string(), source })?;
        // Not before: until then the address is somebody else's.
        lock(&self.interceptor).guard(address)?;
        Ok(listener)
    }
}

// === impl Place ===

impl Place {
    /// Where it is.
    pub(super) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.listeners.iter().map(|(address, _)| *address)
    }

    /// What listens there.
    pub(super) fn listeners(&self) -> impl Iterator<Item = &TcpListener> {
        self.listeners.iter().map(|(_, listener)| listener)
    }

    /// Its IPv4 and its IPv6 address, as the programs know them.
    pub(super) fn endpoints(&self) -> (Endpoint, Endpoint) {
        let of_family = |is_ipv4| {
            let address = self.addresses().find(|address| address.is_ipv4() == is_ipv4);
            address.map_or(Endpoint::NONE, |address| Endpoint::new(address.ip(), address.port()))
        };
        (of_family(true), of_family(false))
    }

    /// Accepts no more, and waits for what is in flight, at most for `limit`. Whether all was finished.
    pub(super) async fn close(self, limit: Duration) -> bool {
        drop(self.listeners);
        self.drain.run(limit).await
    }
}
