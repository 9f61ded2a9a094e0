//! The ticket's life: sent once, redeemed once, never left behind.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    process,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
    time::Duration,
};

use agent::accept::listen;
use agent_common::{
    abi::TICKET_LIFE,
    counter::Counter,
    origin::Origin,
    policy::{IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_ON, PodPolicy},
    target::Target,
};
use rustix::net::connect_unspec;

use crate::{
    IMDS, IMDS_MAPPED, IMDS_V6, endpoint, events,
    node::{AGENT_V4, AGENT_V6, NOBODY, Node, add_address, own_pair, soon},
    options::{attach_filter, detach_filter, set_fastopen_connect},
    redial, tcp_socket,
    wire::{self, ACK, Forger, SYN, Wire},
};

#[test]
fn with_syn_cookies_the_ticket_comes_with_the_ack() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        for cookies in ["0", "1", "2"] {
            fs::write("/proc/sys/net/ipv4/tcp_syncookies", cookies).unwrap();
            for address in [IMDS, IMDS_V6, IMDS_MAPPED] {
                let _stream = pod.dial(address).unwrap();
                let origin =
                    agent.accept().unwrap_or_else(|| panic!("{address} with tcp_syncookies={cookies}"));
                assert_eq!(origin.pod_cgroup_id, pod.cgroup.id);
            }
        }
        assert_eq!(node.live_tickets(), 0);
    });
}

#[test]
fn with_syn_cookies_the_ticket_survives_the_loss_of_every_segment_but_the_syn() {
    Node::run(|node| {
        fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap();
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let listener = node.as_agent(|| listen((AGENT_V4, 80).into())).unwrap();
        // What is lost: the handshake's ACK, and with it the first data.
        for data_is_lost in [false, true] {
            let mut filter = if data_is_lost { only_syns() } else { no_bare_acks() };
            attach_filter(&listener, &mut filter);
            let mut stream = pod.dial(IMDS).unwrap();
            if data_is_lost {
                stream.write_all(b"?").unwrap();
            }
            thread::sleep(Duration::from_millis(50));
            // The control: with SYN cookies there is no connection before a segment comes through.
            assert!(listener.accept().is_err(), "nothing was lost");
            detach_filter(&listener);
            if !data_is_lost {
                stream.write_all(b"?").unwrap();
            }
            let (accepted, _) = soon(|| listener.accept().ok());
            let origin = node.origin(&accepted).expect("anonymous");
            assert_eq!(origin.pod_cgroup_id, pod.cgroup.id, "data_is_lost: {data_is_lost}");
            assert_eq!(node.live_tickets(), 0);
        }
        assert_eq!(node.count(Counter::NoTicket), 0);
    });
}

/// A filter that loses segments with no flag but ACK.
fn no_bare_acks() -> [libc::sock_filter; 4] {
    only_if(libc::BPF_JEQ, u32::from(ACK), false)
}

/// A filter that loses segments without SYN.
fn only_syns() -> [libc::sock_filter; 4] {
    only_if(libc::BPF_JSET, u32::from(SYN), true)
}

/// A filter that keeps the segments whose flags pass the test, or do not.
fn only_if(test: u32, flags: u32, keep: bool) -> [libc::sock_filter; 4] {
    let op = |code: u32, k, jt, jf| libc::sock_filter { code: code.try_into().unwrap(), jt, jf, k };
    let (jt, jf) = if keep { (0, 1) } else { (1, 0) };
    [
        // The flags are the header's byte 13.
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 13, 0, 0),
        op(libc::BPF_JMP | test | libc::BPF_K, flags, jt, jf),
        op(libc::BPF_RET | libc::BPF_K, u32::MAX, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ]
}

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
                let _stream = pod.dial(address).unwrap();
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
fn a_flood_of_handshakes_takes_no_pod_s_identity_and_gets_none() {
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
            let mut dial = |number: usize| {
                let (pod, address) = (&pods[number % 2], [IMDS, IMDS_V6, IMDS_MAPPED][number % 3]);
                let _stream = pod.dial(address).unwrap();
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
            dial(0);
            thread::scope(|scope| {
                let flood = scope.spawn(|| flood(&forger, first_port, &spent));
                (1..).take_while(|_| !flood.is_finished()).for_each(&mut dial);
            });
            dial(0);
            assert_eq!(flooders, COMPLETED, "tcp_syncookies={cookies}");
            assert!(cookies_sent() > cookies_before, "this was no flood: tcp_syncookies={cookies}");
        }
        assert!(honest > 20, "only {honest} dials met the flood");
        assert_eq!(node.count(Counter::Redeemed), honest);
        let of_kind = u64::from(COMPLETED) * 2 / 3;
        assert_eq!((node.count(Counter::BadTicket), node.count(Counter::NoTicket)), (2 * of_kind, of_kind));
        assert_eq!(node.live_tickets(), 0);
    });
}

