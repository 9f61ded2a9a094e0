//! What leaves a pod for IMDS or the agent without a connection that was let through, and what pods in audit ask for.

use std::{
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    num::{NonZeroU16, NonZeroU32},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use agent::accept::listen;
use agent_common::{
    abi::{TICKET_OPTION_EXID, TICKET_OPTION_KIND, TICKET_OPTION_LEN},
    counter::Counter,
    net::{Endpoint, IMDS_V4, IMDS_V6},
    policy::{IMDS_AUDIT, IMDS_DENY, IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_OFF, POD_IDENTITY_ON, PodPolicy},
};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto,
    socket_with, sockopt,
};

use crate::{
    IMDS, IMDS_MAPPED, endpoint, events, is_eperm,
    kernel_node::{AGENT_V4, AGENT_V6, Node, Pod, RealService, outside, soon},
};

/// Where nothing may go but what `connect` has let through.
const RESERVED: [IpAddr; 4] =
    [IpAddr::V4(IMDS_V4), IpAddr::V6(IMDS_V6), IpAddr::V4(AGENT_V4), IpAddr::V6(AGENT_V6)];
/// How often each way to end a connection is tried.
const CONNECTIONS: u64 = 50;
/// How long anything on `lo` may take.
const TIMEOUT: Option<Duration> = Some(Duration::from_secs(2));
/// `ETH_P_ALL`.
const EVERYTHING: u16 = 3;
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const ICMP_V6: u8 = 58;
const DESTINATION_OPTIONS: u8 = 60;
/// Of the experimental ones, RFC 3692.
const SOME_PROTOCOL: u8 = 253;

/// What tells a packet from all others on the wire.
type Mark = [u8; 8];

