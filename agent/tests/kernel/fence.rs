//! The second fence: a node with pods behind veths, and IMDS beyond its uplink, as on a real one.

use std::{
    cell::RefCell,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use agent::{
    control::fence::{self, FenceMetrics},
    identity::{cgroupfs::Kubepods, sandboxes::Sandboxes},
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
use futures::TryStreamExt as _;
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::Pid,
};
use prometheus_client::{encoding::text::encode, registry::Registry};
use rtnetlink::{
    Handle, LinkMacVlan, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{address::AddressHeaderFlags, link::MacVlanMode, route::RouteMessage},
};
use tokio::sync::Notify;

use crate::{
    egress::below_ip,
    events,
    kernel_node::{Node, Pod, in_network, netlink, new_network, outside},
    socket_kinds::fork_and_stay,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/podgate.o"));

/// What tells a datagram of a test from all others.
type Mark = [u8; 8];

const UPLINK: &str = "uplink";
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
const POD_UIDS: [&str; 3] = [
    "0c5cb3f2_7a47_4a4b_8f0c_5b0f6a3d2e11",
    "1c5cb3f2_7a47_4a4b_8f0c_5b0f6a3d2e11",
    "2c5cb3f2_7a47_4a4b_8f0c_5b0f6a3d2e11",
];

/// The instance metadata service, behind the node's uplink.
struct Imds {
    datagrams: [UdpSocket; 2],
}

/// A pod with a network of its own, and a process in it as long as it lives.
struct NetworkPod {
    pod: Pod,
    network: File,
    sandbox: Option<Pid>,
    /// The node's end of its veth.
    netdev: u32,
    /// That end's hardware address.
    gateway: [u8; 6],
    eth0: u32,
}

/// A way from a pod to IMDS: whether something arrives.
type Way = (&'static str, fn(&Imds, &NetworkPod, Duration) -> bool);

/// With the egress filter off and in a pod that `connect` leaves nothing.
const WAYS: [Way; 6] = [
    ("a Service over IPv4", |_, pod, patience| pod.run(|| is_answered(SERVICE_V4, patience))),
    ("a Service over IPv6", |_, pod, patience| pod.run(|| is_answered(SERVICE_V6, patience))),
    ("a datagram over IPv4", |imds, pod, patience| {
        imds.gets(patience, |mark| pod.run(|| datagram(IMDS_V4.into(), mark)))
    }),
    ("a datagram over IPv6", |imds, pod, patience| {
        imds.gets(patience, |mark| pod.run(|| datagram(IMDS_V6.into(), mark)))
    }),
    ("a packet socket", |imds, pod, patience| {
        imds.gets(patience, |mark| pod.run(|| below_ip(&packet(pod, mark), pod.eth0, pod.gateway)))
    }),
    ("the host's network", |imds, pod, patience| {
        imds.gets(patience, |mark| pod.pod.run(|| datagram(IMDS_V4.into(), mark)))
    }),
];

// === impl Imds ===

impl Imds {
    /// In place of the one on the node's `lo`.
    fn beyond_an_uplink() -> Self {
        let network = new_network();
        netlink(async |handle| {
            for ip in [IpAddr::from(IMDS_V4), IMDS_V6.into()] {
                remove_address(&handle, ip).await?;
            }
            let uplink = add_veth(&handle, UPLINK, [2, 0, 0, 0, 0, 1], &network).await?;
            add_address(&handle, uplink, "192.168.7.2", 24).await?;
            add_address(&handle, uplink, "fd77::2", 64).await?;
            for route in
                [route_v4("169.254.169.254", 32, "192.168.7.1"), route_v6("fd00:ec2::254", 128, "fd77::1")]
            {
                handle.route().add(route).execute().await?;
            }
            Ok(())
        });
        for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{switch}"), "1").unwrap();
        }
        let datagrams = in_network(&network, || {
            netlink(async |handle| {
                up(&handle, 1).await?;
                let eth0 = index(&handle, "eth0").await?;
                up(&handle, eth0).await?;
                add_address(&handle, eth0, "192.168.7.1", 24).await?;
                add_address(&handle, eth0, "fd77::1", 64).await?;
                add_address(&handle, 1, "169.254.169.254", 32).await?;
                add_address(&handle, 1, "fd00:ec2::254", 128).await?;
                handle.route().add(route_v4("10.70.0.0", 16, "192.168.7.2")).execute().await?;
                handle.route().add(route_v6("fd70::", 32, "fd77::2")).execute().await
            });
            [IpAddr::from(IMDS_V4), IMDS_V6.into()].map(|ip| {
                let listener = outside(|| TcpListener::bind((ip, 80)).unwrap());
                thread::spawn(move || {
                    for stream in listener.incoming() {
                        let _ = stream.and_then(|mut stream| stream.write_all(b"node-role"));
                    }
                });
                let socket = outside(|| UdpSocket::bind((ip, 53)).unwrap());
                socket.set_nonblocking(true).unwrap();
                socket
            })
        });
        Self { datagrams }
    }

    /// Whether a datagram with a mark arrives that `send` sends.
    fn gets(&self, patience: Duration, send: impl FnOnce(Mark)) -> bool {
        static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0x5aa5_0001_3cc3_0000);
        let mark = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_be_bytes();
        send(mark);
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            let mut received = [0; 64];
            for socket in &self.datagrams {
                while let Ok(length) = socket.recv(&mut received) {
                    if received[..length] == mark {
                        return true;
                    }
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

// === impl NetworkPod ===

impl NetworkPod {
    fn create(node: &mut Node, number: u8, imds: u32) -> Self {
        let pod = node.pod(POD_UIDS[usize::from(number)], imds, POD_IDENTITY_ON);
        let mut created = Self::behind_a_veth(pod, number);
        created.start();
        created
    }

    /// Without a process yet.
    fn behind_a_veth(pod: Pod, number: u8) -> Self {
        let network = new_network();
        let gateway = [2, 0, 0, 1, 0, number];
        let netdev = netlink(async |handle| {
            let netdev = add_veth(&handle, &format!("veth{number}"), gateway, &network).await?;
            add_address(&handle, netdev, &format!("10.70.{number}.1"), 24).await?;
            add_address(&handle, netdev, &format!("fd70:0:0:{number}::1"), 64).await?;
            Ok(netdev)
        });
        let eth0 = in_network(&network, || {
            netlink(async |handle| {
                up(&handle, 1).await?;
                let eth0 = index(&handle, "eth0").await?;
                up(&handle, eth0).await?;
                add_address(&handle, eth0, &format!("10.70.{number}.2"), 24).await?;
                add_address(&handle, eth0, &format!("fd70:0:0:{number}::2"), 64).await?;
                handle.route().add(route_v4("0.0.0.0", 0, &format!("10.70.{number}.1"))).execute().await?;
                handle.route().add(route_v6("::", 0, &format!("fd70:0:0:{number}::1"))).execute().await?;
                Ok(eth0)
            })
        });
        Self { pod, network, sandbox: None, netdev, gateway, eth0 }
    }

    /// Its first process, as a sandbox has one.
    fn start(&mut self) {
        self.sandbox = Some(self.run(|| fork_and_stay(|| Ok(()))));
    }

    fn stop(&mut self) {
        if let Some(sandbox) = self.sandbox.take() {
            kill(sandbox, Signal::SIGKILL).unwrap();
            waitpid(sandbox, None).unwrap();
        }
    }

    /// Runs `work` in the pod and in its network.
    fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        self.pod.run(|| in_network(&self.network, work))
    }
}

impl Drop for NetworkPod {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whether whoever listens there answers as IMDS.
fn is_answered(address: &str, patience: Duration) -> bool {
    let ask = || -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), patience)?;
        stream.set_read_timeout(Some(patience))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer == "node-role")
}

fn datagram(to: IpAddr, mark: Mark) {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    // Whether it is refused at once or later makes no difference here.
    let _ = socket.send_to(&mark, (to, 53));
}

/// A datagram to IMDS with its IP header, from a pod's own address. It needs no checksum of UDP's.
fn packet(pod: &NetworkPod, mark: Mark) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 36, 0, 1, 0, 0, 64, 17, 0, 0, 10, 70, pod.gateway[5], 2];
    header.extend(IMDS_V4.octets());
    let sum: u32 = header.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    header[10..12].copy_from_slice(&(!folded).to_be_bytes());
    [&header[..], &[0x9c, 0x40, 0, 53, 0, 16, 0, 0], &mark].concat()
}

