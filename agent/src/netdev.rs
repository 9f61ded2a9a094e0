//! podgate's own network interface, and the addresses on it that podgate listens at.
//!
//! Owns these and nothing else of the node's network, which `inventory` reads. Adds no route and no rule: the local table is
//! enough, and the EKS Pod Identity Agent refuses to start where it finds such a route.

use std::{io, net::IpAddr};

use futures::TryStreamExt as _;
use rtnetlink::{
    Error as NetlinkError, Handle, LinkBridge, LinkDummy, LinkUnspec,
    packet_route::{
        address::{AddressAttribute, AddressFlags, AddressMessage},
        link::{LinkAttribute, LinkMessage},
    },
};
use tracing::{debug, info};

pub mod inventory;

/// Marks a netdev as podgate's (`ip link` shows it as `alias`).
const ALIAS: &str = "podgate: addresses that pods' connections to credential endpoints are redirected to";

/// The netdev and its addresses.
#[derive(Debug)]
pub struct Netdev {
    handle: Handle,
    name: String,
    index: u32,
}

/// Why there is no netdev.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no netlink socket.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[source] io::Error),
    /// The kernel refused.
    #[error(
        "cannot {action} network interface {netdev}: {source}; the agent needs CAP_NET_ADMIN on the host's network"
    )]
    Netlink {
        /// What was tried.
        action: String,
        /// The netdev.
        netdev: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// A netdev of that name exists, and is not podgate's.
    #[error("the network interface {netdev} exists and is not podgate's: choose another name with --netdev")]
    Taken {
        /// The netdev.
        netdev: String,
    },
}

// === impl Netdev ===

impl Netdev {
    /// Creates the netdev, or adopts that of a predecessor with its addresses, which may still serve there. A netdev that is
    /// not podgate's is left alone.
    ///
    /// The netdev stays when this is dropped; [`remove`] removes it.
    pub async fn up(name: &str) -> Result<Self, Error> {
        let handle = connect()?;
        let index = match find(&handle, name).await {
            Some(existing) if is_own(&existing) => existing.header.index,
            Some(_) => return Err(Error::Taken { netdev: name.to_owned() }),
            None => create(&handle, name).await?,
        };
        Ok(Self { handle, name: name.to_owned(), index })
    }

    /// Adds an address, unless the netdev has it. `false` when the node cannot have it, because IPv6 is disabled.
    pub async fn add(&self, address: IpAddr) -> Result<bool, Error> {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        let mut request = self.handle.address().add(self.index, address, prefix).replace();
        if address.is_ipv6() {
            // The address is unique, so it needs no duplicate address detection; and it must add no route to the main table.
            let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
            request.message_mut().attributes.push(AddressAttribute::Flags(flags));
        }
        match request.execute().await {
            Ok(()) => Ok(true),
            Err(error) if address.is_ipv6() && is_without_ip6(&kernel_error(&error)) => Ok(false),
            Err(error) => Err(refused(&format!("add {address} to"), &self.name, &error)),
        }
    }

    /// Removes every other address from the netdev.
    pub async fn keep_only(&self, kept: &[IpAddr]) -> Result<(), Error> {
        let refused = |error| refused("change the addresses of", &self.name, &error);
        let addresses = self.handle.address().get().set_link_index_filter(self.index).execute();
        for message in addresses.try_collect::<Vec<_>>().await.map_err(refused)? {
            let Some(address) = address_of(&message).filter(|address| !kept.contains(address)) else {
                continue;
            };
            self.handle.address().del(message).execute().await.map_err(refused)?;
            info!(netdev = self.name, %address, "removed an address");
        }
        Ok(())
    }
}

/// The address, unless it is the link-local one that the kernel gives every netdev with IPv6.
fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    address.filter(|address| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()))
}

async fn find(handle: &Handle, name: &str) -> Option<LinkMessage> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    links.try_next().await.ok().flatten()
}

/// Whether podgate's netdev exists.
pub async fn exists(name: &str) -> Result<bool, Error> {
    Ok(find(&connect()?, name).await.is_some_and(|netdev| is_own(&netdev)))
}

/// Removes podgate's netdev with its addresses. What is absent or not podgate's is left alone.
pub async fn remove(name: &str) -> Result<(), Error> {
    let handle = connect()?;
    let Some(netdev) = find(&handle, name).await.filter(is_own) else { return Ok(()) };
    let removed = handle.link().del(netdev.header.index).execute().await;
    removed.map_err(|error| refused("remove", name, &error))
}

fn connect() -> Result<Handle, Error> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
    tokio::spawn(connection);
    Ok(handle)
}

fn is_own(netdev: &LinkMessage) -> bool {
    netdev
        .attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::IfAlias(alias) if alias == ALIAS))
}

/// A dummy netdev, or where the kernel has none, a bridge without ports, which serves as well.
async fn create(handle: &Handle, name: &str) -> Result<u32, Error> {
    let refused = |error: &NetlinkError| refused("set up", name, error);
    let created = handle.link().add(LinkDummy::new(name).build()).execute().await;
    if let Err(error) = created {
        if kernel_error(&error).raw_os_error() != Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) {
            return Err(refused(&error));
        }
        debug!("this kernel has no dummy interfaces: creating a bridge instead");
        handle.link().add(LinkBridge::new(name).build()).execute().await.map_err(|error| refused(&error))?;
    }
    let found = find(handle, name).await;
    let index = found.ok_or_else(|| refused(&NetlinkError::RequestFailed))?.header.index;
    let up = LinkUnspec::new_with_index(index).alias(ALIAS).up().build();
    handle.link().set(up).execute().await.map_err(|error| refused(&error))?;
    Ok(index)
}

fn refused(action: &str, netdev: &str, error: &NetlinkError) -> Error {
    Error::Netlink { action: action.to_owned(), netdev: netdev.to_owned(), source: kernel_error(error) }
}

fn kernel_error(error: &NetlinkError) -> io::Error {
    match error {
        NetlinkError::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

/// With the sysctl `disable_ipv6` the kernel answers `EACCES`; a kernel without IPv6 does not know the family.
fn is_without_ip6(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errnos = [Errno::ACCESS, Errno::AFNOSUPPORT, Errno::OPNOTSUPP, Errno::ADDRNOTAVAIL];
    errnos.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}