/// How many handshakes a flood begins, and how many of them it completes: as many of each kind.
const BEGUN: u16 = 600;
const COMPLETED: u16 = 15;

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

#[test]
fn a_ticket_is_worth_nothing_after_its_life() {
    Node::run(|node| {
        // What is lost at first: the SYN, which comes again after a second; the handshake's ACK, without which there is
        // no connection before the first data if the agent's side answers with a cookie.
        for (cookies, mut lost) in [("0", only_if(libc::BPF_JSET, 0, true)), ("2", no_bare_acks())] {
            fs::write("/proc/sys/net/ipv4/tcp_syncookies", cookies).unwrap();
            for (life, is_alive) in [(TICKET_LIFE, true), (Duration::from_millis(200), false)] {
                let case = format!("tcp_syncookies={cookies}, {life:?}");
                node.reload(|settings| settings.ticket_life = life);
                let counted =
                    |node: &Node| [Counter::Redeemed, Counter::TicketExpired].map(|what| node.count(what));
                let before = counted(node);
                let mut events = events::reader(node);
                let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
                let listener = node.as_agent(|| listen((AGENT_V4, 80).into())).unwrap();
                attach_filter(&listener, &mut lost);
                let socket = pod.run(tcp_socket);
                rustix::io::ioctl_fionbio(&socket, true).unwrap();
                pod.run(|| redial(&socket, IMDS)).expect_err("the handshake takes a moment");
                thread::sleep(Duration::from_millis(300));
                assert!(listener.accept().is_err(), "{case}: nothing was lost");
                detach_filter(&listener);
                // Before there is a connection there is nothing to send.
                let _ = rustix::io::write(&socket, b"?");
                let (accepted, _) = soon(|| listener.accept().ok());

                let origin = node.origin(&accepted).map(|origin| origin.pod_cgroup_id);
                assert_eq!(origin, is_alive.then_some(pod.cgroup.id), "{case}");
                let more = [u64::from(is_alive), u64::from(!is_alive)];
                assert_eq!(counted(node), [before[0] + more[0], before[1] + more[1]], "{case}");
                let told = events::told(&mut events).into_iter();
                let told: Vec<_> =
                    told.map(|(kind, event)| (kind, event.pod_cgroup_id, event.address)).collect();
                let expired = (Counter::TicketExpired, pod.cgroup.id, endpoint(IMDS));
                assert_eq!(told, if is_alive { vec![] } else { vec![expired] }, "{case}");
                assert_eq!((node.live_tickets(), node.count_of(&pod)), (0, Some(0)), "{case}");
            }
        }
    });
}

#[test]
fn a_ticket_s_life_begins_with_the_handshake_and_not_with_connect() {
    Node::run(|node| {
        node.reload(|settings| settings.ticket_life = Duration::from_millis(200));
        // 1: as a client; 4: without a cookie, so that `connect` sends nothing.
        fs::write("/proc/sys/net/ipv4/tcp_fastopen", "5").unwrap();
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let socket = pod.run(tcp_socket);
        set_fastopen_connect(&socket);
        pod.run(|| redial(&socket, IMDS)).expect("it is put off");
        thread::sleep(Duration::from_millis(300));
        assert!(agent.try_accept().is_none(), "it was not put off");
        rustix::io::write(&socket, b"?").unwrap();
        assert_eq!(agent.accept().expect("anonymous").pod_cgroup_id, pod.cgroup.id);
    });
}

#[test]
fn a_dial_that_nobody_answers_is_told_with_the_pod_and_where_it_was_sent() {
    Node::run(|node| {
        let mut events = events::reader(node);
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let (patient, hasty) = (Duration::from_millis(300), Duration::from_millis(20));
        for (case, target, address, patience, is_told) in [
            ("no answer", NOBODY, IMDS, patient, true),
            ("no answer, v4-mapped", NOBODY, IMDS_MAPPED, patient, true),
            ("no answer, and no patience", NOBODY, IMDS, hasty, false),
            ("a refusal", AGENT_V4, IMDS, patient, false),
        ] {
            let before = node.count(Counter::Unanswered);
            let target = endpoint(&format!("{target}:80"));
            node.interceptor.set_target(Target { v4: target, ..own_pair() }).unwrap();
            pod.run(|| TcpStream::connect_timeout(&address.parse().unwrap(), patience)).expect_err(case);
            let told: Vec<_> = events::told(&mut events)
                .into_iter()
                .map(|(kind, event)| (kind, event.cgroup_id, event.pod_cgroup_id, event.address, event.tgid))
                .collect();
            let unanswered = (Counter::Unanswered, pod.container.id, pod.cgroup.id, target, process::id());
            assert_eq!(told, if is_told { vec![unanswered] } else { vec![] }, "{case}");
            assert_eq!(node.count(Counter::Unanswered) - before, u64::from(is_told), "{case}");
        }

        // A connection is an answer, however long it lasts and whoever ends it.
        node.interceptor.set_target(own_pair()).unwrap();
        let agent = node.agent();
        let stream = pod.dial(IMDS).unwrap();
        thread::sleep(patient);
        agent.accept().expect("anonymous");
        drop(stream);
        assert_eq!(events::told(&mut events), []);
    });
}

