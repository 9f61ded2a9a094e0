//! How many connections a pod may have under way, and that none of them stays behind.

use std::{fs, io, os::fd::OwnedFd, process};

use agent_common::{
    abi::{POLICIES_MAX, TICKETS_PER_POD},
    counter::Counter,
    policy::{IMDS_INTERCEPT, POD_IDENTITY_ON, PodPolicy, QosClass},
    target::Target,
};
use rustix::{
    net::{SendFlags, connect_unspec, send},
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

use crate::{
    IMDS, endpoint, events, is_eperm,
    kernel_node::{Agent, Cgroup, NOBODY, Node, Pod, own_pair},
    options::set_fastopen_connect,
    reconnect, tcp_socket,
};

/// The limit in the maps' type.
const LIMIT: u64 = TICKETS_PER_POD as u64;

/// From now on connects to the agent get no answer.
fn silence(node: &mut Node) {
    node.interceptor.set_target(Target { v4: endpoint(&format!("{NOBODY}:80")), ..own_pair() }).unwrap();
}

/// A handshake that goes on for as long as the socket is kept.
fn begin(cgroup: &Cgroup) -> io::Result<OwnedFd> {
    cgroup.run(|| {
        let socket = tcp_socket();
        rustix::io::ioctl_fionbio(&socket, true)?;
        match reconnect(&socket, IMDS) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(socket),
            other => other.map(|()| socket),
        }
    })
}

#[test]
fn a_pod_at_its_limit_is_refused_and_no_other() {
    Node::run(|node| {
        silence(node);
        let mut events = events::reader(node);
        let [greedy, other] = ["a", "b"].map(|name| node.pod(name, IMDS_INTERCEPT, POD_IDENTITY_ON));
        let mut held: Vec<_> = (0..LIMIT).map(|_| begin(&greedy.container).unwrap()).collect();
        assert_eq!(node.count_of(&greedy), Some(LIMIT));
        for cgroup in [&greedy.container, &greedy.cgroup] {
            assert!(is_eperm(&begin(cgroup)), "one more than the limit");
        }
        assert_eq!(node.count(Counter::DeniedLimit), 2);
        let kinds: Vec<_> = events::told(&mut events).iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [Counter::DeniedLimit; 2]);
        let _other = begin(&other.container).expect("the limit is each pod's own");

        // One that ends makes room for one.
        held.pop();
        held.push(begin(&greedy.container).unwrap());
        assert!(is_eperm(&begin(&greedy.container)));

        // One that connects again gives its own back first.
        connect_unspec(&held[0]).unwrap();
        let again = greedy.run(|| reconnect(&held[0], IMDS)).unwrap_err();
        assert_eq!(again.raw_os_error(), Some(libc::EINPROGRESS));

        drop(held);
        assert_eq!(node.count_of(&greedy), Some(0));
        assert_eq!(node.live_tickets(), 1);
    });
}

#[test]
fn while_one_pod_is_at_its_limit_another_is_served() {
    Node::run(|node| {
        let [greedy, other] = ["a", "b"].map(|name| node.pod(name, IMDS_INTERCEPT, POD_IDENTITY_ON));
        let agent = node.agent();
        silence(node);
        let _held: Vec<_> = (0..LIMIT).map(|_| begin(&greedy.container).unwrap()).collect();
        node.interceptor.set_target(own_pair()).unwrap();
        for _ in 0..LIMIT + 10 {
            let _stream = other.connect(IMDS).unwrap();
            assert_eq!(agent.accept().expect("anonymous").pod_cgroup_id, other.cgroup.id);
        }
        assert!(is_eperm(&greedy.connect(IMDS)));
    });
}

#[test]
fn a_pod_that_fills_the_counts_is_refused_and_no_known_pod() {
    Node::run(|node| {
        let agent = node.agent();
        let (known, held) = fill_counts(node);
        let new = node.pod("new", IMDS_INTERCEPT, POD_IDENTITY_ON);
        assert_served(node, &agent, &[&known, &new]);

        // One has lost its count to the new pod. It is not the worse for it, nor does its count ever fall below 0.
        node.interceptor.remove_policy(new.cgroup.id).unwrap();
        silence(node);
        let mut pods = (0..ROOM).map(|number| unknown_pod(node, number));
        let loser = pods.find(|pod| node.count_of(pod).is_none()).expect("there was room");
        let second = begin(&loser.container).unwrap();
        assert_eq!(node.count_of(&loser), Some(1));
        drop(held);
        drop(second);
        assert_eq!(node.count_of(&loser), Some(0));
        assert_eq!(node.live_tickets(), 0);
    });
}

