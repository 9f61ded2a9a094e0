//! Netdevs, addresses and routes of the node and its pods, as the Amazon VPC CNI lays them out: a pod has a /32
//! and reaches everything through 169.254.1.1, the node has one route back per pod, and ARP is never used.
//!
//! Owns what is inside the lab's own namespaces; never touches the host's network.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _},
};

use anyhow::Context as _;
use rtnetlink::{LinkUnspec, LinkVeth};
use serde::{Deserialize, Serialize};

use super::{
    NetNs, Routing,
    netlink::{MAIN, add_address, add_default_route, add_host_route, add_neighbor, bring_up, netdev_index},
    routing_mode::UPLINK,
};

/// The other end of the node's way out.
const VPC: &str = "vpc0";
const NODE_MAC: [u8; 6] = [0x02, 0, 0, 0xff, 0xff, 2];
const IMDS_MAC: [u8; 6] = [0x02, 0, 0, 0xff, 0xff, 3];
/// Where the simulated instance metadata service listens.
const IMDS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];
/// A pod's gateway: the VPC CNI's.
pub(super) const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// A pod's gateway: the VPC CNI's.
pub(super) const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// `lo` is always the first netdev of a namespace.
const LO: u32 = 1;

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

/// Gives the node its uplink with the node's addresses, behind which the simulated metadata service is and nothing else,
/// and what the routing of its pods wants.
pub(crate) fn wire_node(node: &NetNs, imds: &NetNs, routing: Routing) -> anyhow::Result<()> {
    let NodeAddresses { v4, v6 } = node_addresses();
    let node_addresses = [IpAddr::V4(v4), v6.into()];
    connect((imds, VPC, IMDS_MAC), (node, UPLINK, NODE_MAC))?;
    node.netlink(async |handle| {
        bring_up(&handle, LO).await?;
        let uplink = netdev_index(&handle, UPLINK).await?;
        for address in node_addresses {
            add_address(&handle, uplink, address).await?;
        }
        bring_up(&handle, uplink).await?;
        for address in IMDS {
            add_neighbor(&handle, uplink, address, IMDS_MAC).await?;
            add_host_route(&handle, uplink, address, MAIN).await?;
        }
        Ok(())
    })?;
    // EC2 knows which instance an address of the VPC is at, that of a pod too.
    imds.netlink(async |handle| {
        let vpc = netdev_index(&handle, VPC).await?;
        for address in IMDS {
            add_address(&handle, vpc, address).await?;
        }
        bring_up(&handle, vpc).await?;
        for address in node_addresses {
            add_neighbor(&handle, vpc, address, NODE_MAC).await?;
            add_default_route(&handle, vpc, address, MAIN).await?;
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
    let node_netdev = format!("{}{index:08x}", routing.netdev_prefix());
    let [high, low] = index.to_be_bytes();
    let node_mac = [0x02, 0, 0, high, low, 1];
    let pod_mac = [0x02, 0, 0, high, low, 2];

    connect((pod, "eth0", pod_mac), (node, &node_netdev, node_mac))?;
    node.netlink(async |handle| {
        let netdev = netdev_index(&handle, &node_netdev).await?;
        bring_up(&handle, netdev).await?;
        for &address in &addresses {
            add_neighbor(&handle, netdev, address, pod_mac).await?;
        }
        routing.route_pod(&handle, (netdev, &node_netdev), index, &addresses).await
    })?;
    pod.netlink(async |handle| {
        let eth0 = netdev_index(&handle, "eth0").await?;
        for &address in &addresses {
            add_address(&handle, eth0, address).await?;
        }
        bring_up(&handle, eth0).await?;
        for address in &addresses {
            let gateway = if address.is_ipv4() { GATEWAY_V4.into() } else { GATEWAY_V6.into() };
            add_neighbor(&handle, eth0, gateway, node_mac).await?;
            add_default_route(&handle, eth0, gateway, MAIN).await?;
        }
        Ok(())
    })
}

/// Connects a new namespace to the node's by a veth pair, whose ends are these netdevs.
fn connect(other: (&NetNs, &str, [u8; 6]), node: (&NetNs, &str, [u8; 6])) -> anyhow::Result<()> {
    let ((other, other_netdev, other_mac), (node, node_netdev, node_mac)) = (other, node);
    // Made in the new namespace, so that the names are free.
    other.netlink(async |handle| {
        bring_up(&handle, LO).await?;
        let pair = LinkVeth::new(other_netdev, node_netdev).address(other_mac.to_vec()).build();
        handle.link().add(pair).execute().await.context("cannot create the veth pair")?;
        let end = LinkUnspec::new_with_name(node_netdev)
            .address(node_mac.to_vec())
            .setns_by_fd(node.as_fd().as_raw_fd())
            .build();
        handle.link().set(end).execute().await.context("cannot move the veth's end to the node")
    })
}
