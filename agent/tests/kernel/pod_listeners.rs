//! Listeners in a pod's own network: who is sent there, and whom it leaves alone.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use agent::identity::netns;
use agent_common::{
    counter::Counter,
    pod_listener::PodListener,
    policy::{IMDS_AUDIT, IMDS_DENY, IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_OFF, POD_IDENTITY_ON},
};

use crate::{
    ECS, IMDS, IMDS_MAPPED, IMDS_V6, POD_IDENTITY, POD_IDENTITY_MAPPED, POD_IDENTITY_V6, endpoint, is_eperm,
    kernel_node::{AGENT_V4, Agent, Node, Pod},
};

/// Where the agent listens on the loopback.
const PORT: u16 = 61_234;

/// A pod whose network is this thread's, and the agent's listeners in it.
fn pod_with_listeners(node: &mut Node, name: &str, imds: u32, pod_identity: u32) -> (Pod, Agent) {
    let pod = node.pod(name, imds, pod_identity);
    let listeners = node.agent_at(&[(Ipv4Addr::LOCALHOST, PORT).into(), (Ipv6Addr::LOCALHOST, PORT).into()]);
    let cookie = netns::own_cookie().unwrap();
    node.interceptor.set_pod_listener(cookie, PodListener::new(pod.cgroup.id, PORT, PORT)).unwrap();
    (pod, listeners)
}

fn at_listener(stream: &TcpStream) -> SocketAddr {
    stream.local_addr().unwrap()
}

#[test]
fn a_pod_is_sent_to_the_listener_in_its_own_network() {
    Node::run(|node| {
        let (pod, listeners) = pod_with_listeners(node, "a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        for address in [IMDS, IMDS_V6, IMDS_MAPPED, POD_IDENTITY, POD_IDENTITY_V6, POD_IDENTITY_MAPPED, ECS] {
            let stream = pod.connect(address).unwrap();
            let origin = listeners.accept().expect("attested");
            assert_eq!((origin.pod_cgroup_id, origin.orig_dst), (pod.cgroup.id, endpoint(address)));
            assert!(origin.target.is_loopback(), "{address}: {:?}", origin.target);
            assert_eq!(pod.run(|| stream.peer_addr()).unwrap(), address.parse().unwrap());
            assert!(at_listener(&stream).ip().to_canonical().is_loopback());
        }
        assert_eq!(node.live_tickets(), 0);
    });
}

#[test]
fn a_listener_is_for_its_own_pod_alone() {
    Node::run(|node| {
        let (_pod, listeners) = pod_with_listeners(node, "a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let (other, agent) = (node.pod("b", IMDS_INTERCEPT, POD_IDENTITY_ON), node.agent());
        let _redirected = other.connect(IMDS).unwrap();
        assert_eq!(agent.accept().expect("attested").pod_cgroup_id, other.cgroup.id);
        // By its address: whoever that is, the kernel says nothing of it.
        let _direct = other.connect(&format!("127.0.0.1:{PORT}")).unwrap();
        assert_eq!(listeners.accept(), None);
    });
}

#[test]
fn a_connect_to_the_listener_itself_is_attested_in_every_mode() {
    Node::run(|node| {
        for (name, imds, pod_identity) in [
            ("a", IMDS_OFF, POD_IDENTITY_OFF),
            ("b", IMDS_AUDIT, POD_IDENTITY_OFF),
            ("c", IMDS_INTERCEPT, POD_IDENTITY_ON),
            ("d", IMDS_DENY, POD_IDENTITY_ON),
        ] {
            let (pod, listeners) = pod_with_listeners(node, name, imds, pod_identity);
            for address in [format!("127.0.0.1:{PORT}"), format!("[::1]:{PORT}")] {
                let _stream = pod.connect(&address).unwrap();
                assert_eq!(listeners.accept().expect("attested").pod_cgroup_id, pod.cgroup.id, "{name}");
            }
        }
    });
}

#[test]
fn a_pod_that_is_left_to_others_is_attested_at_the_target_all_the_same() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_AUDIT, POD_IDENTITY_OFF);
        let agent = node.agent();
        let _stream = pod.connect(&format!("{AGENT_V4}:80")).unwrap();
        assert_eq!(agent.accept().expect("attested").pod_cgroup_id, pod.cgroup.id);
    });
}

#[test]
fn what_else_a_pod_does_on_its_loopback_is_left_alone() {
    Node::run(|node| {
        for (name, imds) in [("a", IMDS_OFF), ("b", IMDS_AUDIT), ("c", IMDS_INTERCEPT), ("d", IMDS_DENY)] {
            let (pod, listeners) = pod_with_listeners(node, name, imds, POD_IDENTITY_ON);
            let before = counted(node);
            for address in ["127.0.0.1:8080", "127.0.0.2:8080", "[::1]:8080"] {
                let _own = pod.run(|| TcpListener::bind(address)).unwrap();
                let stream = pod.connect(address).unwrap();
                assert_eq!(stream.peer_addr().unwrap(), address.parse().unwrap());
            }
            // Its own, at the same port of another address or of another protocol.
            let elsewhere = format!("127.0.0.3:{PORT}");
            let _own = pod.run(|| TcpListener::bind(&elsewhere)).unwrap();
            pod.connect(&elsewhere).unwrap();
            for address in [format!("127.0.0.1:{PORT}"), format!("[::1]:{PORT}")] {
                let datagrams = pod.run(|| UdpSocket::bind(&address)).unwrap();
                let sender = pod.run(|| {
                    let sender = UdpSocket::bind(datagrams.local_addr()?)
                        .or_else(|_| UdpSocket::bind((datagrams.local_addr()?.ip(), 0)))?;
                    sender.connect(&address)?;
                    sender.send(b"?")?;
                    Ok::<_, std::io::Error>(sender)
                });
                datagrams.recv_from(&mut [0]).unwrap();
                drop(sender.unwrap());
            }
            assert_eq!(counted(node), before, "{name}");
            assert_eq!(listeners.try_accept(), None);
        }
    });
}

#[test]
fn without_an_agent_its_listeners_refuse_at_once() {
    Node::run(|node| {
        let (pod, _listeners) = pod_with_listeners(node, "a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        node.set_heartbeat(0);
        for address in [IMDS, POD_IDENTITY, &format!("127.0.0.1:{PORT}")] {
            assert!(is_eperm(&pod.connect(address)), "{address}");
        }
    });
}

#[test]
fn a_withdrawn_listener_leaves_the_pod_to_the_target() {
    Node::run(|node| {
        let (pod, listeners) = pod_with_listeners(node, "a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        node.interceptor.remove_pod_listener(netns::own_cookie().unwrap()).unwrap();
        let _stream = pod.connect(IMDS).unwrap();
        assert!(agent.accept().is_some() && listeners.try_accept().is_none());
    });
}

/// Everything that the programs have counted of connection attempts and packets.
fn counted(node: &Node) -> Vec<(Counter, u64)> {
    node.interceptor.counters().read().unwrap()
}
