//! The node's netdevs: which there are, what lies behind them, and what filters packets that leave by them.
//!
//! Owns the netlink requests for that and changes nothing; never decides what a netdev is to podgate.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd},
};

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Error as NetlinkError, Handle, MulticastGroup, new_multicast_connection,
    packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage},
        nsid::{NsidAttribute, NsidMessage},
        tc::{TcAttribute, TcFilterBpfOption, TcMessage, TcOption},
    },
};
use tokio::task::JoinHandle;

use super::{Error, kernel_error};

/// Reads the node's netdevs for as long as it lives.
#[derive(Debug)]
pub struct Inventory {
    handle: Handle,
    connection: JoinHandle<()>,
}

/// A netdev of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeNetdev {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is `lo`.
    pub is_loopback: bool,
    /// Whether its packets have an Ethernet header.
    pub has_ethernet: bool,
    /// The number of the network that its other end is in, if that is another one than the node's. The kernel says so of the
    /// node's end of a veth, whatever is done in the other network.
    pub peer_network: Option<i32>,
}

/// A tc filter on what leaves by a netdev.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EgressFilter {
    /// Its preference: the least comes first.
    pub preference: u16,
    /// Its handle.
    pub handle: u32,
    /// The program, if it is one.
    pub program_id: Option<u32>,
}

// === impl Inventory ===

impl Inventory {
    /// Opens a netlink socket, and with it a stream that has something whenever netdevs may have changed.
    pub fn open() -> Result<(Self, impl Stream<Item = ()> + Send + Unpin + use<>), Error> {
        let (connection, handle, notifications) =
            new_multicast_connection(&[MulticastGroup::Link]).map_err(Error::Socket)?;
        let connection = tokio::spawn(connection);
        Ok((Self { handle, connection }, notifications.map(drop)))
    }

    /// Every netdev.
    pub async fn netdevs(&self) -> Result<Vec<NodeNetdev>, Error> {
        let links = self.handle.link().get().execute();
        let links: Vec<_> = links.try_collect().await.map_err(|error| refused("list", "all", &error))?;
        Ok(links.iter().filter_map(NodeNetdev::read).collect())
    }

    /// The number by which netdevs name a network namespace, if one has been given: by [`netdevs`](Self::netdevs) to those
    /// that the peers of netdevs are in. Linux 4.0,
    /// <https://github.com/torvalds/linux/commit/0c7aecd4bde4b7302cd41986d3a29e4f0b0ed218>
    pub async fn network_id(&self, namespace: BorrowedFd<'_>) -> io::Result<Option<i32>> {
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Fd(namespace.as_raw_fd().cast_unsigned()));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(message));
        request.header.flags = NLM_F_REQUEST;
        let mut answers = self.handle.clone().request(request).map_err(io::Error::other)?;
        match answers.next().await.map(|answer| answer.payload) {
            Some(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(answer))) => {
                let id = answer.attributes.iter().find_map(|attribute| match attribute {
                    NsidAttribute::Id(id) => Some(*id),
                    _ => None,
                });
                Ok(id.filter(|id| *id >= 0))
            }
            Some(NetlinkPayload::Error(error)) => Err(error.to_io()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// The filters on what leaves by a netdev, in the order in which they see it. None where the kernel has no clsact, or the
    /// netdev is gone.
    pub async fn filters(&self, netdev: u32) -> Vec<EgressFilter> {
        let Ok(index) = i32::try_from(netdev) else { return Vec::new() };
        let filters = self.handle.traffic_filter(index).get().egress().execute();
        let filters: Vec<TcMessage> =
            filters.filter_map(|filter| futures::future::ready(filter.ok())).collect().await;
        filters.iter().filter_map(EgressFilter::read).collect()
    }
}

impl Drop for Inventory {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

// === impl NodeNetdev ===

impl NodeNetdev {
    fn read(link: &LinkMessage) -> Option<Self> {
        let mut name = None;
        let mut peer_network = None;
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(found) => name = Some(found.clone()),
                LinkAttribute::LinkNetNsId(id) => peer_network = Some(*id),
                _ => {}
            }
        }
        Some(Self {
            index: link.header.index,
            name: name?,
            is_loopback: link.header.flags.contains(LinkFlags::Loopback),
            has_ethernet: link.header.link_layer_type == LinkLayerType::Ether,
            peer_network,
        })
    }
}

// === impl EgressFilter ===

impl EgressFilter {
    /// `None` for what the kernel says of all filters of one preference, which have no handle.
    fn read(filter: &TcMessage) -> Option<Self> {
        let handle = u32::from(filter.header.handle);
        let options = filter.attributes.iter().find_map(|attribute| match attribute {
            TcAttribute::Options(options) => Some(options),
            _ => None,
        });
        let program_id = options.into_iter().flatten().find_map(|option| match option {
            TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
            _ => None,
        });
        let preference = u16::try_from(filter.header.info >> 16).ok()?;
        (handle != 0).then_some(Self { preference, handle, program_id })
    }
}

fn refused(action: &str, netdev: &str, error: &NetlinkError) -> Error {
    Error::Netlink { action: action.to_owned(), netdev: netdev.to_owned(), source: kernel_error(error) }
}
