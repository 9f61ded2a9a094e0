//! Who connected: the origin on the accepted socket.

use std::{
    collections::HashSet,
    fs,
    net::{SocketAddr, TcpListener},
    process,
};

use agent::identity::netns;
use agent_common::{
    counter::Counter,
    net::Endpoint,
    origin::{Origin, STATE_SENT},
    policy::{IMDS_DENY, IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_OFF, POD_IDENTITY_ON, PodPolicy},
    target::Target,
};
use rustix::{
    net::{connect_unspec, getpeername},
    time::{ClockId, clock_gettime},
};

use crate::{
    ECS, IMDS, IMDS_MAPPED, IMDS_V6, POD_IDENTITY, POD_IDENTITY_MAPPED, POD_IDENTITY_V6, endpoint, is_eperm,
    kernel_node::{AGENT_V4, AGENT_V6, Cgroup, Node, RealService, open_connection, outside, own_pair, soon},
    reconnect, tcp_socket,
};

fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap()
}

/// The name of this thread as the kernel has it.
fn comm() -> [u8; 16] {
    let name = fs::read("/proc/thread-self/comm").unwrap();
    let name = name.trim_ascii_end();
    let mut comm = [0; 16];
    comm[..name.len()].copy_from_slice(name);
    comm
}

#[test]
fn a_pods_connection_arrives_with_its_origin() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let services = [IMDS, IMDS_V6, IMDS_MAPPED, POD_IDENTITY, POD_IDENTITY_V6, POD_IDENTITY_MAPPED, ECS];
        for address in services {
            let before = boottime_ns();
            let stream = pod.connect(address).unwrap();
            let origin = agent.accept().unwrap_or_else(|| panic!("{address}: anonymous"));

            let target = if endpoint(address).is_ip4() { AGENT_V4.into() } else { AGENT_V6.into() };
            let expected = Origin {
                cgroup_id: pod.container.id,
                pod_cgroup_id: pod.cgroup.id,
                netns_cookie: netns::cookie(&stream).unwrap(),
                orig_dst: endpoint(address),
                target: Endpoint::new(target, 80),
                state: STATE_SENT,
                tgid: process::id(),
                comm: comm(),
                // Checked below.
                started_at_ns: origin.started_at_ns,
                // Of no interest here.
                ticket: origin.ticket,
            };
            assert_eq!(origin, expected, "{address}");
            assert!((before..=boottime_ns()).contains(&origin.started_at_ns), "{address}: {origin:?}");
        }
        assert_eq!(node.count(Counter::Redirected), 7);
        assert_eq!(node.count(Counter::Redeemed), 7);
        assert_eq!(node.live_tickets(), 0);
    });
}

#[test]
fn a_pod_sees_the_original_destination() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let own = [format!("{AGENT_V4}:80"), format!("[{AGENT_V6}]:80")];
        let services = [IMDS, IMDS_V6, IMDS_MAPPED, POD_IDENTITY, POD_IDENTITY_V6, POD_IDENTITY_MAPPED, ECS];
        for address in services.into_iter().chain(own.iter().map(String::as_str)) {
            let stream = pod.connect(address).unwrap();
            agent.accept().expect("anonymous");
            assert_eq!(stream.peer_addr().unwrap(), address.parse().unwrap());
        }
        // The control: without the programs the same socket shows where it has really gone.
        let stream = pod.connect(IMDS).unwrap();
        agent.accept().expect("anonymous");
        node.detach();
        assert_eq!(stream.peer_addr().unwrap(), (AGENT_V4, 80).into());
    });
}

#[test]
fn a_reused_socket_never_shows_an_earlier_address() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let elsewhere = RealService::listen("127.0.0.1:8080");
        let socket = pod.run(tcp_socket);
        let peer = || SocketAddr::try_from(getpeername(&socket).unwrap().unwrap()).unwrap();
        let own = format!("{AGENT_V4}:80");
        // Last as a pod that is left alone: it connects to the agent's address on its own account.
        for (address, imds) in [
            (IMDS, IMDS_INTERCEPT),
            ("127.0.0.1:8080", IMDS_INTERCEPT),
            (POD_IDENTITY, IMDS_INTERCEPT),
            (&own, IMDS_OFF),
        ] {
            let pod_identity = if imds == IMDS_OFF { POD_IDENTITY_OFF } else { POD_IDENTITY_ON };
            node.interceptor.set_policy(pod.cgroup.id, PodPolicy { imds, pod_identity }).unwrap();
            pod.run(|| reconnect(&socket, address)).unwrap();
            assert_eq!(peer(), address.parse().unwrap());
            soon(|| agent.try_accept().map(drop).or_else(|| elsewhere.try_accept()));
            connect_unspec(&socket).unwrap();
        }
    });
}