#[test]
fn a_redeemed_ticket_is_worth_nothing() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let _stream = pod.dial(IMDS).unwrap();
        let origin = agent.accept().expect("anonymous");

        wire::shake_hands(2_000, origin.ticket);
        assert_eq!(agent.accept(), None);
        assert_eq!((node.count(Counter::Redeemed), node.count(Counter::BadTicket)), (1, 1));
    });
}

#[test]
fn a_forged_ticket_is_worth_nothing() {
    Node::run(|node| {
        let agent = node.agent();
        for (port, ticket) in [(2_000, 0), (2_001, 1), (2_002, u64::MAX)] {
            wire::shake_hands(port, ticket);
            assert_eq!(agent.accept(), None, "{ticket}");
        }
        assert_eq!((node.count(Counter::Redeemed), node.count(Counter::BadTicket)), (0, 3));
    });
}

#[test]
fn a_dial_that_fails_leaves_no_ticket() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let dial = || TcpStream::connect_timeout(&IMDS.parse().unwrap(), Duration::from_millis(50));
        // Without a route the handshake never begins; the others begin one each.
        for (case, target, sent) in [
            ("no route", SocketAddr::from(([203, 0, 113, 1], 80)), 0),
            ("no listener", (AGENT_V4, 80).into(), 1),
            ("no answer", (NOBODY, 80).into(), 2),
        ] {
            let target = Target { v4: endpoint(&target.to_string()), ..own_pair() };
            node.interceptor.set_target(target).unwrap();
            pod.run(dial).expect_err(case);
            assert_eq!(node.count(Counter::TicketSent), sent, "{case}");
            assert_eq!(node.count(Counter::TicketDropped), sent, "{case}");
            assert_eq!(node.live_tickets(), 0, "{case}");
            assert_eq!(node.count_of(&pod), Some(0), "{case}");
        }
        assert_eq!(node.count(Counter::Redirected), 3);
    });
}

#[test]
fn a_redialled_socket_gets_a_new_ticket() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let socket = pod.run(tcp_socket);
        let own = format!("{AGENT_V4}:80");
        let mut tickets = Vec::new();
        for address in [IMDS, IMDS, &own, IMDS] {
            pod.run(|| redial(&socket, address)).unwrap();
            let origin = agent.accept().expect("anonymous");
            assert_eq!(origin.orig_dst, endpoint(address));
            assert!(!tickets.contains(&origin.ticket), "a ticket came twice");
            tickets.push(origin.ticket);
            connect_unspec(&socket).unwrap();
        }
        assert_eq!(node.live_tickets(), 0);
    });
}

#[test]
fn a_redialled_socket_does_not_carry_its_ticket_elsewhere() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        // The passive program counts what arrives here, too.
        let elsewhere = node.agent_at(&["127.0.0.1:8080".parse().unwrap()]);
        let agent = node.agent();
        let socket = pod.run(tcp_socket);
        pod.run(|| redial(&socket, IMDS)).unwrap();
        agent.accept().expect("anonymous");
        connect_unspec(&socket).unwrap();
        pod.run(|| redial(&socket, "127.0.0.1:8080")).unwrap();
        assert_eq!(elsewhere.accept(), None);
        assert_eq!((node.count(Counter::NoTicket), node.count(Counter::BadTicket)), (1, 0));
    });
}

