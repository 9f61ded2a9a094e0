//! Handshakes that a pod did not begin, and many of them: none gets an identity, and no pod loses its own.

use std::{
    fs,
    net::{IpAddr, SocketAddr, TcpListener},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
};

use agent::accept::listen;
use agent_common::{
    counter::Counter,
    origin::Origin,
    policy::{IMDS_INTERCEPT, POD_IDENTITY_ON},
};

use crate::{
    IMDS, IMDS_MAPPED, IMDS_V6, endpoint,
    kernel_node::{AGENT_V4, AGENT_V6, NOBODY, Node, soon},
    wire::Forger,
};

/// How many handshakes a flood begins, and how many of them it completes: as many of each kind.
const BEGUN: u16 = 600;
const COMPLETED: u16 = 15;

#[test]
fn half_open_handshakes_do_not_keep_an_honest_pod_out() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let forger = Forger::new();
        for (cookies, first_port, unanswered) in [("1", 10_000, 200), ("2", 20_000, 400)] {
            fs::write("/proc/sys/net/ipv4/tcp_syncookies", cookies).unwrap();
            // A ticket in each, as from a pod that knows of them.
            for port in first_port..first_port + 200 {
                forger.begin_handshake(port, Some(port.into()));
            }
            assert!(agent.try_accept().is_none(), "half a handshake is no connection");
            // The control: the agent's side has answered, and holds what it did not answer with a cookie.
            assert!(half_open() + cookies_sent() >= unanswered, "{} and {}", half_open(), cookies_sent());
            for address in [IMDS, IMDS_V6, IMDS_MAPPED] {
                let _stream = pod.connect(address).unwrap();
                let origin = agent.accept().expect("anonymous");
                assert_eq!(origin.pod_cgroup_id, pod.cgroup.id);
            }
        }
        assert_eq!((node.count(Counter::Redeemed), node.count(Counter::BadTicket)), (6, 0));
        assert_eq!(node.live_tickets(), 0);
    });
}

/// Handshakes that wait for their last segment, in this namespace.
fn half_open() -> usize {
    let connections = fs::read_to_string("/proc/thread-self/net/tcp").unwrap();
    connections.lines().filter(|line| line.split_whitespace().nth(3) == Some("03")).count()
}

/// SYN cookies that were sent in this namespace.
fn cookies_sent() -> usize {
    let statistics = fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
    let mut tcp = statistics.lines().filter(|line| line.starts_with("TcpExt:")).map(str::split_whitespace);
    let (names, values) = (tcp.next().unwrap(), tcp.next().unwrap());
    let sent = names.zip(values).find(|(name, _)| *name == "SyncookiesSent").unwrap().1;
    sent.parse().unwrap()
}

#[test]
fn a_flood_of_handshakes_takes_no_identity_and_gets_none() {
    Node::run(|node| {
        let pods = ["a", "b"].map(|name| node.pod(name, IMDS_INTERCEPT, POD_IDENTITY_ON));
        // Few may wait, so that a small flood is one.
        fs::write("/proc/sys/net/core/somaxconn", "64").unwrap();
        let addresses = [SocketAddr::from((AGENT_V4, 80)), (AGENT_V6, 80).into()];
        let listeners = node.as_agent(|| addresses.map(|address| listen(address).unwrap()));
        let forger = Forger::new();
        let spent = AtomicU64::new(0);
        let mut honest = 0;
        for (cookies, first_port) in [("1", 10_000), ("2", 20_000)] {
            fs::write("/proc/sys/net/ipv4/tcp_syncookies", cookies).unwrap();
            let cookies_before = cookies_sent();
            let mut flooders = 0;
            let mut open_connection = |number: usize| {
                let (pod, address) = (&pods[number % 2], [IMDS, IMDS_V6, IMDS_MAPPED][number % 3]);
                let _stream = pod.connect(address).unwrap();
                let origin = loop {
                    match soon(|| accept(node, &listeners)) {
                        (from, origin) if from == NOBODY => {
                            assert_eq!(origin, None, "a flooder has an identity");
                            flooders += 1;
                        }
                        (_, origin) => break origin.expect("anonymous"),
                    }
                };
                assert_eq!((origin.pod_cgroup_id, origin.orig_dst), (pod.cgroup.id, endpoint(address)));
                spent.store(origin.ticket, Relaxed);
                honest += 1;
            };
            open_connection(0);
            thread::scope(|scope| {
                let flood = scope.spawn(|| flood(&forger, first_port, &spent));
                for number in 1.. {
                    if flood.is_finished() {
                        break;
                    }
                    open_connection(number);
                }
            });
            open_connection(0);
            assert_eq!(flooders, COMPLETED, "tcp_syncookies={cookies}");
            assert!(cookies_sent() > cookies_before, "this was no flood: tcp_syncookies={cookies}");
        }
        assert!(honest > 20, "only {honest} connections met the flood");
        assert_eq!(node.count(Counter::Redeemed), honest);
        let of_kind = u64::from(COMPLETED) * 2 / 3;
        assert_eq!((node.count(Counter::BadTicket), node.count(Counter::NoTicket)), (2 * of_kind, of_kind));
        assert_eq!(node.live_tickets(), 0);
    });
}

/// Begins handshakes in [`NOBODY`]'s name, with guessed tickets, one that was redeemed before, and none.
fn flood(forger: &Forger, first_port: u16, spent: &AtomicU64) {
    for number in 0..BEGUN {
        let ticket = match number % 3 {
            0 => Some(u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
            1 => Some(spent.load(Relaxed)),
            _ => None,
        };
        if number % (BEGUN / COMPLETED) == 0 {
            forger.shake_hands(first_port + number, ticket);
        } else {
            forger.begin_handshake(first_port + number, ticket);
        }
    }
}

/// The next connection, if there is one: where it comes from, and its origin.
fn accept(node: &Node, listeners: &[TcpListener]) -> Option<(IpAddr, Option<Origin>)> {
    let (stream, peer) = listeners.iter().find_map(|listener| listener.accept().ok())?;
    Some((peer.ip(), node.origin(&stream)))
}