#[test]
fn the_pod_is_found_at_every_depth() {
    Node::run(|node| {
        let burstable = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let guaranteed = node.guaranteed_pod("b", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let nested = |cgroup: &Cgroup| Cgroup::create(cgroup.path.join("nested/twice"));
        let runtime = |cgroup: &Cgroup| {
            let inner = "kubepods.slice/kubepods-podinner.slice/cri-containerd-4567.scope";
            Cgroup::create(cgroup.path.join(inner))
        };
        let cases = [
            ("the pod's own cgroup", &burstable, burstable.cgroup.clone()),
            ("a container", &burstable, burstable.container.clone()),
            ("a container's own cgroups", &burstable, nested(&burstable.container)),
            ("a container runtime inside of a container", &burstable, runtime(&burstable.container)),
            ("a Guaranteed pod's own cgroup", &guaranteed, guaranteed.cgroup.clone()),
            ("a Guaranteed pod's container", &guaranteed, guaranteed.container.clone()),
            ("a Guaranteed pod's container's own cgroups", &guaranteed, nested(&guaranteed.container)),
        ];
        let agent = node.agent();
        for (case, pod, cgroup) in cases {
            let _stream = cgroup.run(|| open_connection(IMDS)).unwrap();
            let origin = agent.accept().expect(case);
            assert_eq!((origin.cgroup_id, origin.pod_cgroup_id), (cgroup.id, pod.cgroup.id), "{case}");
        }
    });
}

#[test]
fn two_pods_are_never_taken_for_each_other() {
    Node::run(|node| {
        let pods = ["a", "b"].map(|name| node.pod(name, IMDS_INTERCEPT, POD_IDENTITY_ON));
        let agent = node.agent();
        let mut tickets = HashSet::new();
        for _ in 0..20 {
            for pod in &pods {
                let _stream = pod.connect(POD_IDENTITY).unwrap();
                let origin = agent.accept().expect("anonymous");
                assert_eq!(origin.pod_cgroup_id, pod.cgroup.id);
                assert!(tickets.insert(origin.ticket), "a ticket came twice");
            }
        }
    });
}

#[test]
fn a_connection_to_the_agent_itself_arrives_with_its_origin() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_OFF, POD_IDENTITY_ON);
        for address in
            [format!("{AGENT_V4}:80"), format!("[::ffff:{AGENT_V4}]:80"), format!("[{AGENT_V6}]:80")]
        {
            let agent = node.agent();
            let _stream = pod.connect(&address).unwrap();
            let origin = agent.accept().expect(&address);
            assert_eq!(origin.pod_cgroup_id, pod.cgroup.id, "{address}");
            assert_eq!((origin.orig_dst, origin.target), (endpoint(&address), endpoint(&address)));
        }
    });
}

#[test]
fn without_rewriting_there_is_a_ticket_all_the_same() {
    Node::run(|node| {
        let target = Target { v4: endpoint(POD_IDENTITY), v6: endpoint(POD_IDENTITY_V6), ..own_pair() };
        node.interceptor.set_target(target).unwrap();
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent_at(&[POD_IDENTITY, POD_IDENTITY_V6].map(|address| address.parse().unwrap()));
        for (address, target) in [
            (POD_IDENTITY, POD_IDENTITY),
            (POD_IDENTITY_V6, POD_IDENTITY_V6),
            (POD_IDENTITY_MAPPED, POD_IDENTITY),
            (IMDS, POD_IDENTITY),
            (IMDS_V6, POD_IDENTITY_V6),
            (ECS, POD_IDENTITY),
        ] {
            let _stream = pod.connect(address).unwrap();
            let origin = agent.accept().expect(address);
            assert_eq!((origin.orig_dst, origin.target), (endpoint(address), endpoint(target)));
            assert_eq!(origin.pod_cgroup_id, pod.cgroup.id, "{address}");
        }
    });
}

#[test]
fn a_pod_with_only_imds_intercepted_has_a_ticket_for_the_agent() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_OFF);
        let agent = node.agent();
        let _stream = pod.connect(&format!("{AGENT_V4}:80")).unwrap();
        assert_eq!(agent.accept().expect("anonymous").pod_cgroup_id, pod.cgroup.id);
    });
}

