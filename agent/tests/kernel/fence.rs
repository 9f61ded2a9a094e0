//! The second fence: a node with pods behind veths, and IMDS beyond its uplink, as on a real one.

mod ipvs;
mod network;
mod redirect;
mod ways;

use std::{
    cell::RefCell,
    fs::{self, File},
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, UdpSocket},
    os::fd::AsRawFd as _,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use agent::{
    control::fence::{self, FenceMetrics},
    identity::sandboxes::Sandboxes,
    intercept::{FENCE_FILTER, Fenced, Interceptor, Netdevs, pinned, remove_filter, unpin},
};
use agent_common::{
    abi::program,
    counter::Counter,
    net::{Endpoint, IMDS_V4, IMDS_V6},
    policy::{IMDS_AUDIT, IMDS_DENY, IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_ON, PodPolicy},
};
use aya::{
    Ebpf,
    programs::{
        LinkOrder, SchedClassifier, TcAttachType,
        tc::{NlOptions, TcAttachOptions, TcHandle, qdisc_add_clsact},
    },
};
use prometheus_client::{encoding::text::encode, registry::Registry};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder, packet_route::route::RouteScope};
use tokio::sync::Notify;

use self::network::{Imds, NetworkPod, POD_UIDS, UPLINK, datagram, is_answered, packet, up};
use crate::{
    egress::{below_ip, packet_socket, pass_by_queues},
    events,
    kernel_node::{Node, in_network, netlink, outside},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/podgate.o"));

/// An address that the node translates into that of IMDS, as it does a Service's.
const SERVICE_V4: &str = "10.96.0.77:80";
const SERVICE_V6: &str = "[fd96::77]:80";
const TRANSLATE: &str = "
table ip fence_test {
  chain pre { type nat hook prerouting priority dstnat; ip daddr 10.96.0.77 tcp dport 80 dnat to 169.254.169.254:80; }
  chain post { type nat hook postrouting priority srcnat; oifname \"uplink\" masquerade; }
}
table ip6 fence_test {
  chain pre { type nat hook prerouting priority dstnat; ip6 daddr fd96::77 tcp dport 80 dnat to [fd00:ec2::254]:80; }
  chain post { type nat hook postrouting priority srcnat; oifname \"uplink\" masquerade; }
}";
/// How long something may take that happens.
const HAPPENS: Duration = Duration::from_secs(5);
/// How long is waited for what must not happen.
const NOTHING: Duration = Duration::from_millis(300);
/// How long the follower may take.
const FOLLOWS: Duration = Duration::from_secs(10);

/// The index of a netdev that moves from one network to another: free in both.
const SECOND: u32 = 777;

/// A way from a pod to IMDS: whether something arrives.
type Way = (&'static str, fn(&Imds, &NetworkPod, Duration) -> bool);

const DATAGRAMS: [Way; 2] = [
    ("a datagram over IPv4", |imds, pod, patience| {
        imds.gets(patience, |mark| pod.run(|| datagram(IMDS_V4.into(), mark)))
    }),
    ("a datagram over IPv6", |imds, pod, patience| {
        imds.gets(patience, |mark| pod.run(|| datagram(IMDS_V6.into(), mark)))
    }),
];
/// With the egress filter off and in a pod that `connect` leaves nothing.
const WAYS: [Way; 7] = [
    ("a Service over IPv4", |_, pod, patience| pod.run(|| is_answered(SERVICE_V4, patience))),
    ("a Service over IPv6", |_, pod, patience| pod.run(|| is_answered(SERVICE_V6, patience))),
    DATAGRAMS[0],
    DATAGRAMS[1],
    ("a packet socket", |imds, pod, patience| {
        let send = |mark| below_ip(&packet_socket(), &packet(pod, mark), pod.eth0, pod.gateway);
        imds.gets(patience, |mark| pod.run(|| send(mark)))
    }),
    ("a packet socket past the queues", |imds, pod, patience| {
        let send = |mark| {
            let socket = packet_socket();
            pass_by_queues(&socket);
            below_ip(&socket, &packet(pod, mark), pod.eth0, pod.gateway);
        };
        imds.gets(patience, |mark| pod.run(|| send(mark)))
    }),
    ("the host's network", |imds, pod, patience| {
        imds.gets(patience, |mark| pod.pod.run(|| datagram(IMDS_V4.into(), mark)))
    }),
];

/// Tries all ways; each leads to IMDS, or none.
fn try_all(imds: &Imds, pod: &NetworkPod, arrives: bool, case: &str) {
    try_ways(&WAYS, imds, pod, arrives, case);
}

fn try_ways(ways: &[Way], imds: &Imds, pod: &NetworkPod, arrives: bool, case: &str) {
    for (way, arrived) in ways {
        let patience = if arrives { HAPPENS } else { NOTHING };
        assert_eq!(arrived(imds, pod, patience), arrives, "{case}: {way}");
    }
}

/// The node itself asks IMDS, over both families.
fn node_gets_through(imds: &Imds) {
    for address in ["169.254.169.254:80", "[fd00:ec2::254]:80"] {
        assert!(outside(|| is_answered(address, HAPPENS)), "the node, {address}");
    }
    let gets = imds.gets(HAPPENS, |mark| outside(|| datagram(IMDS_V4.into(), mark)));
    assert!(gets, "the node, a datagram");
}

/// A node whose egress filter is off, so that the fence is on its own.
fn without_the_egress_filter(node: &mut Node) -> Imds {
    node.reload(|settings| settings.egress_filter = false);
    let imds = Imds::beyond_an_uplink();
    load_rules(TRANSLATE);
    imds
}

/// Gives rules to the node's packet filter.
fn load_rules(rules: &str) {
    let mut nft =
        Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft is missing");
    nft.stdin.take().unwrap().write_all(rules.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success(), "nft");
}

/// Follows the node's netdevs until `is_done`; the netdevs then, and what the metrics say.
fn follow_until(node: &mut Node, mut is_done: impl FnMut(&Netdevs, &Fenced) -> bool) -> (Netdevs, String) {
    let mut registry = Registry::default();
    let metrics = FenceMetrics::register(&mut registry);
    let pods = Sandboxes::new(node.found_kubepods()).unwrap();
    let last = RefCell::new(Netdevs::default());
    let done = Notify::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let set = async |netdevs: Netdevs| {
            let fenced = node.interceptor.set_netdevs(netdevs.clone())?;
            if is_done(&netdevs, fenced.as_ref().expect("it is not active")) {
                last.replace(netdevs);
                done.notify_one();
            }
            Ok(fenced)
        };
        tokio::select! {
            // First: what was found is in the metrics, too.
            biased;
            () = fence::run(pods, metrics, set) => {}
            () = done.notified() => {}
            () = tokio::time::sleep(FOLLOWS) => panic!("the fence does not come to what it should be"),
        }
    });
    let mut text = String::new();
    encode(&mut text, &registry).unwrap();
    (last.into_inner(), text)
}

/// Puts the fence where it belongs, with these pods known.
fn fence(node: &mut Node, pods: &[&NetworkPod]) {
    follow_until(node, |netdevs, fenced| {
        assert!(fenced.open.is_empty(), "{fenced:?}");
        pods.iter().all(|pod| netdevs.pods.get(&pod.netdev) == Some(&pod.pod.cgroup.id))
    });
}

#[test]
fn no_strict_pod_gets_a_packet_to_imds_out_of_the_node() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        for mode in [IMDS_DENY, IMDS_INTERCEPT] {
            let strict = NetworkPod::create(node, 0, mode);
            let audited = NetworkPod::create(node, 1, IMDS_AUDIT);
            try_all(&imds, &strict, true, "without the fence");
            fence(node, &[&strict, &audited]);
            let before = node.count(Counter::FenceDropped);
            try_all(&imds, &strict, false, "with the fence");
            assert!(node.count(Counter::FenceDropped) >= before + 7);
            try_all(&imds, &audited, true, "a pod in audit");
            node_gets_through(&imds);

            // A policy is effective at once, in both directions.
            for (imds_mode, arrives) in [(IMDS_OFF, true), (mode, false)] {
                let policy = PodPolicy { imds: imds_mode, pod_identity: POD_IDENTITY_ON };
                node.interceptor.set_policy(strict.pod.cgroup.id, policy).unwrap();
                try_all(&imds, &strict, arrives, &format!("in mode {imds_mode}"));
            }
            remove_netdevs(&[strict.netdev, audited.netdev]);
            detach(node);
            node.reload(|settings| settings.egress_filter = false);
        }
    });
}

