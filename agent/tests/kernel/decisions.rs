//! What happens to a connection: redirected, left alone or refused.

use std::net::{TcpListener, UdpSocket};

use agent_common::{
    counter::Counter,
    net::Endpoint,
    policy::{IMDS_AUDIT, IMDS_DENY, IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_OFF, POD_IDENTITY_ON, PodPolicy},
    target::Target,
};

use crate::{
    ECS, IMDS, IMDS_MAPPED, IMDS_V6, POD_IDENTITY, POD_IDENTITY_MAPPED, POD_IDENTITY_V6, endpoint, is_eperm,
    kernel_node::{
        AGENT_V4, AGENT_V6, Agent, Node, Pod, RealService, open_connection, outside, own_pair, soon,
    },
};

/// Where a connection ends.
#[derive(Debug, PartialEq, Eq)]
enum End {
    RealService,
    Agent,
    Refused,
}

/// Connects to `address` and finds out where the connection ends.
fn end_of(pod: &Pod, address: &str, real: &RealService, agent: &Agent) -> End {
    let stream = pod.connect(address);
    if is_eperm(&stream) {
        return End::Refused;
    }
    let _stream = stream.unwrap();
    soon(|| {
        let at_real = real.try_accept().map(|()| End::RealService);
        at_real.or_else(|| {
            let origin = agent.try_accept()?;
            assert!(origin.is_some(), "{address}: anonymous");
            Some(End::Agent)
        })
    })
}

#[test]
fn the_policy_decides_what_happens_to_each_service() {
    Node::run(|node| {
        // One policy after the other, each with a service that it is about.
        let cases = [
            (IMDS_OFF, POD_IDENTITY_ON, End::RealService, End::Agent),
            (IMDS_AUDIT, POD_IDENTITY_ON, End::RealService, End::Agent),
            (IMDS_INTERCEPT, POD_IDENTITY_ON, End::Agent, End::Agent),
            (IMDS_DENY, POD_IDENTITY_ON, End::Refused, End::Agent),
            (IMDS_INTERCEPT, POD_IDENTITY_OFF, End::Agent, End::RealService),
            (IMDS_DENY, POD_IDENTITY_OFF, End::Refused, End::RealService),
            (IMDS_OFF, POD_IDENTITY_OFF, End::RealService, End::RealService),
            // Neither is a mode: the strictest counts.
            (77, 77, End::Refused, End::Agent),
        ];
        let pod = node.pod("a", IMDS_OFF, POD_IDENTITY_OFF);
        for (imds, pod_identity, imds_end, pod_identity_end) in cases {
            // The same pod: a change counts from the next connection on.
            node.interceptor.set_policy(pod.cgroup.id, PodPolicy { imds, pod_identity }).unwrap();
            let agent = node.agent();
            for (address, real_address, end) in [
                (IMDS, IMDS, &imds_end),
                (IMDS_V6, IMDS_V6, &imds_end),
                (IMDS_MAPPED, IMDS, &imds_end),
                (POD_IDENTITY, POD_IDENTITY, &pod_identity_end),
                (POD_IDENTITY_V6, POD_IDENTITY_V6, &pod_identity_end),
                (POD_IDENTITY_MAPPED, POD_IDENTITY, &pod_identity_end),
                (ECS, ECS, &pod_identity_end),
            ] {
                let real = RealService::listen(real_address);
                let case = format!("imds {imds}, pod identity {pod_identity}, {address}");
                assert_eq!(&end_of(&pod, address, &real, &agent), end, "{case}");
            }
        }
        // Three addresses of the metadata service, four of the others.
        assert_eq!(node.count(Counter::Audited), 3);
        assert_eq!(node.count(Counter::Denied), 3 * 3);
        assert_eq!(node.count(Counter::Redirected), 2 * 3 + 5 * 4);
        assert_eq!(node.count(Counter::Untouched), 2 * 3 + 3 * 4);
        assert_eq!(node.live_tickets(), 0);
    });
}

#[test]
fn ports_that_are_not_served_are_refused_where_the_service_is_ours() {
    Node::run(|node| {
        let agent_v4 = format!("{AGENT_V4}:81");
        let agent_mapped = format!("[::ffff:{AGENT_V4}]:81");
        let agent_v6 = format!("[{AGENT_V6}]:81");
        let imds = ["169.254.169.254:8080", "[fd00:ec2::254]:8080", "[::ffff:169.254.169.254]:53"];
        let ours = [
            "169.254.170.23:81",
            "[fd00:ec2::23]:2703",
            "169.254.170.2:443",
            &agent_v4,
            &agent_mapped,
            &agent_v6,
        ];
        for (name, imds_mode, pod_identity, imds_refused, ours_refused) in [
            ("a", IMDS_INTERCEPT, POD_IDENTITY_ON, true, true),
            ("b", IMDS_DENY, POD_IDENTITY_ON, true, true),
            ("c", IMDS_AUDIT, POD_IDENTITY_ON, false, true),
            ("d", IMDS_OFF, POD_IDENTITY_OFF, false, false),
        ] {
            let pod = node.pod(name, imds_mode, pod_identity);
            let cases = imds.map(|address| (address, imds_refused));
            for (address, refused) in cases.into_iter().chain(ours.map(|address| (address, ours_refused))) {
                let error = pod.connect(address).expect_err("nobody listens");
                let expected = if refused { libc::EPERM } else { libc::ECONNREFUSED };
                assert_eq!(error.raw_os_error(), Some(expected), "{name} {address}: {error}");
            }
        }
        assert_eq!(node.count(Counter::DeniedPort), 9 + 9 + 6);
    });
}

