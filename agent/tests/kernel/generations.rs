//! From one agent to the next: what stays when one dies, and how another takes its place.

use std::{
    fs, io,
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use agent::{
    accept::listen,
    intercept::{Interceptor, Settings, Standing, pinned, unpin},
};
use agent_common::{
    abi::ABI_VERSION,
    counter::Counter,
    net::{POD_IDENTITY_V4, POD_IDENTITY_V6},
    policy::{IMDS_AUDIT, IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_OFF, POD_IDENTITY_ON, PodPolicy},
    target::{Target, WHEN_DOWN_PASS},
};

use crate::{
    ECS, IMDS, IMDS_MAPPED, IMDS_V6, POD_IDENTITY, endpoint, is_eperm,
    kernel_node::{AGENT_V4, AGENT_V6, Cgroup, Node, RealService, now_ns, open_connection, own_pair},
};

const SECOND: u64 = 1_000_000_000;
const INTERCEPT: PodPolicy = PodPolicy { imds: IMDS_INTERCEPT, pod_identity: POD_IDENTITY_ON };

/// Another agent of this node, in a container of its own.
fn successor(node: &Node) -> Interceptor {
    let mut interceptor = Interceptor::load(&of_successor(node)).unwrap();
    interceptor.exempt(other_agent(node).id).unwrap();
    interceptor
}

fn of_successor(node: &Node) -> Settings {
    Settings { agent_cgroup: other_agent(node).path, ..node.settings() }
}

fn other_agent(node: &Node) -> Cgroup {
    Cgroup::create(node.kubepods.path.join("kubepods-podother.slice"))
}

/// How many programs are attached for good.
fn links(node: &Node) -> usize {
    let pins = pinned(node.bpffs()).unwrap();
    pins.iter().filter(|pin| pin.parent().is_some_and(|parent| parent.ends_with("links"))).count()
}

/// What `own_pair` is, with an agent that leaves Pod Identity to AWS's while it is down.
fn with_eks_agent() -> Target {
    Target { when_down: WHEN_DOWN_PASS, ..own_pair() }
}

#[test]
fn a_silent_agent_means_refusals_for_its_destinations_alone() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let audited = node.pod("b", IMDS_AUDIT, POD_IDENTITY_OFF);
        let agent = node.agent();
        let elsewhere = RealService::listen("127.0.0.1:8080");
        let real = RealService::listen(IMDS);
        let now = now_ns();
        // A heartbeat may be a moment in the future.
        for (heartbeat, is_alive) in [
            (now, true),
            (now + SECOND, true),
            (now - SECOND, true),
            (now - 3 * SECOND, false),
            (0, false),
            (now, true),
        ] {
            node.set_heartbeat(heartbeat);
            for address in [IMDS, IMDS_MAPPED, IMDS_V6, POD_IDENTITY, crate::POD_IDENTITY_V6, ECS] {
                let connected = pod.connect(address);
                assert_eq!(is_eperm(&connected), !is_alive, "{address}: {connected:?}");
                if is_alive {
                    connected.unwrap();
                    assert!(agent.accept().is_some(), "{address}");
                }
            }
            pod.connect("127.0.0.1:8080").unwrap();
            elsewhere.accept();
            audited.connect(IMDS).unwrap();
            real.accept();
        }
        assert_eq!(node.count(Counter::DeniedAgentDown), 12);
    });
}

#[test]
fn while_the_agent_is_down_pod_identity_may_pass_and_imds_never() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let eks_agent_v4 = RealService::listen(POD_IDENTITY);
        let eks_agent_v6 = RealService::listen(crate::POD_IDENTITY_V6);
        node.interceptor.set_target(with_eks_agent()).unwrap();
        node.set_heartbeat(0);
        for (address, service) in [(POD_IDENTITY, &eks_agent_v4), (crate::POD_IDENTITY_V6, &eks_agent_v6)] {
            pod.connect(address).unwrap();
            service.accept();
        }
        for address in [IMDS, IMDS_V6, IMDS_MAPPED, ECS, &format!("{AGENT_V4}:80")] {
            assert!(is_eperm(&pod.connect(address)), "{address}");
        }
        assert_eq!(node.count(Counter::PassedAgentDown), 2);
    });
}

