//! Links, addresses and routes of the node and its pods, as the Amazon VPC CNI lays them out: a pod has a /32
//! and reaches everything through 169.254.1.1, the node has one route back per pod, and nobody asks by ARP.
//!
//! Owns what is inside the lab's own namespaces; never touches the host's network.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _},
};

use anyhow::Context as _;
use futures::TryStreamExt as _;
use rtnetlink::{
    Handle, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{address::AddressHeaderFlags, route::RouteScope},
};
use serde::{Deserialize, Serialize};

use super::{NetNs, Routing};

/// Where the simulated instance metadata service listens.
const IMDS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];
/// A pod's gateway: the VPC CNI's.
pub(super) const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// A pod's gateway: the VPC CNI's.
pub(super) const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// `lo` is always the first link of a namespace.
const LO: u32 = 1;
/// `RT_TABLE_MAIN` of `include/uapi/linux/rtnetlink.h`.
pub(super) const MAIN: u32 = 254;

/// A pod's addresses, one of each family that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodAddresses {
    /// In the lab's own 10.10.0.0/16.
    pub v4: Option<Ipv4Addr>,
    /// A unique local address.
    pub v6: Ipv6Addr,
}

/// The node's own addresses, one of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeAddresses {
    /// In the lab's own 10.10.0.0/16.
    pub v4: Ipv4Addr,
    /// A unique local address.
    pub v6: Ipv6Addr,
}

// === impl PodAddresses ===

impl PodAddresses {
    /// The addresses of the node's `index`th pod, counted from 1.
    pub(crate) fn of_pod(index: u16, routing: Routing) -> Self {
        let [high, low] = index.to_be_bytes();
        let v4 = Ipv4Addr::new(10, 10, 128 | high, low);
        Self::new(v4, Ipv6Addr::new(0xfd10, 0, 0, 0, 0, 0, 1, index), routing)
    }

    /// The addresses of a pod on the host's network.
    pub(crate) fn of_host_network(routing: Routing) -> Self {
        let NodeAddresses { v4, v6 } = node_addresses();
        Self::new(v4, v6, routing)
    }

    fn new(v4: Ipv4Addr, v6: Ipv6Addr, routing: Routing) -> Self {
        Self { v4: (routing != Routing::Ipv6Only).then_some(v4), v6 }
    }

    /// All of them, as `status.podIPs` lists them.
    pub fn list(&self) -> Vec<IpAddr> {
        self.v4.map(IpAddr::V4).into_iter().chain([self.v6.into()]).collect()
    }
}

/// The node's own addresses.
pub fn node_addresses() -> NodeAddresses {
    NodeAddresses { v4: Ipv4Addr::new(10, 10, 0, 10), v6: Ipv6Addr::new(0xfd10, 0, 0, 0, 0, 0, 0, 0x10) }
}

/// Brings up the node's `lo` with the node's addresses and those of the simulated metadata service, and what the
/// routing of its pods wants.
pub(crate) fn wire_node(node: &NetNs, routing: Routing) -> anyhow::Result<()> {
    node.netlink(async |handle| {
        link_up(&handle, LO).await?;
        let NodeAddresses { v4, v6 } = node_addresses();
        for address in IMDS.into_iter().chain([v4.into(), v6.into()]) {
            add_address(&handle, LO, address).await?;
        }
        Ok(())
    })?;
    // As on a node with a CNI: pods reach each other through it.
    node.run(|| {
        for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{switch}"), "1")
                .with_context(|| format!("cannot set {switch}"))?;
        }
        Ok(())
    })?;
    routing.prepare(node)
}