#[test]
fn filled_counts_make_room_for_pods_that_become_known() {
    Node::run(|node| {
        let agent = node.agent();
        let (known, held) = fill_counts(node);
        drop(held);
        assert!(is_eperm(&begin(&unknown_pod(node, ROOM).container)), "nobody has become known yet");
        let new = node.pod("new", IMDS_INTERCEPT, POD_IDENTITY_ON);
        assert_served(node, &agent, &[&known, &new]);
        let _stream = unknown_pod(node, ROOM).connect(IMDS).unwrap();
        agent.accept().expect("anonymous");
    });
}

/// How many unknown ones can have a count besides one known pod.
const ROOM: u32 = POLICIES_MAX - 1;

/// Fills the map of counts with connections under way, but for one known pod's. One more is refused.
fn fill_counts(node: &mut Node) -> (Pod, Vec<OwnedFd>) {
    // Other tests run at the same time, and one of them does this, too.
    allow_open_files(u64::from(ROOM) * 3);
    let policy = PodPolicy { imds: IMDS_INTERCEPT, pod_identity: POD_IDENTITY_ON };
    node.interceptor.set_unknown_pods(policy, policy).unwrap();
    let known = node.pod("known", IMDS_INTERCEPT, POD_IDENTITY_ON);
    silence(node);
    let held = (0..ROOM).map(|number| begin(&unknown_pod(node, number).container).unwrap()).collect();
    assert!(is_eperm(&begin(&unknown_pod(node, ROOM).container)), "there is room for more");
    assert_eq!(node.count(Counter::DeniedLimit), 1);
    (known, held)
}

/// One more Guaranteed pod of which nothing is known.
fn unknown_pod(node: &Node, number: u32) -> Pod {
    Pod::create(node.kubepods.path.join(format!("kubepods-pod{number}.slice")))
}

fn assert_served(node: &mut Node, agent: &Agent, pods: &[&Pod]) {
    node.interceptor.set_target(own_pair()).unwrap();
    for pod in pods {
        let _stream = pod.connect(IMDS).unwrap();
        assert_eq!(agent.accept().expect("anonymous").pod_cgroup_id, pod.cgroup.id);
        assert_eq!(node.count_of(pod), Some(0));
    }
}

/// Lets the test process have so many.
fn allow_open_files(number: u64) {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < number) {
        let maximum = limit.maximum.map(|maximum| maximum.max(number));
        setrlimit(Resource::Nofile, Rlimit { current: Some(number), maximum }).unwrap();
    }
}

#[test]
fn a_pod_that_nobody_knows_has_one_limit_however_many_cgroups_it_makes() {
    Node::run(|node| {
        silence(node);
        let policy = PodPolicy { imds: IMDS_INTERCEPT, pod_identity: POD_IDENTITY_ON };
        node.interceptor.set_unknown_pods(policy, policy).unwrap();
        let greedy = [
            node.kubepods.path.join("kubepods-podgreedy.slice"),
            node.kubepods.path.join("kubepods-burstable.slice/kubepods-burstable-podgreedy.slice"),
        ];
        for pod in greedy {
            let pod = Pod::create(pod);
            let nested = (0..LIMIT).map(|number| Cgroup::create(pod.container.path.join(number.to_string())));
            let besides = (0..LIMIT).map(|number| Cgroup::create(pod.cgroup.path.join(number.to_string())));
            let connections = nested.chain(besides).map(|cgroup| begin(&cgroup)).collect::<Vec<_>>();
            assert_eq!(
                u64::try_from(connections.iter().filter(|open_connection| open_connection.is_ok()).count())
                    .unwrap(),
                LIMIT
            );
            assert_eq!(node.count_of(&pod), Some(LIMIT));
        }
        let other = node.unknown_pod("other");
        let _other = begin(&other.container).expect("the limit is each pod's own");
    });
}