#[test]
fn what_an_agent_leaves_is_effective_until_the_next_one_takes_over() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let real = RealService::listen(IMDS);
        // Its programs and maps stay, but nobody redeems tickets any more.
        let settings = of_successor(node);
        let predecessor = std::mem::replace(&mut node.interceptor, Interceptor::load(&settings).unwrap());
        drop(predecessor);
        node.set_heartbeat(0);
        assert!(is_eperm(&pod.connect(IMDS)));
        assert_eq!(links(node), 9, "eight programs, and the one on outgoing packets");

        // Whoever has not taken over changes nothing.
        node.interceptor
            .set_policy(pod.cgroup.id, PodPolicy { imds: IMDS_OFF, pod_identity: POD_IDENTITY_OFF })
            .unwrap();
        node.interceptor.set_target(with_eks_agent()).unwrap();
        node.interceptor.stop().unwrap();
        assert!(matches!(node.interceptor.heartbeat().write().unwrap(), Standing::Superseded { .. }));
        assert!(is_eperm(&pod.connect(IMDS)));

        node.interceptor.take_over(own_pair(), &[]).unwrap();
        assert_eq!(node.interceptor.heartbeat().write().unwrap(), Standing::Active);
        pod.connect(IMDS).unwrap();
        real.accept();
        assert_eq!(links(node), 8, "no pod has an egress filter any more");
    });
}

#[test]
fn a_superseded_agent_writes_nothing_and_can_become_active_again() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let mut successor = successor(node);
        successor.set_policy(pod.cgroup.id, PodPolicy { imds: IMDS_OFF, ..INTERCEPT }).unwrap();
        successor.take_over(own_pair(), &[]).unwrap();
        let real = RealService::listen(IMDS);
        pod.connect(IMDS).unwrap();
        real.accept();

        node.set_heartbeat(now_ns() - SECOND);
        let Standing::Superseded { silent } = node.interceptor.heartbeat().write().unwrap() else {
            panic!("it was")
        };
        assert!(silent >= Duration::from_secs(1), "{silent:?}");
        node.interceptor.stop().unwrap();
        pod.connect(IMDS).expect("the end of a predecessor is nobody's business");
        real.accept();

        let agent = node.agent();
        node.interceptor.take_over(own_pair(), &[]).unwrap();
        assert!(matches!(successor.heartbeat().write().unwrap(), Standing::Superseded { .. }));
        pod.connect(IMDS).unwrap();
        assert!(agent.accept().is_some(), "its own policies are effective again");
    });
}

#[test]
fn programs_are_replaced_without_a_moment_in_which_none_runs() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let real = RealService::listen(IMDS);
        let done = AtomicBool::new(false);
        let connections = pod.run(|| {
            thread::scope(|scope| {
                let connections = scope.spawn(|| {
                    let mut connections = 0;
                    while !done.load(Ordering::Relaxed) && connections < 3000 {
                        open_connection(IMDS).unwrap();
                        connections += 1;
                    }
                    connections
                });
                for _ in 0..10 {
                    let mut successor = successor(node);
                    successor.set_policy(pod.cgroup.id, INTERCEPT).unwrap();
                    successor.take_over(own_pair(), &[]).unwrap();
                    node.set_heartbeat(now_ns() + 3600 * SECOND);
                }
                done.store(true, Ordering::Relaxed);
                connections.join().unwrap()
            })
        });
        assert!(connections > 10, "{connections}");
        for _ in 0..connections {
            assert!(agent.accept().is_some());
        }
        assert!(real.try_accept().is_none() && agent.try_accept().is_none());
        assert_eq!(node.live_tickets(), 0);
        assert_eq!(node.count(Counter::Redirected), connections, "each connection met one program");
    });
}

#[test]
fn what_programs_of_another_abi_have_left_is_replaced_and_removed() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let root = node.bpffs().join("podgate");
        let (own, other) = (root.join(format!("v{ABI_VERSION}")), root.join("v0"));
        node.interceptor.reserve((AGENT_V4, 80).into()).unwrap();
        fs::rename(&own, &other).unwrap();
        let links_of_other_abi = fs::read_dir(other.join("links")).unwrap().count();
        assert_eq!(links_of_other_abi, 9);

        let mut successor = successor(node);
        assert!(is_eperm_at_target(node), "its address is still reserved, by the other's programs");
        successor.set_policy(pod.cgroup.id, INTERCEPT).unwrap();
        successor.take_over(own_pair(), &[]).unwrap();
        assert!(!other.exists() && own.join("links/connect4").exists());

        let real = RealService::listen(IMDS);
        let redirected = count(&successor, Counter::Redirected);
        let listener = other_agent(node).run(|| listen((AGENT_V4, 80).into()).unwrap());
        pod.connect(IMDS).unwrap();
        accept(&listener);
        assert!(real.try_accept().is_none());
        assert_eq!(count(&successor, Counter::Redirected), redirected + 1);
        // The predecessor's maps are no part of it any more.
        assert_eq!(node.count(Counter::Redirected), 0);

        // It knows that it was succeeded, and when its successor falls silent.
        node.set_heartbeat(now_ns() - SECOND);
        let Standing::Superseded { silent } = node.interceptor.heartbeat().write().unwrap() else {
            panic!("it was")
        };
        assert!(silent >= Duration::from_secs(1));
        node.interceptor.take_over(own_pair(), &[&listener]).unwrap();
        assert!(matches!(successor.heartbeat().write().unwrap(), Standing::Superseded { .. }));
        pod.connect(IMDS).unwrap();
        accept(&listener);
        assert_eq!(node.count(Counter::Redirected), 1);
    });
}