/// Tries all ways; each leads to IMDS, or none.
fn try_all(imds: &Imds, pod: &NetworkPod, arrives: bool, case: &str) {
    for (way, arrived) in WAYS {
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
    let mut nft =
        Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).spawn().expect("nft is missing");
    nft.stdin.take().unwrap().write_all(TRANSLATE.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success(), "nft");
    imds
}

/// Follows the node's netdevs until `is_done`; the netdevs then, and what the metrics say.
fn follow_until(node: &mut Node, mut is_done: impl FnMut(&Netdevs, &Fenced) -> bool) -> (Netdevs, String) {
    let mut registry = Registry::default();
    let metrics = FenceMetrics::register(&mut registry);
    let root = Path::new("/").join(node.kubepods.path.parent().and_then(Path::file_name).unwrap());
    let pods = Sandboxes::new(Arc::new(Kubepods::find(&root).unwrap())).unwrap();
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

async fn up(handle: &Handle, netdev: u32) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(netdev).up().build()).execute().await
}

async fn index(handle: &Handle, name: &str) -> Result<u32, rtnetlink::Error> {
    let found = handle.link().get().match_name(name.to_owned()).execute().try_next().await?;
    Ok(found.unwrap().header.index)
}

/// A veth whose other end is `eth0` of another network.
async fn add_veth(
    handle: &Handle,
    name: &str,
    address: [u8; 6],
    other: &File,
) -> Result<u32, rtnetlink::Error> {
    let pair = LinkVeth::new(name, "eth0").address(address.to_vec()).build();
    handle.link().add(pair).execute().await?;
    let end = LinkUnspec::new_with_name("eth0").setns_by_fd(other.as_fd().as_raw_fd()).build();
    handle.link().set(end).execute().await?;
    let netdev = index(handle, name).await?;
    up(handle, netdev).await?;
    Ok(netdev)
}

