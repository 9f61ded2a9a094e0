//! The ticket's life: sent once, redeemed once, never left behind.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    process::Command,
    thread,
    time::Duration,
};

use agent::accept::listen;
use agent_common::{
    counter::Counter,
    policy::{IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_ON, PodPolicy},
    target::Target,
};
use rustix::net::connect_unspec;

use crate::{
    IMDS, IMDS_MAPPED, IMDS_V6, POD_IDENTITY, endpoint,
    kernel_node::{AGENT_V4, NOBODY, Node, add_address, own_pair, soon},
    options::{attach_filter, detach_filter, no_bare_acks, only_syns},
    reconnect, tcp_socket,
    wire::{self, Wire},
};

#[test]
fn with_syn_cookies_the_ticket_comes_with_the_ack() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        for cookies in ["0", "1", "2"] {
            fs::write("/proc/sys/net/ipv4/tcp_syncookies", cookies).unwrap();
            for address in [IMDS, IMDS_V6, IMDS_MAPPED] {
                let _stream = pod.connect(address).unwrap();
                let origin =
                    agent.accept().unwrap_or_else(|| panic!("{address} with tcp_syncookies={cookies}"));
                assert_eq!(origin.pod_cgroup_id, pod.cgroup.id);
            }
        }
        assert_eq!(node.live_tickets(), 0);
    });
}

#[test]
fn with_syn_cookies_the_ticket_survives_the_loss_of_segments() {
    Node::run(|node| {
        fs::write("/proc/sys/net/ipv4/tcp_syncookies", "2").unwrap();
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let listener = node.as_agent(|| listen((AGENT_V4, 80).into())).unwrap();
        // What is lost: the handshake's ACK, and with it the first data.
        for data_is_lost in [false, true] {
            let mut filter = if data_is_lost { only_syns() } else { no_bare_acks() };
            attach_filter(&listener, &mut filter);
            let mut stream = pod.connect(IMDS).unwrap();
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

#[test]
fn a_redeemed_ticket_is_worth_nothing() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let _stream = pod.connect(IMDS).unwrap();
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
fn a_failed_connect_leaves_no_ticket() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let open_connection =
            || TcpStream::connect_timeout(&IMDS.parse().unwrap(), Duration::from_millis(50));
        // Without a route the handshake never begins; the others begin one each.
        for (case, target, sent) in [
            ("no route", SocketAddr::from(([203, 0, 113, 1], 80)), 0),
            ("no listener", (AGENT_V4, 80).into(), 1),
            ("no answer", (NOBODY, 80).into(), 2),
        ] {
            let target = Target { v4: endpoint(&target.to_string()), ..own_pair() };
            node.interceptor.set_target(target).unwrap();
            pod.run(open_connection).expect_err(case);
            assert_eq!(node.count(Counter::TicketSent), sent, "{case}");
            assert_eq!(node.count(Counter::TicketDropped), sent, "{case}");
            assert_eq!(node.live_tickets(), 0, "{case}");
            assert_eq!(node.count_of(&pod), Some(0), "{case}");
        }
        assert_eq!(node.count(Counter::Redirected), 3);
    });
}

#[test]
fn a_reconnected_socket_gets_a_new_ticket() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let socket = pod.run(tcp_socket);
        let own = format!("{AGENT_V4}:80");
        let mut tickets = Vec::new();
        for address in [IMDS, IMDS, &own, IMDS] {
            pod.run(|| reconnect(&socket, address)).unwrap();
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
fn a_reconnected_socket_does_not_carry_its_ticket_elsewhere() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        // The passive program counts what arrives here, too.
        let elsewhere = node.agent_at(&["127.0.0.2:8080".parse().unwrap()]);
        let agent = node.agent();
        let socket = pod.run(tcp_socket);
        pod.run(|| reconnect(&socket, IMDS)).unwrap();
        agent.accept().expect("anonymous");
        connect_unspec(&socket).unwrap();
        pod.run(|| reconnect(&socket, "127.0.0.2:8080")).unwrap();
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
        let elsewhere = node.agent_at(&["127.0.0.2:8080".parse().unwrap()]);
        let socket = pod.run(tcp_socket);
        rustix::io::ioctl_fionbio(&socket, true).unwrap();
        pod.run(|| reconnect(&socket, IMDS)).expect_err("the handshake is under way");
        connect_unspec(&socket).unwrap();
        assert_eq!(node.count(Counter::TicketDropped), 1);
        assert_eq!((node.live_tickets(), node.count_of(&pod)), (0, Some(0)));

        rustix::io::ioctl_fionbio(&socket, false).unwrap();
        pod.run(|| reconnect(&socket, "127.0.0.2:8080")).unwrap();
        assert_eq!(elsewhere.accept(), None);
        assert_eq!((node.count(Counter::NoTicket), node.count(Counter::BadTicket)), (1, 0));
    });
}