fn is_eperm_at_target(node: &Node) -> bool {
    let squatter = node.unknown_pod("squatter");
    is_eperm(&squatter.run(|| TcpListener::bind((AGENT_V4, 80))))
}

/// As the agent has them: at ports of the kernel's choice.
fn own_listeners() -> [TcpListener; 2] {
    [(AGENT_V4, 0).into(), (AGENT_V6, 0).into()].map(|address| listen(address).unwrap())
}

fn count(interceptor: &Interceptor, counter: Counter) -> u64 {
    let counters = interceptor.counters().read().unwrap();
    counters.into_iter().find(|(other, _)| *other == counter).unwrap().1
}

fn accept(listener: &TcpListener) -> TcpStream {
    crate::kernel_node::soon(|| listener.accept().ok()).0
}

#[test]
fn nobody_else_may_listen_where_the_agent_does() {
    Node::run(|node| {
        let host_network = node.pod("cni", IMDS_OFF, POD_IDENTITY_OFF);
        let unknown = node.unknown_pod("new");
        let mapped = format!("[::ffff:{AGENT_V4}]:80");
        let taken: [SocketAddr; 3] = [(AGENT_V4, 80).into(), (AGENT_V6, 80).into(), mapped.parse().unwrap()];
        for address in &taken[..2] {
            node.interceptor.reserve(*address).unwrap();
        }
        for pod in [&host_network, &unknown] {
            for address in taken {
                assert!(is_eperm(&pod.run(|| listen(address))), "{address}");
            }
            // Every port but the agent's, and every address.
            for free in
                [(AGENT_V4, 8080).into(), SocketAddr::from(([0, 0, 0, 0], 80)), ([127, 0, 0, 1], 80).into()]
            {
                let bound = pod.run(|| TcpListener::bind(free).map(drop));
                assert!(!is_eperm(&bound), "{free}: {bound:?}");
            }
            assert!(is_eperm(&pod.run(|| UdpSocket::bind((AGENT_V4, 80)))), "not by UDP either");
        }
        assert_eq!(node.count(Counter::DeniedBind), 8);
        node.as_agent(|| listen(taken[0]).map(drop)).expect("podgate itself may");

        node.detach();
        host_network.run(|| listen(taken[0])).expect("the control: it is the program that refuses");
    });
}

#[test]
fn another_listener_at_the_address_gets_no_connection() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let squatter = node.unknown_pod("squatter");
        // Before the programs are there: at the agent's own address, and at every address.
        node.detach();
        let (address, v6): (SocketAddr, SocketAddr) = ((AGENT_V4, 80).into(), (AGENT_V6, 80).into());
        let loopback = SocketAddr::from(([127, 0, 0, 1], 80));
        let squatting = squatter.run(|| [address, v6, loopback].map(|at| listen(at).unwrap()));
        let own = node.as_agent(own_listeners);
        let waiting = |listeners: &[TcpListener]| {
            listeners.iter().flat_map(|listener| std::iter::from_fn(|| listener.accept().ok())).count()
        };

        // The control: the kernel gives connections to who listens there.
        node.interceptor.set_policy(pod.cgroup.id, INTERCEPT).unwrap();
        node.attach();
        let connect_20 = |address: &str| (0..20).filter(|_| pod.connect(address).is_ok()).count();
        assert_eq!(connect_20(IMDS) + connect_20(IMDS_V6), 40);
        assert_eq!((waiting(&own), waiting(&squatting)), (0, 40));

        for at in [address, v6] {
            node.interceptor.reserve(at).unwrap();
        }
        node.interceptor.set_listeners(&own.each_ref()).unwrap();
        assert_eq!(connect_20(IMDS) + connect_20(IMDS_V6), 40);
        assert_eq!((waiting(&own), waiting(&squatting)), (40, 0));
        drop(own);
        for connected in [IMDS, IMDS_V6] {
            let refused = pod.connect(connected).unwrap_err();
            assert_eq!(
                refused.kind(),
                io::ErrorKind::ConnectionRefused,
                "at once, before the heartbeat is stale"
            );
        }
        assert_eq!(waiting(&squatting), 0);
        // Elsewhere everybody gets what is theirs.
        pod.connect("127.0.0.1:80").unwrap();
        assert_eq!(waiting(&squatting), 1);
    });
}