#[test]
fn a_drop_is_told_with_its_pod_and_where_it_goes() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        let strict = NetworkPod::create(node, 0, IMDS_DENY);
        fence(node, &[&strict]);
        let mut events = events::reader(node);
        for (way, port, cgroup) in [
            (0, 80, strict.pod.cgroup.id),
            (1, 80, strict.pod.cgroup.id),
            (2, 53, strict.pod.cgroup.id),
            (3, 53, strict.pod.cgroup.id),
            (4, 53, strict.pod.cgroup.id),
            (5, 53, strict.pod.cgroup.id),
            (6, 53, strict.pod.container.id),
        ] {
            let (name, arrived) = WAYS[way];
            assert!(!arrived(&imds, &strict, NOTHING));
            let told = events::told(&mut events);
            let drops: Vec<_> = told.iter().filter(|(kind, _)| *kind == Counter::FenceDropped).collect();
            assert!(!drops.is_empty(), "{name}: {told:?}");
            for (_, event) in drops {
                assert_eq!((event.cgroup_id, event.pod_cgroup_id), (cgroup, strict.pod.cgroup.id), "{name}");
                let ip: IpAddr = if [1, 3].contains(&way) { IMDS_V6.into() } else { IMDS_V4.into() };
                assert_eq!(event.address, Endpoint::new(ip, port), "{name}");
            }
        }
    });
}