#[test]
fn pods_of_an_unreported_qos_class_share_a_limit() {
    Node::run(|node| {
        silence(node);
        let policy = PodPolicy { imds: IMDS_INTERCEPT, pod_identity: POD_IDENTITY_ON };
        node.interceptor.set_unknown_pods(policy, policy).unwrap();
        let class = Cgroup::create(node.kubepods.path.join("kubepods-besteffort.slice"));
        let [greedy, other] = ["a", "b"]
            .map(|name| Pod::create(class.path.join(format!("kubepods-besteffort-pod{name}.slice"))));
        let _held: Vec<_> = (0..LIMIT).map(|_| begin(&greedy.container).unwrap()).collect();
        assert!(is_eperm(&begin(&other.container)));
        node.interceptor.set_class(QosClass::BestEffort, class.id).unwrap();
        let _other = begin(&other.container).expect("the limit is each pod's own");
    });
}

#[test]
fn unknown_pods_are_limited_each_for_itself() {
    Node::run(|node| {
        silence(node);
        let policy = PodPolicy { imds: IMDS_INTERCEPT, pod_identity: POD_IDENTITY_ON };
        node.interceptor.set_unknown_pods(policy, policy).unwrap();
        let [greedy, other] = ["a", "b"].map(|name| node.unknown_pod(name));
        let held: Vec<_> = (0..LIMIT).map(|_| begin(&greedy.container).unwrap()).collect();
        assert!(is_eperm(&begin(&greedy.container)));
        let _other = begin(&other.container).expect("the limit is each pod's own");

        // What was counted before counts when the pod is known.
        node.interceptor.set_policy(greedy.cgroup.id, policy).unwrap();
        assert!(is_eperm(&begin(&greedy.container)));
        drop(held);
        begin(&greedy.container).unwrap();
    });
}

#[test]
fn deferred_connections_are_limited_when_they_begin() {
    // Such a connection has no ticket yet, so that any number of them passes `connect`.
    Node::run(|node| {
        silence(node);
        let mut events = events::reader(node);
        // 1: as a client; 4: without a cookie, so that `connect` sends nothing.
        fs::write("/proc/sys/net/ipv4/tcp_fastopen", "5").unwrap();
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let excess = 6;
        let sockets: Vec<_> = (0..LIMIT + excess)
            .map(|_| {
                let socket = pod.run(tcp_socket);
                rustix::io::ioctl_fionbio(&socket, true).unwrap();
                set_fastopen_connect(&socket);
                pod.run(|| reconnect(&socket, IMDS)).expect("it is put off");
                socket
            })
            .collect();
        assert_eq!(node.live_tickets(), 0);
        for socket in &sockets {
            // With or without an error: the data is sent with the SYN.
            let _ = send(socket, b"?", SendFlags::empty());
        }
        assert_eq!(node.live_tickets(), LIMIT);
        assert_eq!(node.count_of(&pod), Some(LIMIT));
        assert_eq!(node.count(Counter::TicketsFull), excess);
        let told = events::told(&mut events);
        assert_eq!(u64::try_from(told.len()).unwrap(), excess);
        for (kind, event) in told {
            assert_eq!((kind, event.pod_cgroup_id), (Counter::TicketsFull, pod.cgroup.id));
            assert_eq!((event.address, event.tgid), (endpoint(IMDS), process::id()));
        }
        drop(sockets);
        assert_eq!(node.live_tickets(), 0);
    });
}

#[test]
fn a_served_pod_never_comes_near_its_limit() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        let mut kept = Vec::new();
        for _ in 0..LIMIT + 10 {
            kept.push(pod.connect(IMDS).unwrap());
            agent.accept().expect("anonymous");
        }
        assert_eq!(node.count_of(&pod), Some(0));
    });
}

#[test]
fn a_pod_removed_with_connections_under_way_leaves_no_count() {
    Node::run(|node| {
        silence(node);
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let held = begin(&pod.container).unwrap();
        node.interceptor.remove_policy(pod.cgroup.id).unwrap();
        assert_eq!(node.count_of(&pod), Some(1));
        drop(held);
        assert_eq!(node.count_of(&pod), Some(0));
        assert_eq!(node.live_tickets(), 0);

        // It goes with the next one that is forgotten, and only those go that are unknown.
        let [known, other] = ["b", "c"].map(|name| node.pod(name, IMDS_INTERCEPT, POD_IDENTITY_ON));
        drop([&known, &other].map(|pod| begin(&pod.container).unwrap()));
        node.interceptor.remove_policy(other.cgroup.id).unwrap();
        assert_eq!([&pod, &known, &other].map(|pod| node.count_of(pod)), [None, Some(0), None]);
    });
}