#[test]
fn a_wildcard_listener_gets_none_of_podgates_connections() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let ingress = node.unknown_pod("ingress");
        let everywhere = [SocketAddr::from(([0, 0, 0, 0], 80)), ([0_u16; 8], 80).into()];
        let before = ingress.run(|| everywhere.map(|at| listen(at).unwrap()));
        let own = node.as_agent(own_listeners);
        for at in [(AGENT_V4, 80).into(), (AGENT_V6, 80).into()] {
            node.interceptor.reserve(at).unwrap();
        }
        node.interceptor.set_listeners(&own.each_ref()).unwrap();
        let served = [IMDS, IMDS_V6].map(|connected| (pod.connect(connected).unwrap(), connected));
        let accepted = own.each_ref().map(accept);
        for (accepted, target) in
            accepted.iter().zip([SocketAddr::from((AGENT_V4, 80)), (AGENT_V6, 80).into()])
        {
            assert_eq!(accepted.local_addr().unwrap(), target, "as it was sent");
        }
        assert!(before.iter().all(|listener| listener.accept().is_err()));
        // Nor is podgate in its way, while it has connections there.
        drop(before);
        let after = ingress.run(|| everywhere.map(|at| listen(at).unwrap()));
        pod.connect("127.0.0.1:80").unwrap();
        accept(&after[0]);
        drop((served, accepted));
    });
}

#[test]
fn an_agent_whose_pins_were_removed_pins_again_when_it_becomes_active() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let own = node.bpffs().join(format!("podgate/v{ABI_VERSION}"));
        // As an agent of another ABI does; another of this one may have come and gone since.
        for comes_another in [false, true] {
            for link in fs::read_dir(own.join("links")).unwrap() {
                fs::remove_file(link.unwrap().path()).unwrap();
            }
            fs::remove_dir_all(&own).unwrap();
            if comes_another {
                successor(node).take_over(own_pair(), &[]).unwrap();
            }
            let agent = node.agent();
            node.interceptor.take_over(own_pair(), &[]).unwrap();
            assert_eq!(node.interceptor.heartbeat().write().unwrap(), Standing::Active);
            pod.connect(IMDS).unwrap();
            assert!(agent.accept().is_some());
            // The next one finds what this one knows.
            let counted = node.count(Counter::Redirected);
            assert_eq!(count(&successor(node), Counter::Redirected), counted);
        }

        // Without what all agents share, no agent's generation counts.
        let shared = node.bpffs().join("podgate/shared/maps");
        fs::remove_file(shared.join("GENERATION")).unwrap();
        let error = node.interceptor.take_over(own_pair(), &[]).unwrap_err().to_string();
        assert!(error.contains("GENERATION") && error.contains("podgate detach"), "{error}");
    });
}

#[test]
fn every_agent_notices_a_detach() {
    Node::run(|node| {
        let mut active = successor(node);
        active.take_over(own_pair(), &[]).unwrap();
        assert!(matches!(node.interceptor.heartbeat().write().unwrap(), Standing::Superseded { .. }));
        for pin in pinned(node.bpffs()).unwrap() {
            unpin(&pin).unwrap();
        }
        assert_eq!(active.heartbeat().write().unwrap(), Standing::Detached);
        assert_eq!(node.interceptor.heartbeat().write().unwrap(), Standing::Detached);
        let mut later = successor(node);
        later.take_over(own_pair(), &[]).unwrap();
        assert_eq!(later.heartbeat().write().unwrap(), Standing::Active);
        assert_eq!(active.heartbeat().write().unwrap(), Standing::Detached);
        assert_eq!(node.interceptor.heartbeat().write().unwrap(), Standing::Detached);
    });
}