/// A way to send a packet with a mark in it to an address.
type Way = (&'static str, fn(IpAddr, Mark) -> io::Result<()>);

const WAYS: [Way; 9] = [
    ("a datagram", datagram),
    ("a v4-mapped datagram", mapped_datagram),
    ("a raw segment", |to, mark| raw(to, TCP, &segment(mark))),
    ("a raw datagram", |to, mark| raw(to, UDP, &[&[0, 53, 0, 53, 0, 16, 0, 0], &mark[..]].concat())),
    ("a ping", ping),
    ("an unknown protocol", |to, mark| raw(to, SOME_PROTOCOL, &mark)),
    ("a segment with its IP header", |to, mark| own_header(to, &packet(to, TCP, &segment(mark)))),
    ("a later fragment with its IP header", later_fragment),
    ("a segment behind options", behind_options),
];

/// Every packet of the namespace from now on.
struct Wire(OwnedFd);

/// How a pod ends a connection.
#[derive(Clone, Copy, Debug)]
enum Ending {
    Close,
    /// Before anything is said.
    Reset,
    /// With an answer that nobody has read.
    ResetUnread,
    HalfClose,
}

// === impl Wire ===

impl Wire {
    fn watch() -> Self {
        let all = Protocol::from_raw(NonZeroU32::from(NonZeroU16::new(EVERYTHING.to_be()).unwrap()));
        Self(socket(AddressFamily::PACKET, SocketType::DGRAM, Some(all)))
    }

    /// Whether a packet with the mark was sent since the last call.
    fn has(&self, mark: Mark) -> bool {
        let mut packet = [0; 2048];
        let mut found = false;
        while let Ok((length, _)) = recv(&self.0, &mut packet[..], RecvFlags::DONTWAIT) {
            found |= packet[..length].windows(mark.len()).any(|window| window == mark);
        }
        found
    }
}

/// A mark that no packet has had before: answers come late, with the mark that they answer.
fn fresh_mark() -> Mark {
    static COUNT: AtomicU64 = AtomicU64::new(0xa55a_0001_c33c_0000);
    COUNT.fetch_add(1, Ordering::Relaxed).to_be_bytes()
}

fn socket(family: AddressFamily, kind: SocketType, protocol: Option<Protocol>) -> OwnedFd {
    socket_with(family, kind, SocketFlags::CLOEXEC, protocol).unwrap()
}

fn family(to: IpAddr) -> AddressFamily {
    if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

fn datagram(to: IpAddr, mark: Mark) -> io::Result<()> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    UdpSocket::bind(any)?.send_to(&mark, (to, 53)).map(drop)
}

fn mapped_datagram(to: IpAddr, mark: Mark) -> io::Result<()> {
    let mapped = match to {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    UdpSocket::bind("[::]:0")?.send_to(&mark, (mapped, 53)).map(drop)
}

/// The kernel makes the IP header.
fn raw(to: IpAddr, protocol: u8, payload: &[u8]) -> io::Result<()> {
    let protocol = Protocol::from_raw(NonZeroU32::new(protocol.into()).unwrap());
    let raw = socket(family(to), SocketType::RAW, Some(protocol));
    Ok(sendto(&raw, payload, SendFlags::empty(), &SocketAddr::new(to, 0)).map(drop)?)
}

/// The pod makes it.
fn own_header(to: IpAddr, packet: &[u8]) -> io::Result<()> {
    let raw = socket(family(to), SocketType::RAW, Some(ipproto::RAW));
    Ok(sendto(&raw, packet, SendFlags::empty(), &SocketAddr::new(to, 0)).map(drop)?)
}

fn ping(to: IpAddr, mark: Mark) -> io::Result<()> {
    let (protocol, request) = if to.is_ipv4() { (ICMP, 8) } else { (ICMP_V6, 128) };
    raw(to, protocol, &[&[request, 0, 0, 0, 0, 1, 0, 1], &mark[..]].concat())
}

/// Neither a port nor a flag is in it.
fn later_fragment(to: IpAddr, mark: Mark) -> io::Result<()> {
    if to.is_ipv4() {
        let mut packet = packet(to, UDP, &mark);
        packet[7] = 4;
        own_header(to, &packet)
    } else {
        own_header(to, &packet(to, FRAGMENT, &[&[UDP, 0, 0, 4 << 3, 0, 0, 0, 1], &mark[..]].concat()))
    }
}

fn behind_options(to: IpAddr, mark: Mark) -> io::Result<()> {
    if to.is_ipv4() {
        // A header of six words instead of five: four times "no operation".
        let mut packet = packet(to, TCP, &[&[1; 4], &segment(mark)[..]].concat());
        packet[0] = 0x46;
        own_header(to, &packet)
    } else {
        let options = [TCP, 0, 1, 4, 0, 0, 0, 0];
        own_header(to, &packet(to, DESTINATION_OPTIONS, &[&options, &segment(mark)[..]].concat()))
    }
}

/// The first segment of a handshake with port 80, with the mark for a ticket.
fn segment(mark: Mark) -> Vec<u8> {
    let mut tcp = vec![0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 8 << 4, 0x02, 0xff, 0xff, 0, 0, 0, 0];
    tcp.extend([TICKET_OPTION_KIND, TICKET_OPTION_LEN]);
    tcp.extend(TICKET_OPTION_EXID);
    tcp.extend(mark);
    tcp
}

/// A whole IP packet; the kernel fills in the checksum and an IPv4 packet's length.
fn packet(to: IpAddr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    match to {
        IpAddr::V4(to) => {
            let header = [0x45, 0, 0, 0, 0, 1, 0, 0, 64, protocol, 0, 0, 127, 0, 0, 1];
            [&header, &to.octets()[..], payload].concat()
        }
        IpAddr::V6(to) => {
            let [high, low] = u16::try_from(payload.len()).unwrap().to_be_bytes();
            let header = [0x60, 0, 0, 0, high, low, protocol, 64];
            [&header, &Ipv6Addr::LOCALHOST.octets()[..], &to.octets(), payload].concat()
        }
    }
}

pub(crate) fn packet_socket() -> OwnedFd {
    socket(AddressFamily::PACKET, SocketType::DGRAM, None)
}

/// Its packets go to the netdev's driver at once.
#[expect(unsafe_code, reason = "neither rustix nor nix has this option")]
pub(crate) fn pass_by_queues(raw: &OwnedFd) {
    let on: libc::c_int = 1;
    let (level, option) = (libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS);
    let size = size_of_val(&on).try_into().unwrap();
    // SAFETY: the pointer is to as much as is said, for as long as the call takes.
    let set = unsafe { libc::setsockopt(raw.as_raw_fd(), level, option, (&raw const on).cast(), size) };
    assert_eq!(set, 0, "{}", io::Error::last_os_error());
}

/// To a netdev and a neighbor behind it, without the kernel's IP.
#[expect(unsafe_code, reason = "neither rustix nor nix makes a sockaddr_ll")]
pub(crate) fn below_ip(raw: &OwnedFd, packet: &[u8], netdev: u32, neighbor: [u8; 6]) {
    let mut address = [0; 8];
    address[..6].copy_from_slice(&neighbor);
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET.try_into().unwrap(),
        sll_protocol: 0x0800_u16.to_be(),
        sll_ifindex: netdev.try_into().unwrap(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: address,
    };
    // SAFETY: both pointers are to as much as is said, for as long as the call takes.
    let sent = unsafe {
        libc::sendto(
            raw.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const to).cast(),
            size_of_val(&to).try_into().unwrap(),
        )
    };
    assert_eq!(usize::try_from(sent), Ok(packet.len()), "{}", io::Error::last_os_error());
}

fn set_imds(node: &mut Node, pod: &Pod, imds: u32) {
    let policy = PodPolicy { imds, pod_identity: POD_IDENTITY_ON };
    node.interceptor.set_policy(pod.cgroup.id, policy).unwrap();
}

/// Tries every way from a pod to every reserved address. Each is stopped, or none is.
fn try_all(node: &Node, pod: &Pod, stopped: bool, case: &str) {
    let wire = Wire::watch();
    for to in RESERVED {
        for (way, send) in WAYS {
            let (before, mark) = (node.count(Counter::EgressDropped), fresh_mark());
            let result = pod.run(|| send(to, mark));
            let sent = if stopped { is_eperm(&result) } else { result.is_ok() };
            assert!(sent, "{case}: {way} to {to}: {result:?}");
            assert_eq!(wire.has(mark), !stopped, "{case}: {way} to {to}");
            let dropped = node.count(Counter::EgressDropped) - before;
            assert_eq!(dropped, u64::from(stopped), "{case}: {way} to {to}");
        }
    }
}

#[test]
fn an_intercepted_pod_reaches_imds_and_the_agent_by_connect_alone() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_OFF, POD_IDENTITY_ON);
        let guaranteed = node.guaranteed_pod("b", IMDS_INTERCEPT, POD_IDENTITY_ON);
        for (imds, stopped) in [
            (IMDS_OFF, false),
            (IMDS_AUDIT, false),
            (IMDS_INTERCEPT, true),
            (IMDS_DENY, true),
            (IMDS_OFF, false),
        ] {
            set_imds(node, &pod, imds);
            try_all(node, &pod, stopped, &format!("mode {imds}"));
        }
        try_all(node, &guaranteed, true, "a guaranteed pod");
    });
}

