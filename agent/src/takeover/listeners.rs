//! Pairs of addresses at which this agent listens.
//!
//! Owns who is listened to where; the sockets' options are `accept`'s, and what is served is `serve`'s.

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
use futures::future::BoxFuture;
use tokio::sync::watch;
use tracing::{debug, info, warn};

use super::{Error, dataplane::Dataplane};
use crate::{
    accept::{self, Accepted, Ended},
    drain::{Drain, DrainWatch, drain},
    intercept::OriginLookup,
    tasks::Tasks,
};

/// Serves a connection, to its end or until the drain begins; `None`, and it is closed, where its caller has too many.
pub(crate) type Serve = Arc<dyn Fn(Accepted, DrainWatch) -> Option<BoxFuture<'static, ()>> + Send + Sync>;

/// A pair of addresses at which this agent listens. Dropped, it accepts no more, and the requests in flight are the last
/// of their connections.
pub(super) struct ListenerSet {
    listeners: Vec<(SocketAddr, Arc<TcpListener>)>,
    drain: Drain,
}

/// Makes listener sets, and passes on the connections that they accept.
pub(super) struct Acceptor<D> {
    pub(super) dataplane: Arc<D>,
    pub(super) origins: Arc<dyn OriginLookup>,
    pub(super) serve: Serve,
    /// Whether EKS Pod Identity's addresses are left to a process that listens there already: perhaps an EKS Pod Identity
    /// Agent that the watch does not show.
    pub(super) yields: bool,
}

// === impl Acceptor ===

impl<D: Dataplane> Acceptor<D> {
    /// Listens at these addresses, where nobody but podgate may listen from now on. An IPv6 address that the node cannot
    /// have is left out.
    ///
    /// A connection without an origin is served only at an address to which pods are sent, which `effective` tells, or to
    /// which clients connect by themselves: anywhere else it has bypassed the programs.
    pub(super) async fn listen(
        &self,
        addresses: &[SocketAddr],
        effective: &watch::Receiver<Option<Target>>,
        tasks: &mut Tasks,
    ) -> Result<ListenerSet, Error> {
        let mut listeners = Vec::new();
        for &address in addresses {
            if self.dataplane.add_address(address.ip()).await? {
                let (address, listener) = self.listen_at(address).await?;
                listeners.push((address, Arc::new(listener)));
            } else {
                warn!(%address, "IPv6 is switched off on this node: pods are served over IPv4 only");
            }
        }
        if listeners.is_empty() {
            return Err(Error::NoTarget);
        }
        let (drain, watch) = drain();
        for (_, listener) in &listeners {
            let listener = listener.try_clone().map_err(Error::Descriptor)?;
            let (serve, effective) = (Arc::clone(&self.serve), effective.clone());
            let drain = watch.clone();
            let serve = move |accepted: Accepted| {
                if accepted.origin.is_none() && !is_expected_at(&accepted, effective.borrow().as_ref()) {
                    debug!(%accepted.peer, "closed: it has no ticket, and nothing is sent where it came");
                    return;
                }
                if let Some(served) = serve(accepted, drain.clone()) {
                    tokio::spawn(served);
                }
            };
            let origins = Arc::clone(&self.origins);
            let accepting = accept::accept(listener, origins, watch.clone(), serve);
            tasks.spawn_finite("a listener", async {
                match accepting.await? {
                    Ended::Drained => Ok(()),
                    Ended::Destroyed => Err(io::Error::other("it was closed by somebody else")),
                }
            });
        }
        let set = ListenerSet { listeners, drain };
        info!(addresses = ?set.addresses().collect::<Vec<_>>(), "listening");
        Ok(set)
    }

    async fn listen_at(&self, address: SocketAddr) -> Result<(SocketAddr, TcpListener), Error> {
        let failed = |source| Error::Listen { address, source };
        let is_service_address = Endpoint::new(address.ip(), address.port()).service().is_some();
        if self.yields
            && is_service_address
            && accept::is_listened_at(address).map_err(io::Error::other).map_err(failed)?
        {
            return Err(failed(io::ErrorKind::AddrInUse.into()));
        }
        let listening = self.dataplane.listen(address)?;
        // Not before: until then the address may be another process's.
        self.dataplane.reserve(address).await?;
        Ok(listening)
    }
}

// === impl ListenerSet ===

impl ListenerSet {
    /// Where pods reach it.
    pub(super) fn addresses(&self) -> impl Iterator<Item = SocketAddr> {
        self.listeners.iter().map(|(address, _)| *address)
    }

    /// The sockets, as the programs are given them.
    pub(super) fn listeners(&self) -> impl Iterator<Item = Arc<TcpListener>> {
        self.listeners.iter().map(|(_, listener)| Arc::clone(listener))
    }

    /// Its IPv4 and its IPv6 address, as the programs know them.
    pub(super) fn endpoints(&self) -> (Endpoint, Endpoint) {
        let of_family = |is_ipv4| {
            let address = self.addresses().find(|address| address.is_ipv4() == is_ipv4);
            address.map_or(Endpoint::NONE, |address| Endpoint::new(address.ip(), address.port()))
        };
        (of_family(true), of_family(false))
    }

    /// Accepts no more, and waits at most `limit` for requests in flight. Whether all were finished.
    pub(super) async fn close(self, limit: Duration) -> bool {
        drop(self.listeners);
        self.drain.run(limit).await
    }
}

/// Whether a connection without an origin may have come there. Its own address tells: the programs give all connections
/// of a family to one listener.
fn is_expected_at(accepted: &Accepted, effective: Option<&Target>) -> bool {
    let address = accepted.stream.local_addr();
    address.is_ok_and(|at| is_reachable(&Endpoint::new(at.ip(), at.port()), effective))
}

/// Whether clients connect to this address by themselves, or are sent there.
fn is_reachable(at: &Endpoint, effective: Option<&Target>) -> bool {
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
    fn without_a_ticket_only_expected_addresses_are_reachable() {
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
            assert_eq!(is_reachable(&endpoint(at), effective.as_ref()), expected, "{at}, {effective:?}");
        }
    }
}