#[test]
fn addresses_are_reserved_until_they_are_released() {
    Node::run(|node| {
        let pod = node.unknown_pod("host-network");
        let own: [SocketAddr; 2] = [(AGENT_V4, 80).into(), (AGENT_V6, 80).into()];
        let pod_identity: [SocketAddr; 2] = [(POD_IDENTITY_V4, 80).into(), (POD_IDENTITY_V6, 80).into()];
        let refused = |address| is_eperm(&pod.run(|| TcpListener::bind(address)));
        for address in own {
            node.interceptor.reserve(address).unwrap();
        }
        assert!(own.iter().all(refused) && !pod_identity.iter().any(refused));
        for address in pod_identity {
            node.interceptor.reserve(address).unwrap();
        }
        // Before, while and after they are the target.
        let taken = Target { v4: endpoint(POD_IDENTITY), v6: endpoint(crate::POD_IDENTITY_V6), ..own_pair() };
        for target in [own_pair(), taken, own_pair()] {
            node.interceptor.set_target(target).unwrap();
            assert!(own.iter().chain(&pod_identity).all(refused), "{target:?}");
        }
        node.as_agent(|| pod_identity.map(|address| drop(listen(address).unwrap())));

        // Who is not active decides nothing.
        let mut other = successor(node);
        other.reserve_only(&[]).unwrap();
        assert!(own.iter().chain(&pod_identity).all(refused));
        node.interceptor.reserve_only(&own).unwrap();
        assert!(own.iter().all(refused) && !pod_identity.iter().any(refused));
    });
}

#[test]
fn connections_go_to_the_active_agent_else_to_its_predecessor() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let addresses: [SocketAddr; 2] = [(AGENT_V4, 80).into(), (AGENT_V6, 80).into()];
        for address in addresses {
            node.interceptor.reserve(address).unwrap();
        }
        let mut agents = node.as_agent(|| vec![own_listeners(), own_listeners(), own_listeners()]);
        let waiting = |listeners: &[TcpListener; 2]| {
            listeners.each_ref().map(|listener| std::iter::from_fn(|| listener.accept().ok()).count())
        };
        let connect_20 = |address: &str| (0..20).for_each(|_| drop(pod.connect(address).unwrap()));
        // One takes over from the other, and back, as often as they like.
        for active in [0, 1, 0, 1, 2] {
            node.interceptor.take_over(own_pair(), &agents[active].each_ref()).unwrap();
            connect_20(IMDS);
            connect_20(IMDS_V6);
            for (number, listeners) in agents.iter().enumerate() {
                let expected = if number == active { [20, 20] } else { [0, 0] };
                assert_eq!(waiting(listeners), expected, "agent {number} while {active} is active");
            }
        }
        drop(agents.pop());
        connect_20(IMDS);
        assert_eq!(waiting(&agents[1]), [20, 0], "the predecessor stands by");
        agents.pop();
        assert_eq!(pod.connect(IMDS).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(waiting(&agents[0]), [0, 0]);
    });
}

#[test]
fn pins_of_another_owner_or_shape_are_refused() {
    Node::run(|node| {
        let own = node.bpffs().join(format!("podgate/v{ABI_VERSION}"));
        fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
        let refusal = Interceptor::load(&of_successor(node)).unwrap_err().to_string();
        assert!(refusal.contains("0700") && refusal.contains(&own.display().to_string()), "{refusal}");
        fs::set_permissions(&own, fs::Permissions::from_mode(0o700)).unwrap();

        let maps = own.join("maps");
        fs::remove_file(maps.join("TARGETS")).unwrap();
        fs::rename(maps.join("POLICIES"), maps.join("TARGETS")).unwrap();
        let refusal = Interceptor::load(&of_successor(node)).unwrap_err().to_string();
        assert!(refusal.contains("TARGETS") && refusal.contains("podgate detach"), "{refusal}");
    });
}

#[test]
fn the_key_of_imds_tokens_outlives_the_agent() {
    Node::run(|node| {
        let key = node.interceptor.imds_key().unwrap();
        assert_ne!(key, [0; 32]);
        assert_eq!(successor(node).imds_key().unwrap(), key);
        node.detach();
        assert_ne!(node.interceptor.imds_key().unwrap(), key, "and not its removal");
    });
}

#[test]
fn a_kubepods_cgroup_that_was_made_anew_gets_programs_of_its_own() {
    Node::run(|node| {
        let settings = node.settings();
        let kubepods = Cgroup::create(node.kubepods.path.with_file_name("kubepods"));
        let settings = Settings {
            kubepods: kubepods.path.clone(),
            kubepods_id: kubepods.id,
            agent_cgroup: other_agent(node).path,
            ..settings
        };
        node.interceptor = Interceptor::load(&settings).unwrap();
        let pod = kubepods.path.join("burstable/podc/container");
        let pod = Cgroup::create(pod);
        node.interceptor.set_unknown_pods(INTERCEPT, PodPolicy::EXEMPT).unwrap();
        node.interceptor.take_over(own_pair(), &[]).unwrap();
        node.interceptor.stop().unwrap();
        assert!(is_eperm(&pod.run(|| open_connection(IMDS))));
    });
}
