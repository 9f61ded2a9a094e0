//! podgate's own network link, the addresses on it that it listens at, and the rules by which every pod reaches them.
//!
//! Owns these and nothing else of the node's network; adds no route to the main table: the local table is enough,
//! and the EKS Pod Identity Agent refuses to start where it finds such a route.

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

mod rules;

use self::rules::Rules;

/// Marks a link as podgate's (`ip link` shows it as `alias`).
const ALIAS: &str = "podgate: addresses that pods' dials to credential endpoints are sent to";

/// The link and what belongs to it. The rules are kept right as long as this lives.
#[derive(Debug)]
pub struct Link {
    handle: Handle,
    name: String,
    index: u32,
    rules: Rules,
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
    /// The kernel refused to show or change the rules of its routing.
    #[error(
        "cannot make the `ip rule`s by which pods with security groups of their own reach podgate: {source}; the \
         agent needs CAP_NET_ADMIN on the host's network"
    )]
    Rules {
        /// The kernel's word.
        source: io::Error,
    },
    /// A link of that name is there, and another's.
    #[error("the network link {link} exists and is not podgate's: choose another name with --netdev")]
    Taken {
        /// The link.
        link: String,
    },
}

// === impl Link ===

impl Link {
    /// Makes the link. One that a predecessor has made is taken with what is on it: that agent may still serve
    /// there. A link that is not podgate's is not touched.
    ///
    /// The link stays when this is dropped; [`remove`] removes it.
    pub async fn up(name: &str) -> Result<Self, Error> {
        let handle = connect()?;
        let index = match find(&handle, name).await {
            Some(existing) if is_own(&existing) => existing.header.index,
            Some(_) => return Err(Error::Taken { link: name.to_owned() }),
            None => create(&handle, name).await?,
        };
        let rules = Rules::follow(handle.clone());
        Ok(Self { handle, name: name.to_owned(), index, rules })
    }

    /// Gives the link an address, if it does not have it, and sees to it that pods reach it. `false` when the node cannot
    /// have it: IPv6 is switched off.
    pub async fn add(&self, address: IpAddr) -> Result<bool, Error> {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        let mut request = self.handle.address().add(self.index, address, prefix).replace();
        if address.is_ipv6() {
            // Nobody else has the address: it is good at once. And no route for it in the main table.
            let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
            request.message_mut().attributes.push(AddressAttribute::Flags(flags));
        }
        match request.execute().await {
            Ok(()) => {}
            Err(error) if address.is_ipv6() && is_without_ip6(&kernel_error(&error)) => return Ok(false),
            Err(error) => return Err(refused(&format!("put {address}"), &self.name, &error)),
        }
        self.rules.add(address).await?;
        Ok(true)
    }

    /// Removes every other address from the link, with its rules.
    pub async fn keep_only(&self, kept: &[IpAddr]) -> Result<(), Error> {
        self.rules.keep_only(kept).await?;
        let refused = |error| refused("change the addresses", &self.name, &error);
        let addresses = self.handle.address().get().set_link_index_filter(self.index).execute();
        for message in addresses.try_collect::<Vec<_>>().await.map_err(refused)? {
            let Some(address) = address_of(&message).filter(|address| !kept.contains(address)) else {
                continue;
            };
            self.handle.address().del(message).execute().await.map_err(refused)?;
            info!(link = self.name, %address, "an address is down");
        }
        Ok(())
    }

    /// Keeps the rules right no longer; removes them, where podgate `is_detached` from the node. The link stays.
    pub async fn leave(self, is_detached: bool) -> Result<(), Error> {
        self.rules.end().await;
        if is_detached { rules::remove_all(&self.handle).await } else { Ok(()) }
    }
}

/// The address, unless it is the one that the kernel gives every link with IPv6.
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

/// What podgate has of the node's network: the name of its link, if there is one, and its rules, for people.
pub async fn find_all(name: &str) -> Result<(Option<String>, Vec<String>), Error> {
    let handle = connect()?;
    let link = find(&handle, name).await.filter(is_own).map(|_| name.to_owned());
    Ok((link, rules::all(&handle).await?.iter().map(ToString::to_string).collect()))
}

/// Removes podgate's rules, and its link with the addresses on it. What is not there, or not podgate's, is left alone.
pub async fn remove(name: &str) -> Result<(), Error> {
    let handle = connect()?;
    rules::remove_all(&handle).await?;
    let Some(link) = find(&handle, name).await.filter(is_own) else { return Ok(()) };
    let removed = handle.link().del(link.header.index).execute().await;
    removed.map_err(|error| refused("remove the link", name, &error))
}

fn connect() -> Result<Handle, Error> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::Socket)?;
    tokio::spawn(connection);
    Ok(handle)
}

fn is_own(link: &LinkMessage) -> bool {
    link.attributes
        .iter()
        .any(|attribute| matches!(attribute, LinkAttribute::IfAlias(alias) if alias == ALIAS))
}

/// A dummy link; a bridge without ports, which serves as well, where the kernel has no dummy.
async fn create(handle: &Handle, name: &str) -> Result<u32, Error> {
    let refused = |error: &NetlinkError| refused("make the link", name, error);
    let made = handle.link().add(LinkDummy::new(name).build()).execute().await;
    if let Err(error) = made {
        if kernel_error(&error).raw_os_error() != Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) {
            return Err(refused(&error));
        }
        debug!("this kernel has no dummy links: making a bridge instead");
        handle.link().add(LinkBridge::new(name).build()).execute().await.map_err(|error| refused(&error))?;
    }
    let created = find(handle, name).await;
    let index = created.ok_or_else(|| refused(&NetlinkError::RequestFailed))?.header.index;
    let up = LinkUnspec::new_with_index(index).alias(ALIAS).up().build();
    handle.link().set(up).execute().await.map_err(|error| refused(&error))?;
    Ok(index)
}

fn refused(action: &str, link: &str, error: &NetlinkError) -> Error {
    Error::Netlink { action: action.to_owned(), link: link.to_owned(), source: kernel_error(error) }
}

fn kernel_error(error: &NetlinkError) -> io::Error {
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
