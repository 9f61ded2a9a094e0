//! The netdev of the EKS Pod Identity Agent: what its init container makes of the node's network.
//!
//! As `pkg/initalizer/executor.go` of eks-pod-identity-agent 0.1.37 does it. Nothing ever removes the netdev.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, ensure};
use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, LinkBridge, LinkDummy, RouteMessageBuilder,
    packet_route::{
        address::AddressAttribute,
        route::{RouteAddress, RouteAttribute, RouteMessage},
    },
};

use super::{
    NetNs,
    netlink::{MAIN, add_address, bring_up, host_prefix, netdev_index},
};

const NETDEV: &str = "pod-id-link0";
const ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 23)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23)),
];

/// Makes the netdev with its addresses and its routes in the main table, as far as they are missing; an error where such a
/// route leads to another netdev.
pub(crate) fn make_eks_agent_netdev(node: &NetNs) -> anyhow::Result<()> {
    node.netlink(async |handle| {
        if netdev_index(&handle, NETDEV).await.is_err() {
            create(&handle).await?;
        }
        let netdev = netdev_index(&handle, NETDEV).await?;
        let present = addresses(&handle, netdev).await?;
        for address in ADDRESSES.into_iter().filter(|address| !present.contains(address)) {
            add_address(&handle, netdev, address).await?;
        }
        bring_up(&handle, netdev).await?;
        for address in ADDRESSES {
            add_route(&handle, netdev, address).await?;
        }
        Ok(())
    })
}

/// A bridge without ports does as well where the kernel has no dummy.
async fn create(handle: &Handle) -> anyhow::Result<()> {
    if handle.link().add(LinkDummy::new(NETDEV).build()).execute().await.is_err() {
        let bridge = handle.link().add(LinkBridge::new(NETDEV).build()).execute().await;
        bridge.with_context(|| format!("cannot create the netdev {NETDEV}"))?;
    }
    Ok(())
}

async fn addresses(handle: &Handle, netdev: u32) -> anyhow::Result<Vec<IpAddr>> {
    let messages: Vec<_> =
        handle.address().get().set_link_index_filter(netdev).execute().try_collect().await?;
    let attributes = messages.into_iter().flat_map(|message| message.attributes);
    let address = |attribute| match attribute {
        AddressAttribute::Address(address) => Some(address),
        _ => None,
    };
    Ok(attributes.filter_map(address).collect())
}

async fn add_route(handle: &Handle, netdev: u32, address: IpAddr) -> anyhow::Result<()> {
    if let Some(existing) = main_route(handle, address).await? {
        let is_own = existing.attributes.contains(&RouteAttribute::Oif(netdev));
        ensure!(is_own, "expected route {address} to be on {NETDEV}, please remove route and try again");
        return Ok(());
    }
    let route = RouteMessageBuilder::<IpAddr>::new()
        .table_id(MAIN)
        .output_interface(netdev)
        .destination_prefix(address, host_prefix(address))?;
    let added = handle.route().add(route.build()).execute().await;
    added.with_context(|| format!("cannot add the route to {address}"))
}

/// The route of the main table to this very address.
async fn main_route(handle: &Handle, address: IpAddr) -> anyhow::Result<Option<RouteMessage>> {
    let (every, destination) = match address {
        IpAddr::V4(v4) => (RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteAddress::Inet(v4)),
        IpAddr::V6(v6) => (RouteMessageBuilder::<Ipv6Addr>::new().build(), RouteAddress::Inet6(v6)),
    };
    let routes: Vec<_> = handle.route().get(every).execute().try_collect().await?;
    Ok(routes.into_iter().find(|route: &RouteMessage| {
        u32::from(route.header.table) == MAIN
            && route.header.destination_prefix_length == host_prefix(address)
            && route.attributes.contains(&RouteAttribute::Destination(destination.clone()))
    }))
}