async fn add_address(handle: &Handle, netdev: u32, ip: &str, prefix: u8) -> Result<(), rtnetlink::Error> {
    let mut request = handle.address().add(netdev, ip.parse().unwrap(), prefix);
    request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    request.execute().await
}

async fn remove_address(handle: &Handle, ip: IpAddr) -> Result<(), rtnetlink::Error> {
    let mut found = handle.address().get().set_address_filter(ip).execute();
    while let Some(address) = found.try_next().await? {
        handle.address().del(address).execute().await?;
    }
    Ok(())
}

fn route_v4(to: &str, prefix: u8, by: &str) -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to.parse().unwrap(), prefix);
    route.gateway(by.parse().unwrap()).build()
}

fn route_v6(to: &str, prefix: u8, by: &str) -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to.parse().unwrap(), prefix);
    route.gateway(by.parse().unwrap()).build()
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
            assert!(node.count(Counter::FenceDropped) >= before + 6);
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
            (5, 53, strict.pod.container.id),
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
            for (way, arrived) in &WAYS[..5] {
                let patience = if arrives { HAPPENS } else { NOTHING };
                assert_eq!(arrived(&imds, &pod, patience), arrives, "{way}, {unknown:?}");
            }
            assert!(WAYS[5].1(&imds, &pod, HAPPENS), "on the host's network other unknown pods count");
        }
    });
}

#[test]
fn a_netdev_that_shares_the_nodes_is_known_by_the_pods_socket() {
    Node::run(|node| {
        let imds = without_the_egress_filter(node);
        let pod = NetworkPod::create(node, 0, IMDS_AUDIT);
        share_the_uplink(&pod);
        let arrives = |patience| imds.gets(patience, |mark| pod.run(|| datagram(IMDS_V4.into(), mark)));
        assert!(arrives(HAPPENS), "without the fence");
        fence(node, &[&pod]);
        assert!(arrives(HAPPENS), "in audit");
        let deny = PodPolicy { imds: IMDS_DENY, pod_identity: POD_IDENTITY_ON };
        node.interceptor.set_policy(pod.pod.cgroup.id, deny).unwrap();
        assert!(!arrives(NOTHING), "in deny");
    });
}

/// Gives a pod a macvlan on the node's uplink, and its route to IMDS.
fn share_the_uplink(pod: &NetworkPod) {
    netlink(async |handle| {
        let uplink = index(&handle, UPLINK).await?;
        let shared = LinkMacVlan::new("shared", uplink, MacVlanMode::Bridge).build();
        handle.link().add(shared).execute().await?;
        let pods = LinkUnspec::new_with_name("shared").setns_by_fd(pod.network.as_fd().as_raw_fd());
        handle.link().set(pods.build()).execute().await
    });
    in_network(&pod.network, || {
        netlink(async |handle| {
            let shared = index(&handle, "shared").await?;
            up(&handle, shared).await?;
            add_address(&handle, shared, "192.168.7.9", 24).await?;
            handle.route().add(route_v4("169.254.169.254", 32, "192.168.7.1")).execute().await
        });
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
        println!("a new netdev has the fence after {took:?}");
        assert!(took < Duration::from_secs(2), "{took:?}");
        try_all(&imds, &strict, false, "with more netdevs");
    });
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
