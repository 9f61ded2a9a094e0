//! What attackers do to pods' networks: with `CAP_NET_ADMIN` to their own, and by the mistakes of a network plugin.
//!
//! Owns changes inside of the lab's namespaces, once they are wired.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Context as _;
use futures::TryStreamExt as _;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        address::AddressAttribute,
        neighbour::{NeighbourAddress, NeighbourAttribute},
        route::{RouteProtocol, RouteScope, RouteType},
    },
};

use super::{
    NetNs,
    netlink::{add_address, host_prefix, netdev_index},
    wiring::{GATEWAY_V4, GATEWAY_V6},
};

/// `RT_TABLE_LOCAL` of `include/uapi/linux/rtnetlink.h`.
const LOCAL: u32 = 255;
/// An address that no netdev has: what is sent to it is lost.
const UNUSED_MAC: [u8; 6] = [0x02, 0, 0, 0xff, 0xff, 0xff];

impl NetNs {
    /// From now on everything that the pod sends is lost without an error.
    pub fn mute(&self) -> anyhow::Result<()> {
        self.netlink(async |handle| {
            let eth0 = netdev_index(&handle, "eth0").await?;
            for gateway in [GATEWAY_V4.into(), GATEWAY_V6.into()] {
                let gateway = handle.neighbours().add(eth0, gateway).link_layer_address(&UNUSED_MAC);
                gateway.replace().execute().await.context("cannot give the gateway another address")?;
            }
            Ok(())
        })
    }

    /// Gives a pod another address in the place of its own.
    pub(crate) fn exchange_address(&self, own: Ipv4Addr, other: Ipv4Addr) -> anyhow::Result<()> {
        self.netlink(async |handle| {
            let eth0 = netdev_index(&handle, "eth0").await?;
            // The new one first: with a netdev's last address its routes go.
            add_address(&handle, eth0, other.into()).await?;
            let mut addresses = handle.address().get().set_link_index_filter(eth0).execute();
            while let Some(address) = addresses.try_next().await.context("cannot list addresses")? {
                if address.attributes.contains(&AddressAttribute::Local(own.into())) {
                    handle.address().del(address).execute().await.context("cannot remove an address")?;
                }
            }
            Ok(())
        })
    }

    /// On the node: what is sent to one pod's address goes to another pod from now on.
    pub(crate) fn reroute(&self, address: Ipv4Addr, to_pod: Ipv4Addr) -> anyhow::Result<()> {
        self.netlink(async |handle| {
            let mut neighbors = handle.neighbours().get().execute();
            let (mut netdev, mut mac) = (0, Vec::new());
            while let Some(neighbor) = neighbors.try_next().await.context("cannot list neighbors")? {
                let is_pod = |attribute: &NeighbourAttribute| {
                    *attribute == NeighbourAttribute::Destination(NeighbourAddress::Inet(to_pod))
                };
                if neighbor.attributes.iter().any(is_pod) {
                    netdev = neighbor.header.ifindex;
                    mac = neighbor.attributes.iter().find_map(link_layer_address).unwrap_or_default();
                }
            }
            let request = handle.neighbours().add(netdev, address.into()).link_layer_address(&mac);
            request.replace().execute().await.context("cannot name the pod's other address")?;
            let route = RouteMessageBuilder::<Ipv4Addr>::new()
                .output_interface(netdev)
                .destination_prefix(address, 32)
                .scope(RouteScope::Link)
                .build();
            let replaced = handle.route().add(route).replace().execute().await;
            replaced.context("cannot route an address to another pod")
        })
    }

    /// From now on the pod's kernel answers nothing that is sent to one of the pod's addresses: whoever listens to the
    /// wire can.
    pub fn deafen(&self, address: IpAddr) -> anyhow::Result<()> {
        self.netlink(async |handle| {
            let eth0 = netdev_index(&handle, "eth0").await?;
            let route = RouteMessageBuilder::<IpAddr>::new()
                .table_id(LOCAL)
                .kind(RouteType::Local)
                .protocol(RouteProtocol::Kernel)
                .scope(RouteScope::Host)
                .output_interface(eth0)
                .destination_prefix(address, host_prefix(address))?
                .build();
            handle.route().del(route).execute().await.context("cannot remove the pod's local route")
        })
    }
}

fn link_layer_address(attribute: &NeighbourAttribute) -> Option<Vec<u8>> {
    match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => Some(mac.clone()),
        _ => None,
    }
}