/// Connects a pod's new namespace to the node's by a veth pair: `eth0` in the pod, `eniINDEX` or the like on the
/// node.
pub(crate) fn wire_pod(node: &NetNs, pod: &NetNs, index: u16, routing: Routing) -> anyhow::Result<()> {
    let addresses = PodAddresses::of_pod(index, routing).list();
    let node_link = format!("{}{index:08x}", routing.link_prefix());
    let [high, low] = index.to_be_bytes();
    let node_mac = [0x02, 0, 0, high, low, 1];
    let pod_mac = [0x02, 0, 0, high, low, 2];

    // Made in the pod's namespace, so that the name eth0 is free.
    pod.netlink(async |handle| {
        link_up(&handle, LO).await?;
        let pair = LinkVeth::new("eth0", &node_link).address(pod_mac.to_vec()).build();
        handle.link().add(pair).execute().await.context("cannot create the veth pair")?;
        let end = LinkUnspec::new_with_name(&node_link)
            .address(node_mac.to_vec())
            .setns_by_fd(node.as_fd().as_raw_fd())
            .build();
        handle.link().set(end).execute().await.context("cannot move the veth's end to the node")
    })?;
    node.netlink(async |handle| {
        let link = link_index(&handle, &node_link).await?;
        link_up(&handle, link).await?;
        for &address in &addresses {
            add_neighbor(&handle, link, address, pod_mac).await?;
        }
        routing.route_pod(&handle, (link, &node_link), index, &addresses).await
    })?;
    pod.netlink(async |handle| {
        let eth0 = link_index(&handle, "eth0").await?;
        for &address in &addresses {
            add_address(&handle, eth0, address).await?;
        }
        link_up(&handle, eth0).await?;
        for address in &addresses {
            let gateway = if address.is_ipv4() { GATEWAY_V4.into() } else { GATEWAY_V6.into() };
            add_neighbor(&handle, eth0, gateway, node_mac).await?;
            add_default_route(&handle, eth0, gateway, MAIN).await?;
        }
        Ok(())
    })
}

pub(super) async fn link_index(handle: &Handle, name: &str) -> anyhow::Result<u32> {
    let link = handle
        .link()
        .get()
        .match_name(name)
        .execute()
        .try_next()
        .await
        .with_context(|| format!("cannot look up the link {name}"))?
        .with_context(|| format!("there is no link {name}"))?;
    Ok(link.header.index)
}

pub(super) async fn link_up(handle: &Handle, link: u32) -> anyhow::Result<()> {
    let up = LinkUnspec::new_with_index(link).up().build();
    handle.link().set(up).execute().await.with_context(|| format!("cannot bring link {link} up"))
}

/// Adds one address without a subnet, usable at once (no duplicate address detection).
pub(super) async fn add_address(handle: &Handle, link: u32, address: IpAddr) -> anyhow::Result<()> {
    let mut request = handle.address().add(link, address, host_prefix(address));
    request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    request.execute().await.with_context(|| format!("cannot add {address}"))
}

pub(super) async fn add_neighbor(
    handle: &Handle,
    link: u32,
    address: IpAddr,
    mac: [u8; 6],
) -> anyhow::Result<()> {
    handle
        .neighbours()
        .add(link, address)
        .link_layer_address(&mac)
        .execute()
        .await
        .with_context(|| format!("cannot add the neighbor {address}"))
}

/// Routes one address straight onto the link.
pub(super) async fn add_host_route(
    handle: &Handle,
    link: u32,
    address: IpAddr,
    table: u32,
) -> anyhow::Result<()> {
    let route = RouteMessageBuilder::<IpAddr>::new()
        .table_id(table)
        .output_interface(link)
        .destination_prefix(address, host_prefix(address))?
        .scope(RouteScope::Link)
        .build();
    handle.route().add(route).execute().await.with_context(|| format!("cannot add the route to {address}"))
}

/// Routes everything else, as far as `table` goes, by `gateway`, which is in no subnet of the link's: hence `onlink`.
pub(super) async fn add_default_route(
    handle: &Handle,
    link: u32,
    gateway: IpAddr,
    table: u32,
) -> anyhow::Result<()> {
    let everything: IpAddr =
        if gateway.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let route = RouteMessageBuilder::<IpAddr>::new()
        .table_id(table)
        .output_interface(link)
        .destination_prefix(everything, 0)?
        .gateway(gateway)?
        .onlink()
        .build();
    handle.route().add(route).execute().await.with_context(|| format!("cannot add the route by {gateway}"))
}

pub(super) fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}