#[test]
fn without_the_egress_filter_every_packet_leaves() {
    Node::run(|node| {
        node.reload(|settings| settings.egress_filter = false);
        for imds in [IMDS_INTERCEPT, IMDS_DENY] {
            let pod = node.pod(&imds.to_string(), imds, POD_IDENTITY_ON);
            try_all(node, &pod, false, &format!("mode {imds}, no egress filter"));
        }
    });
}

#[test]
fn a_pod_that_is_not_known_yet_is_filtered_as_unknown_pods_are() {
    Node::run(|node| {
        let pod = node.unknown_pod("new");
        for (imds, stopped) in [(IMDS_OFF, false), (IMDS_INTERCEPT, true), (IMDS_DENY, true)] {
            let unknown = PodPolicy { imds, pod_identity: POD_IDENTITY_ON };
            node.interceptor.set_unknown_pods(unknown, PodPolicy::EXEMPT).unwrap();
            try_all(node, &pod, stopped, &format!("unknown, mode {imds}"));
        }
    });
}

#[test]
fn other_destinations_podgate_itself_and_the_node_are_left_alone() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_DENY, POD_IDENTITY_ON);
        let wire = Wire::watch();
        let others = ["127.0.0.1", "::1", "169.254.170.2", "10.9.9.9"].map(|ip| ip.parse().unwrap());
        for (way, send) in WAYS {
            let arrives = |result: io::Result<()>, mark: Mark, who: &str, to: IpAddr| {
                assert!(result.is_ok() && wire.has(mark), "{who}, {way} to {to}: {result:?}");
            };
            for to in others {
                let mark = fresh_mark();
                arrives(pod.run(|| send(to, mark)), mark, "the pod", to);
            }
            for to in RESERVED {
                let mark = fresh_mark();
                arrives(node.as_agent(|| send(to, mark)), mark, "podgate", to);
                let mark = fresh_mark();
                arrives(outside(|| send(to, mark)), mark, "the node", to);
            }
        }
        assert_eq!(node.count(Counter::EgressDropped), 0);
    });
}