#[test]
fn a_connect_without_a_route_leaves_no_ticket_for_the_next() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        node.interceptor.set_target(Target { v4: endpoint("203.0.113.1:80"), ..own_pair() }).unwrap();
        let elsewhere = node.agent_at(&["127.0.0.2:8080".parse().unwrap()]);
        let socket = pod.run(tcp_socket);
        pod.run(|| reconnect(&socket, IMDS)).expect_err("there is no route");
        pod.run(|| reconnect(&socket, "127.0.0.2:8080")).unwrap();
        assert_eq!(elsewhere.accept(), None);
        assert_eq!((node.count(Counter::NoTicket), node.count(Counter::TicketSent)), (1, 0));
    });
}

#[test]
fn a_ticket_is_good_only_where_it_was_sent() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let (agent, elsewhere) = (node.agent(), node.agent_at(&["127.0.0.2:8080".parse().unwrap()]));
        let _direct = pod.connect(IMDS).unwrap();
        assert!(agent.accept().is_some(), "the control");
        // As a node does that translates the address for a Service or a host port.
        let divert = format!(
            "add table ip divert; add chain ip divert out {{ type nat hook output priority -100; }}; \
             add rule ip divert out ip daddr {AGENT_V4} tcp dport 80 dnat to 127.0.0.2:8080"
        );
        assert!(Command::new("nft").arg(divert).status().unwrap().success());
        let _diverted = pod.connect(IMDS).unwrap();
        assert_eq!(elsewhere.accept(), None);
        assert_eq!(node.count(Counter::DivertedTicket), 1);
        assert_eq!(node.live_tickets(), 1, "it stays good where it was sent");
    });
}

#[test]
fn a_pod_that_is_left_alone_does_not_send_an_earlier_ticket() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let (agent, elsewhere) = (node.agent(), node.agent_at(&[POD_IDENTITY.parse().unwrap()]));
        let socket = pod.run(tcp_socket);
        pod.run(|| reconnect(&socket, IMDS)).unwrap();
        agent.accept().expect("anonymous");
        connect_unspec(&socket).unwrap();

        node.interceptor.set_policy(pod.cgroup.id, PodPolicy { imds: IMDS_OFF, pod_identity: 0 }).unwrap();
        pod.run(|| reconnect(&socket, POD_IDENTITY)).unwrap();
        assert_eq!(elsewhere.accept(), None);
        assert_eq!((node.count(Counter::NoTicket), node.count(Counter::BadTicket)), (1, 0));
    });
}

#[test]
fn a_connection_that_was_redirected_already_keeps_its_origin() {
    // What the second of two programs sees while one replaces the other: the target, and an origin minted for it.
    // Here the first connection fails for want of a route, so that its origin waits for the second.
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let late = "203.0.113.1:80";
        node.interceptor.set_target(Target { v4: endpoint(late), ..own_pair() }).unwrap();
        let socket = pod.run(tcp_socket);
        pod.run(|| reconnect(&socket, IMDS)).expect_err("there is no route");

        add_address(IpAddr::from([203, 0, 113, 1]));
        let agent = node.agent_at(&[late.parse().unwrap()]);
        pod.run(|| reconnect(&socket, late)).unwrap();
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
        let mut client = pod.connect(IMDS).unwrap();
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
        let mut client = pod.connect(IMDS).unwrap();
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
