//! What the programs tell as it happens.

use std::{net::SocketAddr, process, time::Duration};

use agent::intercept::Events;
use agent_common::{
    counter::Counter,
    event::Event,
    net::Endpoint,
    policy::{IMDS_AUDIT, IMDS_DENY, IMDS_INTERCEPT, POD_IDENTITY_ON, PodPolicy},
};
use rustix::time::{ClockId, clock_gettime};
use tokio::time::timeout;

use crate::{
    ECS, IMDS, IMDS_V6, endpoint, is_eperm,
    kernel_node::{AGENT_V4, NOBODY, Node, RealService, open_connection, outside},
    reconnect, tcp_socket, wire,
};

/// The events that have happened, and no more than they.
pub(crate) fn told(events: &mut Events) -> Vec<(Counter, Event)> {
    let mut told = Vec::new();
    runtime().block_on(async {
        while let Ok(event) = timeout(Duration::from_millis(20), events.next()).await {
            told.push(event.unwrap());
        }
    });
    told
}

/// Where the events' reader is registered. One for each thread, and with it for each test.
fn runtime() -> &'static tokio::runtime::Runtime {
    thread_local! {
        static RUNTIME: &'static tokio::runtime::Runtime = Box::leak(Box::new(
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
        ));
    }
    RUNTIME.with(|runtime| *runtime)
}

pub(crate) fn reader(node: &mut Node) -> Events {
    let _guard = runtime().enter();
    node.interceptor.events().unwrap()
}

fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

#[test]
fn every_refusal_and_audited_connection_is_reported_with_its_pod() {
    Node::run(|node| {
        let mut events = reader(node);
        let pod = node.pod("a", IMDS_DENY, POD_IDENTITY_ON);
        let _real = [IMDS, IMDS_V6].map(RealService::listen);
        for (imds, address, refused, kind) in [
            (IMDS_DENY, IMDS, true, Counter::Denied),
            (IMDS_DENY, IMDS_V6, true, Counter::Denied),
            (IMDS_INTERCEPT, "169.254.169.254:8080", true, Counter::DeniedPort),
            (IMDS_AUDIT, IMDS, false, Counter::Audited),
            (IMDS_AUDIT, IMDS_V6, false, Counter::Audited),
        ] {
            let policy = PodPolicy { imds, pod_identity: POD_IDENTITY_ON };
            node.interceptor.set_policy(pod.cgroup.id, policy).unwrap();
            let before = boottime_ns();
            assert_eq!(is_eperm(&pod.connect(address)), refused, "{address}");
            let [(told, event)] = told(&mut events)[..] else { panic!("{address}: not one event") };
            assert_eq!((told, event.kind), (kind, kind as u32), "{address}");
            assert_eq!((event.cgroup_id, event.pod_cgroup_id), (pod.container.id, pod.cgroup.id));
            assert_eq!(event.address, endpoint(address));
            assert_eq!(event.netns_cookie, agent::identity::netns::own_cookie().unwrap());
            assert_eq!(event.tgid, process::id());
            assert!(event.tid != 0 && event.comm[0] != 0, "{event:?}");
            assert!((before..=boottime_ns()).contains(&event.at_ns), "{event:?}");
        }
        assert_eq!(events.skipped(), 0);
    });
}

#[test]
fn an_unknown_pod_a_task_in_no_pod_and_a_bad_ticket_are_told() {
    Node::run(|node| {
        let mut events = reader(node);
        let unknown = node.unknown_pod("new");
        let real = RealService::listen(IMDS);
        let _stream = unknown.connect(IMDS).unwrap();
        real.accept();
        let [(kind, event)] = told(&mut events)[..] else { panic!("not one event") };
        assert_eq!(
            (kind, event.cgroup_id, event.pod_cgroup_id),
            (Counter::UnknownPod, unknown.container.id, 0)
        );

        let socket = unknown.run(tcp_socket);
        assert!(is_eperm(&outside(|| reconnect(&socket, ECS))));
        let [(kind, event)] = told(&mut events)[..] else { panic!("not one event") };
        assert_eq!((kind, event.address), (Counter::DeniedNoPod, endpoint(ECS)));

        let agent = node.agent();
        wire::shake_hands(2_000, 1);
        assert_eq!(agent.accept(), None);
        let [(kind, event)] = told(&mut events)[..] else { panic!("not one event") };
        assert_eq!((kind, event.address), (Counter::BadTicket, Endpoint::new(NOBODY.into(), 2_000)));
    });
}

#[test]
fn what_is_served_or_elsewhere_is_not_told() {
    Node::run(|node| {
        let mut events = reader(node);
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        for address in [IMDS, &SocketAddr::from((AGENT_V4, 80)).to_string()] {
            let _stream = pod.connect(address).unwrap();
            agent.accept().expect("anonymous");
        }
        let elsewhere = RealService::listen("127.0.0.1:8080");
        let _stream = pod.connect("127.0.0.1:8080").unwrap();
        elsewhere.accept();
        let _stream = outside(|| open_connection(&format!("{AGENT_V4}:80"))).unwrap();
        assert_eq!(agent.accept(), None);
        assert_eq!(told(&mut events), []);
    });
}

#[test]
fn unread_events_are_counted_and_connections_decided_as_ever() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_DENY, POD_IDENTITY_ON);
        let connections = 4_000;
        pod.run(|| {
            for _ in 0..connections {
                assert!(is_eperm(&reconnect(&tcp_socket(), IMDS)));
            }
        });
        let lost = node.count(Counter::EventsDropped);
        assert!(lost > 0, "the ring holds more than {connections}");
        assert_eq!(node.count(Counter::Denied), connections);
        let mut events = reader(node);
        assert_eq!(u64::try_from(told(&mut events).len()).unwrap(), connections - lost);
        // There is room again.
        assert!(is_eperm(&pod.connect(IMDS)));
        assert_eq!(told(&mut events).len(), 1);
    });
}