#[test]
fn the_fence_outlives_its_agent_and_goes_with_detach() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        let strict = NetworkPod::create(node, 0, IMDS_DENY);
        let audited = NetworkPod::create(node, 1, IMDS_AUDIT);
        fence(node, &[&strict, &audited]);
        node.set_heartbeat(1);
        try_all(&imds, &strict, false, "the agent hangs");

        let mut settings = node.settings();
        settings.egress_filter = false;
        let successor = Interceptor::load(&settings).unwrap();
        drop(std::mem::replace(&mut node.interceptor, successor));
        try_all(&imds, &strict, false, "the agent is gone");
        try_all(&imds, &audited, true, "the agent is gone, a pod in audit");
        node_gets_through(&imds);

        let deny = PodPolicy { imds: IMDS_DENY, pod_identity: POD_IDENTITY_ON };
        node.interceptor.set_policy(strict.pod.cgroup.id, deny).unwrap();
        node.attach();
        try_all(&imds, &strict, false, "a successor that has not looked yet");
        fence(node, &[&strict]);
        try_all(&imds, &strict, false, "a successor");

        detach(node);
        try_all(&imds, &strict, true, "detached");
    });
}

#[test]
fn an_agent_that_is_not_active_changes_nothing() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        let strict = NetworkPod::create(node, 0, IMDS_DENY);
        fence(node, &[&strict]);
        let mut standby = Interceptor::load(&node.settings()).unwrap();
        assert!(standby.set_netdevs(Netdevs::default()).unwrap().is_none());
        try_all(&imds, &strict, false, "beside one on standby");
    });
}

#[test]
fn a_netdev_that_is_nobodys_follows_unknown_pods() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        // In no pod's cgroup that the agent knows, and without a process by which the network could be found.
        let pod = NetworkPod::behind_a_veth(node.unknown_pod(POD_UIDS[0]), 0);
        fence(node, &[]);
        let loose = PodPolicy::EXEMPT;
        let strict = PodPolicy { imds: IMDS_DENY, pod_identity: POD_IDENTITY_ON };
        for (unknown, arrives) in [(loose, true), (strict, false)] {
            node.interceptor.set_unknown_pods(unknown, loose).unwrap();
            try_ways(&WAYS[..6], &imds, &pod, arrives, &format!("{unknown:?}"));
            assert!(WAYS[6].1(&imds, &pod, HAPPENS), "on the host's network other unknown pods count");
        }
    });
}

