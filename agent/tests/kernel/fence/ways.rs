//! Ways from a pod to IMDS that a node has only with some networks: each leads there without the fence, and not with it.

use std::{io, os::fd::AsRawFd as _};

use agent_common::{
    net::{IMDS_V4, IMDS_V6},
    policy::{IMDS_AUDIT, IMDS_DENY, POD_IDENTITY_ON, PodPolicy},
};
use rtnetlink::{
    LinkBridge, LinkIpVlan, LinkMacVlan, LinkUnspec,
    packet_route::link::{IpVlanMode, LinkMessage, MacVlanMode},
};

use super::{
    DATAGRAMS, WAYS, Way, detach, fence,
    ipvs::{self, Ipvs},
    load_rules,
    network::{
        Imds, NetworkPod, UPLINK, add_address, datagram, index, is_answered, remove_address, route_v4,
        route_v6, up,
    },
    redirect::{self, Redirect},
    remove_netdevs, say, try_ways, without_the_egress_filter,
};
use crate::kernel_node::{LO, Node, in_network, netlink};

/// How a netdev shares the node's uplink.
type Sharing = (&'static str, fn(u32) -> LinkMessage);

const SHARED: &str = "shared";
const SHARINGS: [Sharing; 3] = [
    ("macvlan", |uplink| LinkMacVlan::new(SHARED, uplink, MacVlanMode::Bridge).build()),
    ("ipvlan L2", |uplink| LinkIpVlan::new(SHARED, uplink, IpVlanMode::L2).build()),
    ("ipvlan L3", |uplink| LinkIpVlan::new(SHARED, uplink, IpVlanMode::L3).build()),
];

const BALANCED_V4: &str = "10.96.0.78";
const BALANCED_V6: &str = "fd96::78";
const BALANCED: [Way; 2] = [
    ("IPVS over IPv4", |_, pod, patience| pod.run(|| is_answered("10.96.0.78:80", patience))),
    ("IPVS over IPv6", |_, pod, patience| pod.run(|| is_answered("[fd96::78]:80", patience))),
];

/// The first is translated on its way.
const REDIRECTED: [Way; 2] = [
    ("a redirected datagram to a Service", |imds, pod, patience| {
        imds.gets(patience, |mark| pod.run(|| datagram(redirect::SERVICE.into(), mark)))
    }),
    DATAGRAMS[1],
];
/// Drops pods' packets to IMDS wherever a packet filter sees what a node forwards.
const BLOCK: &str = "
table inet fence_block {
  chain pre { type filter hook prerouting priority 0; ip daddr 169.254.169.254 drop; ip6 daddr fd00:ec2::254 drop; }
  chain forward { type filter hook forward priority 0; ip daddr 169.254.169.254 drop; ip6 daddr fd00:ec2::254 drop; }
  chain out { type filter hook output priority 0; ip daddr 169.254.169.254 drop; ip6 daddr fd00:ec2::254 drop; }
  chain post { type filter hook postrouting priority 0; ip daddr 169.254.169.254 drop; ip6 daddr fd00:ec2::254 drop; }
}";

/// All `ways` lead a strict pod to IMDS without the fence, none with it, and all in audit.
fn only_the_fence_stops(node: &mut Node, imds: &Imds, pod: &NetworkPod, ways: &[Way], case: &str) {
    set_imds(node, pod, IMDS_DENY);
    try_ways(ways, imds, pod, true, &format!("{case}, without the fence"));
    fence(node, &[pod]);
    try_ways(ways, imds, pod, false, &format!("{case}, with the fence"));
    set_imds(node, pod, IMDS_AUDIT);
    try_ways(ways, imds, pod, true, &format!("{case}, in audit"));
}

fn set_imds(node: &mut Node, pod: &NetworkPod, imds: u32) {
    let policy = PodPolicy { imds, pod_identity: POD_IDENTITY_ON };
    node.interceptor.set_policy(pod.pod.cgroup.id, policy).unwrap();
}

/// As before [`fence`].
fn without_the_fence(node: &mut Node) {
    detach(node);
    node.reload(|settings| settings.egress_filter = false);
}

#[test]
fn a_netdev_that_shares_the_nodes_is_known_by_the_pods_socket() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        for (kind, sharing) in SHARINGS {
            let pod = NetworkPod::create(node, 0, IMDS_DENY);
            match share_the_uplink(&pod, sharing) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    say(&format!("skipped, as this kernel has none: {kind}"));
                }
                shared => {
                    shared.unwrap();
                    only_the_fence_stops(node, &imds, &pod, &DATAGRAMS, kind);
                    // At once: the uplink cannot be shared in two ways.
                    in_network(&pod.network, || {
                        netlink(async |handle| {
                            let shared = index(&handle, SHARED).await?;
                            handle.link().del(shared).execute().await
                        });
                    });
                }
            }
            remove_netdevs(&[pod.netdev]);
            without_the_fence(node);
        }
    });
}

