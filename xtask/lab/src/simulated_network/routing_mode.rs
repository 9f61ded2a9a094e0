//! The ways in which a lab's node can route its pods.
//!
//! Owns what sets each apart from the VPC CNI's usual way, which is `wiring`'s.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Context as _;
use clap::ValueEnum;
use rtnetlink::{
    Handle, LinkBridge,
    packet_route::{
        AddressFamily,
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};

use super::{
    NetNs,
    netlink::{MAIN, add_default_route, add_host_route, add_neighbor, netdev_index},
};

/// The node's way out.
pub(super) const UPLINK: &str = "eth0";

/// How the node routes its pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Routing {
    /// As the Amazon VPC CNI does.
    #[default]
    VpcCni,
    /// As the Amazon VPC CNI does in the strict mode of security groups for pods: what comes from a pod goes
    /// by a table of the pod's own, asked before the local table, to the VPC. The main table does not know the
    /// way to the pod either.
    StrictSecurityGroups,
    /// Pods have IPv6 addresses only, as in an IPv6 cluster.
    Ipv6Only,
    /// A network policy: pods may send to podgate's target, port 80, and nowhere else.
    DefaultDenyEgress,
    /// A hardened node: its own ports are closed to pods but for podgate's target, port 80.
    DroppingInput,
}

/// The table of the node's pods with index `i` is `POD_TABLES + i`, as the VPC CNI's is 100 and the VLAN.
const POD_TABLES: u32 = 100;
/// `RT_TABLE_LOCAL` of `include/uapi/linux/rtnetlink.h`.
const LOCAL: u32 = 255;
/// Preferences of the VPC CNI's rules: those of pods with security groups, and the local table's after them.
const POD_PREFERENCE: u32 = 10;
const LOCAL_PREFERENCE: u32 = 20;
/// The VPC's router in the node's subnets; nothing answers there.
const VPC_ROUTER: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 10, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2))];
const VPC_ROUTER_MAC: [u8; 6] = [0x02, 0, 0, 0xff, 0xff, 1];

/// What users of the EKS Pod Identity Agent allow in their policies; neighbor discovery is part of any.
const DEFAULT_DENY_EGRESS: &str = "
table inet pods {
    chain from_pod {
        ct state established,related accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
        drop
    }
    chain input {
        type filter hook input priority filter; policy accept;
        iifname \"eni*\" jump from_pod
    }
    chain forward {
        type filter hook forward priority filter; policy accept;
        iifname \"eni*\" jump from_pod
    }
}
";
const DROPPING_INPUT: &str = "
table inet hardened {
    chain input {
        type filter hook input priority filter; policy drop;
        iifname lo accept
        ct state established,related accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    }
}
";

// === impl Routing ===

impl Routing {
    /// What the names of pods' netdevs on the node begin with.
    pub(super) fn netdev_prefix(self) -> &'static str {
        if self == Self::StrictSecurityGroups { "vlan" } else { "eni" }
    }

    /// Does to the node what is done before there are pods.
    pub(super) fn prepare(self, node: &NetNs) -> anyhow::Result<()> {
        match self {
            Self::VpcCni | Self::Ipv6Only => Ok(()),
            Self::StrictSecurityGroups => node.netlink(async |handle| {
                route_to_vpc(&handle, UPLINK, MAIN).await?;
                for family in [AddressFamily::Inet, AddressFamily::Inet6] {
                    add_rule(&handle, rule(family, LOCAL, LOCAL_PREFERENCE, None)).await?;
                    let first = rule(family, LOCAL, 0, None);
                    let removed = handle.rule().del(first).execute().await;
                    removed.context("cannot remove the local table's first rule")?;
                }
                Ok(())
            }),
            Self::DefaultDenyEgress => node.load_rules(DEFAULT_DENY_EGRESS),
            Self::DroppingInput => node.load_rules(DROPPING_INPUT),
        }
    }

    /// Routes to the `index`th pod, behind `netdev` called `name`, and from it.
    pub(super) async fn route_pod(
        self,
        handle: &Handle,
        (netdev, name): (u32, &str),
        index: u16,
        addresses: &[IpAddr],
    ) -> anyhow::Result<()> {
        if self != Self::StrictSecurityGroups {
            for &address in addresses {
                add_host_route(handle, netdev, address, MAIN).await?;
            }
            return Ok(());
        }
        let table = POD_TABLES + u32::from(index);
        // The pod's own way to the VPC; its packets are dropped there, as link-local ones are.
        let uplink = format!("vlan.eth.{index}");
        // A bridge without ports: what is sent is lost.
        let made = handle.link().add(LinkBridge::new(&uplink).build()).execute().await;
        made.with_context(|| format!("cannot make the netdev {uplink}"))?;
        route_to_vpc(handle, &uplink, table).await?;
        for &address in addresses {
            add_host_route(handle, netdev, address, table).await?;
            let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            for from in [uplink.as_str(), name] {
                add_rule(handle, rule(family, table, POD_PREFERENCE, Some(from))).await?;
            }
        }
        Ok(())
    }
}

/// Makes the default routes by a netdev to the VPC.
async fn route_to_vpc(handle: &Handle, name: &str, table: u32) -> anyhow::Result<()> {
    let netdev = netdev_index(handle, name).await?;
    for router in VPC_ROUTER {
        add_neighbor(handle, netdev, router, VPC_ROUTER_MAC).await?;
        add_host_route(handle, netdev, router, table).await?;
        add_default_route(handle, netdev, router, table).await?;
    }
    Ok(())
}

fn rule(family: AddressFamily, table: u32, preference: u32, from: Option<&str>) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = family;
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![RuleAttribute::Table(table), RuleAttribute::Priority(preference)];
    rule.attributes.extend(from.map(|netdev| RuleAttribute::Iifname(netdev.to_owned())));
    rule
}

async fn add_rule(handle: &Handle, rule: RuleMessage) -> anyhow::Result<()> {
    let mut request = handle.rule().add();
    *request.message_mut() = rule;
    request.execute().await.context("cannot add a routing rule")
}