#[test]
fn a_pods_netdev_is_known_as_soon_and_as_long_as_it_lasts() {
    Node::run(|node| {
        let _imds = without_the_egress_filter(node);
        let mut pod = NetworkPod::behind_a_veth(node.pod(POD_UIDS[0], IMDS_DENY, POD_IDENTITY_ON), 0);
        let is_outward = |netdevs: &Netdevs, pod: &NetworkPod| {
            netdevs.outward.iter().any(|netdev| netdev.index == pod.netdev)
        };
        // Nothing tells whose it is before there is a process: until then it has the fence itself.
        let (netdevs, _) = follow_until(node, |netdevs, _| is_outward(netdevs, &pod));
        assert!(netdevs.pods.is_empty());
        pod.start();
        let (netdevs, _) = follow_until(node, |netdevs, _| netdevs.pods.contains_key(&pod.netdev));
        assert!(!is_outward(&netdevs, &pod));
        assert_eq!(netdevs.pods[&pod.netdev], pod.pod.cgroup.id);
        // Its sandbox is made anew, with another network.
        pod.stop();
        follow_until(node, |netdevs, _| netdevs.pods.is_empty());
        pod.start();
        let other = NetworkPod::create(node, 1, IMDS_AUDIT);
        let (netdevs, _) = follow_until(node, |netdevs, _| netdevs.pods.len() == 2);
        assert_eq!(netdevs.pods[&other.netdev], other.pod.cgroup.id);
        remove_netdevs(&[pod.netdev]);
        let (netdevs, _) = follow_until(node, |netdevs, _| !netdevs.pods.contains_key(&pod.netdev));
        assert!(netdevs.pods.contains_key(&other.netdev));
    });
}

#[test]
fn a_netdev_that_appears_later_has_the_fence_within_a_moment() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        let strict = NetworkPod::create(node, 0, IMDS_DENY);
        fence(node, &[&strict]);
        let second = |handle: Handle| async move {
            let pair = LinkVeth::new("second", "other").build();
            handle.link().add(pair).execute().await
        };
        let mut since = None;
        let mut first_look = true;
        follow_until(node, |netdevs, fenced| {
            if std::mem::take(&mut first_look) {
                thread::scope(|scope| scope.spawn(|| netlink(second)).join().unwrap());
                since = Some(Instant::now());
            }
            netdevs.outward.iter().any(|netdev| netdev.name == "second")
                && fenced.first.iter().any(|name| name == "second")
        });
        let took = since.unwrap().elapsed();
        say(&format!("a new netdev has the fence after {took:?}"));
        assert!(took < Duration::from_secs(2), "{took:?}");
        try_all(&imds, &strict, false, "with more netdevs");
    });
}

#[test]
fn packets_by_a_netdev_that_appears_later_stop_within_a_moment() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        let strict = NetworkPod::create(node, 0, IMDS_DENY);
        let audited = NetworkPod::create(node, 1, IMDS_AUDIT);
        fence(node, &[&strict, &audited]);
        let socket = strict.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        let (is_followed, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_followed.load(Ordering::Acquire) {
                    thread::sleep(Duration::from_millis(1));
                }
                let since = lead_through_another_uplink(&imds);
                let ready = since.elapsed();
                let (last, count) = last_arrival(&imds, &socket, since);
                say(&format!(
                    "a new netdev is used after {ready:?}; {count} packets of a strict pod leave by it, the last \
                     after {last:?}"
                ));
                let audit = DATAGRAMS[0].1(&imds, &audited, HAPPENS);
                is_over.store(true, Ordering::Release);
                // What also tells the follower to look once more.
                remove_netdevs(&[SECOND]);
                assert!(audit, "a pod in audit, by the new netdev");
                assert!(last < Duration::from_secs(2), "{last:?}");
            });
            follow_until(node, |_, _| {
                is_followed.store(true, Ordering::Release);
                is_over.load(Ordering::Acquire)
            });
        });
    });
}

