//! podgate's own network link and the target's addresses on it.
//!
//! Owns that link and nothing else of the node's network; adds no route to the main table: the local table is
//! enough, and the stock agent refuses to start where it finds such a route.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt as _;
use rtnetlink::{
    Error as NetlinkError, Handle, LinkBridge, LinkDummy, LinkUnspec,
    packet_route::address::{AddressAttribute, AddressFlags},
};
use tracing::{debug, info, warn};

/// The link, as long as it is to exist.
#[derive(Debug)]
pub struct Link {
    handle: Handle,
    name: String,
    index: u32,
}

/// The addresses that the link has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// The IPv6 address; none where the node has IPv6 switched off.
    pub v6: Option<Ipv6Addr>,
}

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[source] io::Error),
    /// The kernel refused.
    #[error(
        "cannot {action} on network link {link}: {source}; the agent needs CAP_NET_ADMIN on the host's network"
    )]
    Netlink {
        /// What was tried.
        action: String,
        /// The link.
        link: String,
        /// The kernel's word.
        source: io::Error,
    },
}

// === impl Link ===

impl Link {
    /// Makes the link, or takes over the one that an agent before this has left, and gives it the addresses. An
    /// IPv6 address that the node cannot have is left out with a warning.
    pub async fn up(name: &str, wanted: Addresses) -> Result<(Self, Addresses), Error> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
        tokio::spawn(connection);
        let index = match index(&handle, name).await {
            Some(index) => index,
            None => create(&handle, name).await?,
        };
        let link = Self { handle, name: name.to_owned(), index };
        if let Some(v4) = wanted.v4 {
            link.add(v4.into()).await?;
        }
        let v6 = match wanted.v6 {
            Some(v6) => link.add_v6(v6).await?,
            None => None,
        };
        info!(link = name, v4 = ?wanted.v4, v6 = ?v6, "the target's addresses are up");
        Ok((link, Addresses { v4: wanted.v4, v6 }))
    }

    /// Removes the link, and its addresses with it.
    pub async fn down(self) -> Result<(), Error> {
        let removed = self.handle.link().del(self.index).execute().await;
        removed.map_err(|error| refused("remove the link", &self.name, error))
    }

    async fn add_v6(&self, address: Ipv6Addr) -> Result<Option<Ipv6Addr>, Error> {
        match self.add(address.into()).await {
            Ok(()) => Ok(Some(address)),
            Err(Error::Netlink { source, .. }) if is_without_ip6(&source) => {
                warn!(%address, "this node has IPv6 switched off: pods are served over IPv4 only");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn add(&self, address: IpAddr) -> Result<(), Error> {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        let mut request = self.handle.address().add(self.index, address, prefix).replace();
        if address.is_ipv6() {
            // Nobody else has the address: it is good at once. And no route for it in the main table.
            let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
            request.message_mut().attributes.push(AddressAttribute::Flags(flags));
        }
        request.execute().await.map_err(|error| refused(&format!("put {address}"), &self.name, error))
    }
}

async fn index(handle: &Handle, name: &str) -> Option<u32> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    links.try_next().await.ok().flatten().map(|link| link.header.index)
}

/// A dummy link; a bridge without ports, which serves as well, where the kernel has no dummy.
async fn create(handle: &Handle, name: &str) -> Result<u32, Error> {
    let refused = |error| refused("make the link", name, error);
    let made = handle.link().add(LinkDummy::new(name).up().build()).execute().await;
    if let Err(error) = made {
        let error = kernel_error(error);
        if error.raw_os_error() != Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) {
            return Err(Error::Netlink {
                action: "make the link".to_owned(),
                link: name.to_owned(),
                source: error,
            });
        }
        debug!("this kernel has no dummy links: making a bridge instead");
        handle.link().add(LinkBridge::new(name).build()).execute().await.map_err(refused)?;
    }
    let created = index(handle, name).await;
    let index = created.ok_or_else(|| refused(NetlinkError::RequestFailed))?;
    let up = LinkUnspec::new_with_index(index).up().build();
    handle.link().set(up).execute().await.map_err(refused)?;
    Ok(index)
}

fn refused(action: &str, link: &str, error: NetlinkError) -> Error {
    Error::Netlink { action: action.to_owned(), link: link.to_owned(), source: kernel_error(error) }
}

fn kernel_error(error: NetlinkError) -> io::Error {
    match error {
        NetlinkError::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

/// `disable_ipv6` answers `EACCES`; a kernel without IPv6 does not know the family.
fn is_without_ip6(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errnos = [Errno::ACCESS, Errno::AFNOSUPPORT, Errno::OPNOTSUPP, Errno::ADDRNOTAVAIL];
    errnos.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}