#[test]
fn connections_from_before_a_pod_was_intercepted_stop() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_OFF, POD_IDENTITY_OFF);
        let wire = Wire::watch();
        for (address, any) in [
            (IMDS, "0.0.0.0:0"),
            ("[fd00:ec2::254]:80", "[::]:0"),
            (IMDS_MAPPED, "[::]:0"),
            ("169.254.169.254:8080", "0.0.0.0:0"),
            ("[fd00:ec2::254]:8080", "[::]:0"),
        ] {
            let real = endpoint(address);
            let real = SocketAddr::new(real.ip(), real.port.get());
            let _real = (RealService::listen(&real.to_string()), outside(|| UdpSocket::bind(real).unwrap()));
            let mut stream = pod.connect(address).unwrap();
            let datagrams = pod.run(|| {
                let socket = UdpSocket::bind(any).unwrap();
                socket.connect(address).unwrap();
                socket
            });
            for stopped in [false, true] {
                set_imds(node, &pod, if stopped { IMDS_INTERCEPT } else { IMDS_OFF });
                let (before, mark) = (node.count(Counter::EgressDropped), fresh_mark());
                assert_eq!(is_eperm(&datagrams.send(&mark)), stopped, "{address}");
                assert_eq!(wire.has(mark), !stopped, "{address}, a connected datagram");
                let mark = fresh_mark();
                // The kernel takes it, and tries for a while to send it.
                stream.write_all(&mark).unwrap();
                assert_eq!(wire.has(mark), !stopped, "{address}, an established connection");
                assert_eq!(node.count(Counter::EgressDropped) >= before + 2, stopped, "{address}");
            }
            set_imds(node, &pod, IMDS_OFF);
        }
    });
}

#[test]
fn packets_made_below_ip_are_not_seen() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_DENY, POD_IDENTITY_ON);
        let (wire, mark) = (Wire::watch(), fresh_mark());
        let to = IpAddr::from(IMDS_V4);
        pod.run(|| below_ip(&packet_socket(), &packet(to, TCP, &segment(mark)), 1, [0; 6]));
        assert!(wire.has(mark), "this is closed outside the pod only");
        assert_eq!(node.count(Counter::EgressDropped), 0);
    });
}

#[test]
fn what_is_stopped_is_told_with_whose_it_is_and_where_to() {
    Node::run(|node| {
        let mut events = events::reader(node);
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        for to in RESERVED {
            for (way, port) in [(0, 53), (2, 80), (4, 0), (7, 0)] {
                let (name, send) = WAYS[way];
                assert!(is_eperm(&pod.run(|| send(to, fresh_mark()))), "{name} to {to}");
                let [(kind, event)] = events::told(&mut events)[..] else { panic!("{name}: not one event") };
                assert_eq!(kind, Counter::EgressDropped);
                assert_eq!((event.cgroup_id, event.pod_cgroup_id), (pod.container.id, pod.cgroup.id));
                assert_eq!(event.address, Endpoint::new(to, port), "{name}");
            }
        }
    });
}

#[test]
fn connections_that_were_let_through_lose_nothing_at_their_end() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let listeners = [AGENT_V4.into(), AGENT_V6.into()]
            .map(|ip: IpAddr| node.as_agent(|| listen(SocketAddr::new(ip, 80)).unwrap()));
        let direct = SocketAddr::from((AGENT_V4, 80)).to_string();
        let addresses = [IMDS, "[fd00:ec2::254]:80", IMDS_MAPPED, &direct];
        let endings = [Ending::Close, Ending::Reset, Ending::ResetUnread, Ending::HalfClose];
        for ending in endings {
            for address in addresses {
                for _ in 0..CONNECTIONS {
                    let client = pod.connect(address).unwrap();
                    let server = soon(|| listeners.iter().find_map(|listener| listener.accept().ok())).0;
                    assert!(node.origin(&server).is_some(), "{address}: anonymous");
                    end(client, server, ending);
                }
            }
        }
        assert_eq!(node.count(Counter::EgressDropped), 0);
        let connections = endings.len() * addresses.len() * usize::try_from(CONNECTIONS).unwrap();
        assert_eq!(node.count(Counter::Redirected), u64::try_from(connections).unwrap());
    });
}

