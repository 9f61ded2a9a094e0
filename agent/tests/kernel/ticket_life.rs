//! How long a ticket may be redeemed, and connections that nobody answers.

use std::{fs, net::TcpStream, process, thread, time::Duration};

use agent::accept::listen;
use agent_common::{
    counter::Counter,
    policy::{IMDS_INTERCEPT, POD_IDENTITY_ON},
    target::Target,
};

use crate::{
    IMDS, IMDS_MAPPED, endpoint, events,
    kernel_node::{AGENT_V4, NOBODY, Node, own_pair, soon},
    options::{attach_filter, detach_filter, everything, no_bare_acks, set_fastopen_connect},
    reconnect, tcp_socket,
};

#[test]
fn a_ticket_is_worth_nothing_after_its_life() {
    Node::run(|node| {
        late_handshakes(node, true);
        node.reload(|settings| settings.ticket_life = Duration::from_millis(200));
        late_handshakes(node, false);
    });
}

/// Handshakes that are complete 300 ms and more after they began. What is lost until then: the SYN, which comes again
/// after a second; the handshake's ACK, without which there is no connection before the first data if the agent's side
/// answers with a cookie.
fn late_handshakes(node: &mut Node, is_alive: bool) {
    let mut events = events::reader(node);
    let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
    for (cookies, mut lost) in [("0", everything()), ("2", no_bare_acks())] {
        let case = format!("tcp_syncookies={cookies}, is_alive: {is_alive}");
        fs::write("/proc/sys/net/ipv4/tcp_syncookies", cookies).unwrap();
        let counts = |node: &Node| [Counter::Redeemed, Counter::TicketExpired].map(|what| node.count(what));
        let [redeemed, expired] = counts(node);
        let listener = node.as_agent(|| listen((AGENT_V4, 80).into())).unwrap();
        attach_filter(&listener, &mut lost);
        let socket = pod.run(tcp_socket);
        rustix::io::ioctl_fionbio(&socket, true).unwrap();
        pod.run(|| reconnect(&socket, IMDS)).expect_err("the handshake takes a moment");
        thread::sleep(Duration::from_millis(300));
        assert!(listener.accept().is_err(), "{case}: nothing was lost");
        detach_filter(&listener);
        // Before there is a connection there is nothing to send.
        let _ = rustix::io::write(&socket, b"?");
        let (accepted, _) = soon(|| listener.accept().ok());

        let origin = node.origin(&accepted).map(|origin| origin.pod_cgroup_id);
        assert_eq!(origin, is_alive.then_some(pod.cgroup.id), "{case}");
        let more = u64::from(is_alive);
        assert_eq!(counts(node), [redeemed + more, expired + 1 - more], "{case}");
        let told = events::told(&mut events).into_iter();
        let told: Vec<_> = told.map(|(kind, event)| (kind, event.pod_cgroup_id, event.address)).collect();
        let expired = (Counter::TicketExpired, pod.cgroup.id, endpoint(IMDS));
        assert_eq!(told, if is_alive { vec![] } else { vec![expired] }, "{case}");
        assert_eq!((node.live_tickets(), node.count_of(&pod)), (0, Some(0)), "{case}");
    }
}

#[test]
fn the_life_of_a_ticket_begins_with_the_handshake_not_with_connect() {
    Node::run(|node| {
        node.reload(|settings| settings.ticket_life = Duration::from_millis(200));
        // 1: as a client; 4: without a cookie, so that `connect` sends nothing.
        fs::write("/proc/sys/net/ipv4/tcp_fastopen", "5").unwrap();
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let socket = pod.run(tcp_socket);
        set_fastopen_connect(&socket);
        pod.run(|| reconnect(&socket, IMDS)).expect("it is put off");
        thread::sleep(Duration::from_millis(300));
        assert!(agent.try_accept().is_none(), "it was not put off");
        rustix::io::write(&socket, b"?").unwrap();
        assert_eq!(agent.accept().expect("anonymous").pod_cgroup_id, pod.cgroup.id);
    });
}

#[test]
fn an_unanswered_connection_is_reported_with_pod_and_target() {
    Node::run(|node| {
        let mut events = events::reader(node);
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let (patient, hasty) = (Duration::from_millis(300), Duration::from_millis(20));
        for (case, target, address, timeout_limit, is_told) in [
            ("no answer", NOBODY, IMDS, patient, true),
            ("no answer, v4-mapped", NOBODY, IMDS_MAPPED, patient, true),
            ("no answer, and no timeout_limit", NOBODY, IMDS, hasty, false),
            ("a refusal", AGENT_V4, IMDS, patient, false),
        ] {
            let before = node.count(Counter::Unanswered);
            let target = endpoint(&format!("{target}:80"));
            node.interceptor.set_target(Target { v4: target, ..own_pair() }).unwrap();
            pod.run(|| TcpStream::connect_timeout(&address.parse().unwrap(), timeout_limit)).expect_err(case);
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
        let stream = pod.connect(IMDS).unwrap();
        thread::sleep(patient);
        agent.accept().expect("anonymous");
        drop(stream);
        assert_eq!(events::told(&mut events), []);
    });
}