/// Gives a pod a netdev that shares the node's uplink, and its routes to IMDS.
fn share_the_uplink(pod: &NetworkPod, sharing: fn(u32) -> LinkMessage) -> io::Result<()> {
    let added = netlink(async |handle| {
        let uplink = index(&handle, UPLINK).await?;
        match handle.link().add(sharing(uplink)).execute().await {
            Err(rtnetlink::Error::NetlinkError(error)) => return Ok(Err(error.to_io())),
            added => added?,
        }
        let pods = LinkUnspec::new_with_name(SHARED).setns_by_fd(pod.network.as_raw_fd());
        handle.link().set(pods.build()).execute().await.map(Ok)
    });
    added?;
    in_network(&pod.network, || {
        netlink(async |handle| {
            let shared = index(&handle, SHARED).await?;
            up(&handle, shared).await?;
            add_address(&handle, shared, "192.168.7.9", 24).await?;
            add_address(&handle, shared, "fd77::9", 64).await?;
            handle.route().add(route_v4("169.254.169.254", 32, "192.168.7.1")).execute().await?;
            handle.route().add(route_v6("fd00:ec2::254", 128, "fd77::1")).execute().await
        });
    });
    Ok(())
}

#[test]
fn a_pod_behind_a_bridge_follows_unknown_pods() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        let pod = NetworkPod::create(node, 0, IMDS_DENY);
        let behind = put_behind_a_bridge(&pod);
        // Its own netdev leads to no pod; what the pod does on the host's network never came in by it.
        let ways: Vec<_> = WAYS.into_iter().filter(|(way, _)| *way != "the host's network").collect();
        try_ways(&ways, &imds, &pod, true, "without the fence");
        fence(node, &[&pod]);
        let strict = PodPolicy { imds: IMDS_DENY, pod_identity: POD_IDENTITY_ON };
        for (unknown, arrives) in [(strict, false), (PodPolicy::EXEMPT, true)] {
            node.interceptor.set_unknown_pods(unknown, PodPolicy::EXEMPT).unwrap();
            for imds_mode in [IMDS_DENY, IMDS_AUDIT] {
                set_imds(node, &pod, imds_mode);
                try_ways(&ways, &imds, &pod, arrives, &format!("mode {imds_mode}, {unknown:?}"));
            }
        }
        remove_netdevs(&[behind]);
    });
}

/// Puts a bridge between a pod's netdev and the node; the bridge's index.
fn put_behind_a_bridge(pod: &NetworkPod) -> u32 {
    netlink(async |handle| {
        // A bridge has the hardware address of its only netdev.
        handle.link().add(LinkBridge::new("bridge").build()).execute().await?;
        let bridge = index(&handle, "bridge").await?;
        let port = LinkUnspec::new_with_index(pod.netdev).controller(bridge);
        handle.link().set(port.build()).execute().await?;
        up(&handle, bridge).await?;
        for (ip, prefix) in pod.gateways() {
            remove_address(&handle, ip.parse().unwrap()).await?;
            add_address(&handle, bridge, &ip, prefix).await?;
        }
        Ok(bridge)
    })
}

#[test]
fn what_another_program_redirects_to_the_uplink_is_stopped_there() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        load_rules(BLOCK);
        for (kind, redirect) in [("redirect", Redirect::Frame), ("redirect_neigh", Redirect::Packet)] {
            let pod = NetworkPod::create(node, 0, IMDS_DENY);
            try_ways(&REDIRECTED, &imds, &pod, false, "the packet filter sees all that is forwarded");
            redirect::attach(node.bpffs(), &pod.name(), redirect);
            only_the_fence_stops(node, &imds, &pod, &REDIRECTED, kind);
            remove_netdevs(&[pod.netdev]);
            without_the_fence(node);
        }
    });
}

#[test]
fn what_ipvs_sends_on_is_stopped_at_the_uplink() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        let ipvs = match Ipvs::find() {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                say("skipped, as this kernel has none: IPVS");
                return;
            }
            found => found.unwrap(),
        };
        ipvs::track_connections();
        for (service, real, prefix) in [(BALANCED_V4, IMDS_V4.into(), 32), (BALANCED_V6, IMDS_V6.into(), 128)]
        {
            // As kube-proxy does, or the packets are not for the node.
            netlink(async |handle| add_address(&handle, LO, service, prefix).await);
            ipvs.balance(service.parse().unwrap(), real, 80).unwrap();
        }
        let pod = NetworkPod::create(node, 0, IMDS_DENY);
        only_the_fence_stops(node, &imds, &pod, &BALANCED, "IPVS");
    });
}