#[test]
fn an_abandoned_handshake_does_not_leave_its_ticket_in_the_next_one() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let silent = Target { v4: endpoint(&format!("{NOBODY}:80")), ..own_pair() };
        node.interceptor.set_target(silent).unwrap();
        let elsewhere = node.agent_at(&["127.0.0.1:8080".parse().unwrap()]);
        let socket = pod.run(tcp_socket);
        rustix::io::ioctl_fionbio(&socket, true).unwrap();
        pod.run(|| redial(&socket, IMDS)).expect_err("the handshake is under way");
        connect_unspec(&socket).unwrap();
        assert_eq!(node.count(Counter::TicketDropped), 1);
        assert_eq!((node.live_tickets(), node.count_of(&pod)), (0, Some(0)));

        rustix::io::ioctl_fionbio(&socket, false).unwrap();
        pod.run(|| redial(&socket, "127.0.0.1:8080")).unwrap();
        assert_eq!(elsewhere.accept(), None);
        assert_eq!((node.count(Counter::NoTicket), node.count(Counter::BadTicket)), (1, 0));
    });
}

#[test]
fn a_dial_without_a_route_does_not_leave_its_ticket_for_the_next_destination() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        node.interceptor.set_target(Target { v4: endpoint("203.0.113.1:80"), ..own_pair() }).unwrap();
        let elsewhere = node.agent_at(&["127.0.0.1:8080".parse().unwrap()]);
        let socket = pod.run(tcp_socket);
        pod.run(|| redial(&socket, IMDS)).expect_err("there is no route");
        pod.run(|| redial(&socket, "127.0.0.1:8080")).unwrap();
        assert_eq!(elsewhere.accept(), None);
        assert_eq!((node.count(Counter::NoTicket), node.count(Counter::TicketSent)), (1, 0));
    });
}

#[test]
fn a_pod_that_is_left_alone_does_not_send_a_former_ticket() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let socket = pod.run(tcp_socket);
        pod.run(|| redial(&socket, IMDS)).unwrap();
        agent.accept().expect("anonymous");
        connect_unspec(&socket).unwrap();

        node.interceptor.set_policy(pod.cgroup.id, PodPolicy { imds: IMDS_OFF, pod_identity: 0 }).unwrap();
        pod.run(|| redial(&socket, &format!("{AGENT_V4}:80"))).unwrap();
        assert_eq!(agent.accept(), None);
        assert_eq!((node.count(Counter::NoTicket), node.count(Counter::BadTicket)), (1, 0));
    });
}

#[test]
fn a_dial_that_was_redirected_already_keeps_its_origin() {
    // What the second of two programs sees while one replaces the other: the target, and an origin minted for it.
    // Here the first dial fails for want of a route, so that its origin waits for the second.
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let late = "203.0.113.1:80";
        node.interceptor.set_target(Target { v4: endpoint(late), ..own_pair() }).unwrap();
        let socket = pod.run(tcp_socket);
        pod.run(|| redial(&socket, IMDS)).expect_err("there is no route");

        add_address(IpAddr::from([203, 0, 113, 1]));
        let agent = node.agent_at(&[late.parse().unwrap()]);
        pod.run(|| redial(&socket, late)).unwrap();
        assert_eq!(agent.accept().expect("anonymous").orig_dst, endpoint(IMDS));
        assert_eq!(node.count(Counter::Redirected), 1);
    });
}

#[test]
fn the_ticket_is_sent_until_the_agent_has_answered() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let listener = node.as_agent(|| listen((AGENT_V4, 80).into())).unwrap();
        listener.set_nonblocking(false).unwrap();
        let wire = Wire::watch();
        let mut client = pod.dial(IMDS).unwrap();
        let port = client.local_addr().unwrap().port();
        let (mut server, _) = listener.accept().unwrap();
        let handshake = wire.tickets_from(port);
        assert!(!handshake.is_empty() && handshake.iter().all(|&ticket| ticket), "{handshake:?}");

        let mut exchange = || {
            let mut byte = [0];
            client.write_all(b"?").unwrap();
            server.read_exact(&mut byte).unwrap();
            server.write_all(b"!").unwrap();
            client.read_exact(&mut byte).unwrap();
            wire.tickets_from(port)
        };
        let first = exchange();
        assert!(first.first() == Some(&true), "{first:?}");
        let later: Vec<_> = (0..5).flat_map(|_| exchange()).collect();
        assert!(!later.is_empty() && later.iter().all(|&ticket| !ticket), "{later:?}");
    });
}

#[test]
fn a_long_request_is_unharmed_by_the_option() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let listener = node.as_agent(|| listen((AGENT_V4, 80).into())).unwrap();
        listener.set_nonblocking(false).unwrap();
        let mut client = pod.dial(IMDS).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let request: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let expected = request.clone();
        let writer = thread::spawn(move || client.write_all(&request).unwrap());
        let mut received = Vec::new();
        server.read_to_end(&mut received).unwrap();
        writer.join().unwrap();
        assert!(received == expected, "the bytes differ");
        assert_eq!(node.count(Counter::OptionNoRoom), 0);
    });
}