#[test]
fn udp_is_refused_where_the_service_is_ours() {
    Node::run(|node| {
        let strict = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let loose = node.pod("b", IMDS_AUDIT, POD_IDENTITY_OFF);
        let agent_v4 = format!("{AGENT_V4}:80");
        for address in [IMDS, IMDS_V6, POD_IDENTITY, POD_IDENTITY_V6, ECS, &agent_v4, "169.254.169.254:53"] {
            let any = if address.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" };
            let connect = || UdpSocket::bind(any).unwrap().connect(address);
            assert!(is_eperm(&strict.run(connect)), "{address}");
            loose.run(connect).unwrap_or_else(|error| panic!("{address}: {error}"));
        }
    });
}

#[test]
fn other_destinations_are_never_touched() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_DENY, POD_IDENTITY_ON);
        // No target of either family: its unspecified address is not the pod's own `::` and 0.0.0.0.
        let nowhere = Target { v4: Endpoint::NONE, v6: Endpoint::NONE, ..own_pair() };
        for target in [own_pair(), nowhere] {
            node.interceptor.set_target(target).unwrap();
            for (listen, address) in [
                ("127.0.0.1", "127.0.0.1"),
                ("127.0.0.1", "0.0.0.0"),
                ("127.0.0.1", "[::ffff:127.0.0.1]"),
                ("[::1]", "[::1]"),
                ("[::1]", "[::]"),
            ] {
                let listener = outside(|| TcpListener::bind(format!("{listen}:0"))).unwrap();
                let port = listener.local_addr().unwrap().port();
                pod.connect(&format!("{address}:{port}"))
                    .unwrap_or_else(|error| panic!("{address}: {error}"));
            }
        }
        let counters = node.interceptor.counters().read().unwrap();
        assert!(counters.iter().all(|&(_, count)| count == 0), "{counters:?}");
    });
}

#[test]
fn a_process_outside_of_kubepods_is_never_touched() {
    Node::run(|node| {
        node.pod("a", IMDS_DENY, POD_IDENTITY_ON);
        for address in [IMDS, IMDS_V6, POD_IDENTITY, ECS] {
            let real = RealService::listen(address);
            let _stream = outside(|| open_connection(address)).unwrap();
            real.accept();
        }
        let counters = node.interceptor.counters().read().unwrap();
        assert!(counters.iter().all(|&(_, count)| count == 0), "{counters:?}");
    });
}

#[test]
fn an_exempt_cgroup_reaches_the_real_services() {
    Node::run(|node| {
        let agent = node.agent();
        for address in [IMDS, IMDS_V6, IMDS_MAPPED, POD_IDENTITY, ECS] {
            let endpoint = endpoint(address);
            let real = RealService::listen(&format!("{endpoint:?}"));
            let _stream = node.as_agent(|| open_connection(address)).unwrap();
            real.accept();
        }
        assert!(agent.try_accept().is_none(), "a connection went to the agent");
        assert_eq!(node.count(Counter::Untouched), 5);
    });
}

#[test]
fn without_a_target_our_services_are_refused() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let v4_only = Target { v6: Endpoint::NONE, ..own_pair() };
        node.interceptor.set_target(v4_only).unwrap();
        let agent = node.agent();
        assert!(is_eperm(&pod.connect(IMDS_V6)));
        assert!(is_eperm(&pod.connect(POD_IDENTITY_V6)));
        assert_eq!(node.count(Counter::DeniedInternal), 2);
        let _stream = pod.connect(IMDS).unwrap();
        agent.accept().expect("anonymous");
    });
}

#[test]
fn a_new_target_counts_from_the_next_connection_on() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        for generation in 1..=4 {
            let address = format!("127.0.0.{generation}:80");
            let target = Target { v4: endpoint(&address), ..own_pair() };
            node.interceptor.set_target(target).unwrap();
            let agent = node.agent_at(&[address.parse().unwrap()]);
            let _stream = pod.connect(IMDS).unwrap();
            assert_eq!(agent.accept().expect("anonymous").target, endpoint(&address));
        }
    });
}

#[test]
fn a_target_on_another_port_leaves_the_service_port_redirected() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let target = Target { v4: endpoint("169.254.170.23:8080"), ..own_pair() };
        node.interceptor.set_target(target).unwrap();
        let agent = node.agent_at(&["169.254.170.23:8080".parse().unwrap()]);
        for address in [POD_IDENTITY, IMDS, "169.254.170.23:8080"] {
            let _stream = pod.connect(address).unwrap();
            agent.accept().expect(address);
        }
        assert!(is_eperm(&pod.connect("169.254.170.23:8081")));
    });
}

#[test]
fn dropped_programs_touch_nothing() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_DENY, POD_IDENTITY_ON);
        let real = RealService::listen(IMDS);
        assert!(is_eperm(&pod.connect(IMDS)));
        node.detach();
        let _stream = pod.connect(IMDS).unwrap();
        real.accept();
    });
}
