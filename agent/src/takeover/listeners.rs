//! A pair of addresses at which this agent listens.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use agent_common::{
    defense::{Defense, holds},
    net::Endpoint,
    target::Target,
};
use tokio::sync::watch;
use tracing::{debug, info, warn};

use crate::{
    accept::{self, Accepted},
    app::Error,
    credentials::source::NodeSource,
    drain::{Drain, drain},
    intercept::{InterceptorHandle, OriginLookup},
    netdev::Link,
    serve::Server,
    tasks::Tasks,
};

/// A pair of addresses at which this agent listens. Dropped, it accepts no more, and requests in flight are the last of
/// their connections.
pub(crate) struct Place {
    listeners: Vec<(SocketAddr, Arc<TcpListener>)>,
    drain: Drain,
}

/// What it takes to listen somewhere.
pub(crate) struct Opener {
    pub(crate) link: Link,
    pub(crate) interceptor: InterceptorHandle,
    pub(crate) server: Arc<Server<NodeSource>>,
    pub(crate) origins: Arc<dyn OriginLookup>,
    /// Whether EKS Pod Identity's addresses are left to whoever listens at them: the EKS Pod Identity Agent, perhaps, that the watch
    /// does not show.
    pub(crate) yields: bool,
}

// === impl Opener ===

impl Opener {
    /// Listens at these addresses, where nobody may listen but podgate. An IPv6 address that the node cannot have is left
    /// out.
    ///
    /// Who comes without a ticket is served only where dials are sent, which `effective` tells, and where clients dial by
    /// themselves: elsewhere it has gone round the programs.
    pub(crate) async fn open(
        &self,
        addresses: &[SocketAddr],
        effective: &watch::Receiver<Option<Target>>,
        tasks: &mut Tasks,
    ) -> Result<Place, Error> {
        let mut listeners = Vec::new();
        for &address in addresses {
            if self.link.add(address.ip()).await? {
                listeners.push((address, Arc::new(self.listen(address).await?)));
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
            let effective = effective.clone();
            let serve = move |accepted: Accepted| {
                if accepted.origin.is_none() && !came_where_dials_go(&accepted, effective.borrow().as_ref()) {
                    debug!(%accepted.peer, "closed: no dial is sent where it came, and it has no ticket");
                    return;
                }
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

    async fn listen(&self, address: SocketAddr) -> Result<TcpListener, Error> {
        let failed = |source| Error::Listen { address: address.to_string(), source };
        let is_service_address = Endpoint::new(address.ip(), address.port()).service().is_some();
        if self.yields
            && is_service_address
            && accept::is_listened_at(address).map_err(io::Error::other).map_err(failed)?
        {
            return Err(failed(io::ErrorKind::AddrInUse.into()));
        }
        // At a port of the kernel's choice: what is dialled at `address` is given to this listener by the programs, and
        // whoever listens at every address, as an ingress controller does, is in nobody's way.
        let is_apart = holds(Defense::OwnPorts) && holds(Defense::OwnListeners);
        let port = if is_apart { 0 } else { address.port() };
        let listener = accept::listen(SocketAddr::new(address.ip(), port)).map_err(failed)?;
        // Not before: until then the address is somebody else's.
        self.interceptor.reserve(address).await?;
        Ok(listener)
    }
}

// === impl Place ===

impl Place {
    /// Where it is.
    pub(crate) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.listeners.iter().map(|(address, _)| *address)
    }

    /// What listens there.
    pub(crate) fn listeners(&self) -> impl Iterator<Item = Arc<TcpListener>> {
        self.listeners.iter().map(|(_, listener)| Arc::clone(listener))
    }

    /// Its IPv4 and its IPv6 address, as the programs know them.
    pub(crate) fn endpoints(&self) -> (Endpoint, Endpoint) {
        let of_family = |is_ipv4| {
            let address = self.addresses().find(|address| address.is_ipv4() == is_ipv4);
            address.map_or(Endpoint::NONE, |address| Endpoint::new(address.ip(), address.port()))
        };
        (of_family(true), of_family(false))
    }

    /// Accepts no more, and waits for what is in flight, at most for `limit`. Whether all was finished.
    pub(crate) async fn close(self, limit: Duration) -> bool {
        drop(self.listeners);
        self.drain.run(limit).await
    }
}

/// Whether a connection came where dials go. Its own address tells: the programs give all connections of a family to one
/// listener.
fn came_where_dials_go(accepted: &Accepted, effective: Option<&Target>) -> bool {
    let address = accepted.stream.local_addr();
    address.is_ok_and(|at| is_dialled(&Endpoint::new(at.ip(), at.port()), effective))
}

/// Whether clients dial this address, or are sent there.
fn is_dialled(at: &Endpoint, effective: Option<&Target>) -> bool {
    at.service().is_some()
        || effective.is_some_and(|target| [&target.v4, &target.v6].iter().any(|target| target.same(at)))
        || !holds(Defense::ConnectedAddresses)
}

#[cfg(test)]
mod tests {
    use agent_common::target::WHEN_DOWN_DENY;

    use super::*;

    fn endpoint(address: &str) -> Endpoint {
        let address: SocketAddr = address.parse().unwrap();
        Endpoint::new(address.ip(), address.port())
    }

    #[test]
    fn only_where_dials_are_sent_or_made_does_anybody_come_without_a_ticket() {
        const OWN: &str = "169.254.175.1:80";
        const OWN_V6: &str = "[fd70:6f64:6761:7465::1]:80";
        let own = Target { v4: endpoint(OWN), v6: endpoint(OWN_V6), when_down: WHEN_DOWN_DENY };
        let elsewhere =
            Target { v4: endpoint("169.254.170.23:80"), v6: endpoint("[fd00:ec2::23]:80"), ..own };
        for (at, effective, expected) in [
            (OWN, Some(own), true),
            (OWN_V6, Some(own), true),
            (OWN, Some(elsewhere), false),
            (OWN_V6, Some(elsewhere), false),
            (OWN, None, false),
            ("169.254.170.23:80", Some(own), true),
            ("[fd00:ec2::23]:80", None, true),
        ] {
            assert_eq!(is_dialled(&endpoint(at), effective.as_ref()), expected, "{at}, {effective:?}");
        }
    }
}