/// Ends a connection, and sees on the server's side how.
fn end(mut client: TcpStream, mut server: TcpStream, ending: Ending) {
    client.set_read_timeout(TIMEOUT).unwrap();
    server.set_nonblocking(false).unwrap();
    server.set_read_timeout(TIMEOUT).unwrap();
    let mut rest = Vec::new();
    match ending {
        Ending::Close => {
            client.write_all(b"request").unwrap();
            server.read_exact(&mut [0; 7]).unwrap();
            server.write_all(b"answer").unwrap();
            client.read_exact(&mut [0; 6]).unwrap();
            drop(client);
            assert_eq!(server.read_to_end(&mut rest).unwrap(), 0);
        }
        Ending::Reset => {
            sockopt::set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
            drop(client);
            let error = server.read_to_end(&mut rest).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        Ending::ResetUnread => {
            client.write_all(b"request").unwrap();
            server.write_all(b"answer").unwrap();
            client.peek(&mut [0; 6]).unwrap();
            drop(client);
            let error = server.read_to_end(&mut rest).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        Ending::HalfClose => {
            client.write_all(b"request").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            server.read_to_end(&mut rest).unwrap();
            assert_eq!(rest, b"request");
            server.write_all(b"answer").unwrap();
            drop(server);
            client.read_to_end(&mut rest).unwrap();
            assert_eq!(rest, b"requestanswer");
        }
    }
}

#[test]
fn what_a_pod_in_audit_asks_for_is_reported_once_and_tokens_are_not() {
    Node::run(|node| {
        let mut events = events::reader(node);
        let pod = node.pod("a", IMDS_AUDIT, POD_IDENTITY_ON);
        let token = "PUT /latest/api/token HTTP/1.1\r\n\r\n";
        let role = "GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\n\r\n";
        let user_data = "GET /latest/user-data HTTP/1.1\r\n\r\n";
        let instance = "GET /latest/meta-data/instance-id HTTP/1.1\r\n\r\n";
        let short = "GET / HTTP/1.0\r\n";
        let several_segments = format!("{}\r\n\r\n", role.trim_end().repeat(4_000));
        for (requests, kind) in [
            (&[token][..], None),
            (&[token, role], Some(Counter::AuditedCredentials)),
            (&[role, user_data, instance, token], Some(Counter::AuditedCredentials)),
            (&[token, token, user_data, role], Some(Counter::AuditedUserData)),
            (&[instance, role], Some(Counter::AuditedOther)),
            (&[short], Some(Counter::AuditedOther)),
            (&[&several_segments], Some(Counter::AuditedCredentials)),
            (&[], None),
        ] {
            for address in [IMDS, "[fd00:ec2::254]:80", IMDS_MAPPED] {
                let to = endpoint(address);
                let real = outside(|| TcpListener::bind(SocketAddr::new(to.ip(), 80))).unwrap();
                let mut client = pod.connect(address).unwrap();
                let (mut server, _) = real.accept().unwrap();
                server.set_read_timeout(TIMEOUT).unwrap();
                for request in requests {
                    client.write_all(request.as_bytes()).unwrap();
                    server.read_exact(&mut vec![0; request.len()]).unwrap();
                }
                let told = events::told(&mut events);
                let kinds: Vec<_> = told.iter().map(|(kind, _)| *kind).collect();
                let expected: Vec<_> = [Some(Counter::Audited), kind].into_iter().flatten().collect();
                assert_eq!(kinds, expected, "{address}: {requests:.60?}");
                for (_, event) in told {
                    assert_eq!((event.cgroup_id, event.pod_cgroup_id), (pod.container.id, pod.cgroup.id));
                    assert_eq!(event.address, to);
                }
            }
        }
        assert_eq!(node.count(Counter::AuditedCredentials), 3 * 3);
        assert_eq!(node.count(Counter::AuditedUserData), 3);
        assert_eq!(node.count(Counter::AuditedOther), 2 * 3);
    });
}

#[test]
fn paths_are_told_where_asked_for_and_of_pods_in_audit_only() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_OFF, POD_IDENTITY_ON);
        let asks = |node: &Node, imds: u32| {
            let real = outside(|| TcpListener::bind(IMDS)).unwrap();
            let mut client = pod.connect(IMDS).unwrap();
            let (mut server, _) = real.accept().unwrap();
            client.write_all(b"GET /latest/user-data HTTP/1.1\r\n\r\n").unwrap();
            server.read_exact(&mut [0; 34]).unwrap();
            assert_eq!(node.count(Counter::Audited) > 0, imds == IMDS_AUDIT);
            node.count(Counter::AuditedUserData)
        };
        assert_eq!(asks(node, IMDS_OFF), 0);
        node.reload(|settings| settings.audit_paths = false);
        set_imds(node, &pod, IMDS_AUDIT);
        assert_eq!(asks(node, IMDS_AUDIT), 0);
        node.reload(|_| {});
        set_imds(node, &pod, IMDS_AUDIT);
        assert_eq!(asks(node, IMDS_AUDIT), 1);
    });
}