/// A second uplink with all packets to IMDS, ready before it appears on the node; when it did. It is used as soon as three
/// messages to the kernel can make it so.
fn lead_through_another_uplink(imds: &Imds) -> Instant {
    let node = File::open("/proc/thread-self/ns/net").unwrap();
    // Pods' addresses are expected from the other uplink.
    let trust = |netdev| fs::write(format!("/proc/sys/net/ipv4/conf/{netdev}/rp_filter"), "0").unwrap();
    netlink(async |handle| {
        let (connection, beyond, _) = in_network(&imds.network, || rtnetlink::new_connection().unwrap());
        tokio::spawn(connection);
        // Known on both sides: a question for it could be lost while the netdev comes up, and is repeated after a second.
        let address = vec![2, 0, 0, 0, 0, 3];
        beyond.link().add(LinkVeth::new("second", "eth1").index(SECOND).build()).execute().await?;
        let eth1 = LinkUnspec::new_with_name("eth1").address(address.clone()).up().build();
        beyond.link().set(eth1).execute().await?;
        in_network(&imds.network, || ["all", "eth1"].map(trust));
        let appear = LinkUnspec::new_with_index(SECOND).setns_by_fd(node.as_raw_fd()).build();
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(IMDS_V4, 32);
        let route = route.output_interface(SECOND).scope(RouteScope::Link).build();
        beyond.link().set(appear).execute().await?;
        let since = Instant::now();
        up(&handle, SECOND).await?;
        handle.neighbours().add(SECOND, IMDS_V4.into()).link_layer_address(&address).execute().await?;
        handle.route().add(route).replace().execute().await?;
        Ok(since)
    })
}

/// Sends until nothing arrives any more: when the last did, and how many.
fn last_arrival(imds: &Imds, socket: &UdpSocket, since: Instant) -> (Duration, usize) {
    let (mut last, mut count) = (Duration::ZERO, 0);
    while since.elapsed() < (last + 2 * NOTHING).min(FOLLOWS / 2) {
        socket.send_to(b"at once", (IMDS_V4, 53)).unwrap();
        thread::sleep(Duration::from_millis(1));
        let arrived = imds.arrived();
        if arrived > 0 {
            (last, count) = (since.elapsed(), count + arrived);
        }
    }
    (last, count)
}

#[test]
fn a_program_before_the_fence_is_found() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        let strict = NetworkPod::create(node, 0, IMDS_DENY);
        let (_, metrics) = follow_until(node, |_, fenced| fenced.first.iter().any(|name| name == UPLINK));
        assert!(metrics.contains("podgate_fence_netdevs{state=\"behind\"} 0"), "{metrics}");

        let mut others = Ebpf::load(OBJECT).unwrap();
        let other: &mut SchedClassifier = others.program_mut(program::FENCE).unwrap().try_into().unwrap();
        other.load().unwrap();
        put_first(other);
        let (_, metrics) = follow_until(node, |_, fenced| fenced.behind == [UPLINK]);
        assert!(metrics.contains("podgate_fence_netdevs{state=\"behind\"} 1"), "{metrics}");
        try_all(&imds, &strict, false, "behind a program that passes everything on");
        drop(others);
        follow_until(node, |_, fenced| fenced.first.iter().any(|name| name == UPLINK));
    });
}

/// Attaches another's program before all that are there.
fn put_first(program: &mut SchedClassifier) {
    let first = TcAttachOptions::TcxOrder(LinkOrder::first());
    if program.attach_with_options(UPLINK, TcAttachType::Egress, first).is_ok() {
        return;
    }
    // No tcx before Linux 6.6. The filter that is added last is the first of its preference.
    let _ = qdisc_add_clsact(UPLINK);
    let options = NlOptions { priority: FENCE_FILTER.0, handle: TcHandle::new(0, 9), classid: None };
    program.attach_with_options(UPLINK, TcAttachType::Egress, TcAttachOptions::Netlink(options)).unwrap();
}

/// Says something that is to be read even where the test passes.
fn say(line: &str) {
    io::stderr().write_all(format!("fence: {line}\n").as_bytes()).unwrap();
}

fn remove_netdevs(netdevs: &[u32]) {
    netlink(async |handle| {
        for netdev in netdevs {
            handle.link().del(*netdev).execute().await?;
        }
        Ok(())
    });
}

/// Removes what `podgate detach` removes.
fn detach(node: &mut Node) {
    for pin in pinned(node.bpffs()).unwrap() {
        unpin(&pin).unwrap();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for netdev in runtime.block_on(fence::filtered()).unwrap() {
        remove_filter(&netdev).unwrap();
    }
    assert!(runtime.block_on(fence::filtered()).unwrap().is_empty());
}