#[test]
fn an_unknown_pod_gets_the_policy_of_unknown_pods_and_no_pod_cgroup() {
    Node::run(|node| {
        let pod = node.unknown_pod("new");
        let real = RealService::listen(IMDS);
        let _stream = pod.connect(IMDS).unwrap();
        real.accept();

        let policy = PodPolicy { imds: IMDS_INTERCEPT, pod_identity: POD_IDENTITY_ON };
        node.interceptor.set_unknown_pods(policy, PodPolicy::EXEMPT).unwrap();
        let agent = node.agent();
        let _stream = pod.connect(IMDS).unwrap();
        let origin = agent.accept().expect("anonymous");
        assert_eq!((origin.cgroup_id, origin.pod_cgroup_id), (pod.container.id, 0));
        assert_eq!(node.count(Counter::UnknownPod), 2);
    });
}

#[test]
fn an_unknown_host_network_pod_gets_a_policy_of_its_own() {
    Node::run(|node| {
        let strict = PodPolicy { imds: IMDS_DENY, pod_identity: POD_IDENTITY_ON };
        let pod = node.unknown_pod("new");
        let known = node.pod("known", IMDS_DENY, POD_IDENTITY_ON);
        for (in_pod_network, on_host_network, refused_in_pod, refused_on_host) in
            [(strict, PodPolicy::EXEMPT, true, false), (PodPolicy::EXEMPT, strict, false, true)]
        {
            node.interceptor.set_unknown_pods(in_pod_network, on_host_network).unwrap();
            let open_connection = || reconnect(&tcp_socket(), IMDS);
            assert_eq!(is_eperm(&pod.run(open_connection)), refused_in_pod);
            node.on_host_network(|| {
                assert_eq!(is_eperm(&pod.run(open_connection)), refused_on_host);
                assert!(is_eperm(&known.run(open_connection)), "a known pod's own policy always counts");
            });
        }
    });
}

#[test]
fn a_forgotten_pod_is_unknown() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        node.interceptor.remove_policy(pod.cgroup.id).unwrap();
        node.interceptor.remove_policy(pod.cgroup.id).expect("once more is fine");
        let real = RealService::listen(IMDS);
        let _stream = pod.connect(IMDS).unwrap();
        real.accept();
        assert_eq!(node.count(Counter::UnknownPod), 1);
    });
}

#[test]
fn a_task_in_no_pod_is_refused_on_the_socket_of_a_pod() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        // As deep as a container, but not below kubepods.
        let system = node.kubepods.path.with_file_name("system.slice");
        let service = Cgroup::create(system.join("a.slice/b.slice/c.service"));
        for address in [IMDS, POD_IDENTITY, ECS] {
            let socket = pod.run(tcp_socket);
            assert!(is_eperm(&outside(|| reconnect(&socket, address))), "{address}");
            assert!(is_eperm(&service.run(|| reconnect(&socket, address))), "{address}");
            // In kubepods, but in no pod.
            assert!(is_eperm(&node.kubepods.run(|| reconnect(&socket, address))), "{address}");
        }
        assert_eq!(node.count(Counter::DeniedNoPod), 9);
        // Elsewhere such a task may connect to what it likes.
        let other = outside(|| TcpListener::bind("127.0.0.1:0")).unwrap();
        let socket = pod.run(tcp_socket);
        let address = other.local_addr().unwrap().to_string();
        outside(|| reconnect(&socket, &address)).unwrap();
    });
}

#[test]
fn the_connecting_task_counts_and_not_the_sockets_maker() {
    Node::run(|node| {
        let [maker, source_pod] = ["a", "b"].map(|name| node.pod(name, IMDS_INTERCEPT, POD_IDENTITY_ON));
        let agent = node.agent();
        let socket = maker.run(tcp_socket);
        source_pod.run(|| reconnect(&socket, IMDS)).unwrap();
        assert_eq!(agent.accept().expect("anonymous").pod_cgroup_id, source_pod.cgroup.id);
    });
}

#[test]
fn a_caller_outside_of_pods_is_anonymous() {
    Node::run(|node| {
        let agent = node.agent();
        let _stream = outside(|| open_connection(&format!("{AGENT_V4}:80"))).unwrap();
        assert_eq!(agent.accept(), None);
        assert_eq!(node.count(Counter::NoTicket), 1);
    });
}
