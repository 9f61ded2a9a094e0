//! The network of a pod, found through its processes, and entered.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use agent::{
    accept::in_pod::{self, PodSockets},
    identity::{
        cgroupfs::Kubepods,
        netns::{self, NetnsThread},
        pod_network,
    },
};
use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::Pid,
};
use rtnetlink::LinkUnspec;
use rustix::io::Errno;

use crate::{
    kernel_node::{Cgroup, LO, Node, netlink},
    socket_kinds::fork_and_stay,
};

/// Time in which a process is where it goes.
const SOON: Duration = Duration::from_secs(10);

/// A process of a pod, until it is dropped.
struct Process {
    pid: Pid,
    network: u64,
}

// === impl Process ===

impl Process {
    /// Starts one in a cgroup that goes to a network of its own.
    fn in_own_network(cgroup: &Path, flags: CloneFlags) -> Self {
        let before = inode(&File::open("/proc/thread-self/ns/net").unwrap().into());
        Self::start(cgroup, || unshare(flags | CloneFlags::CLONE_NEWNET), |network| network != before)
    }

    /// The same that goes to the network that the node's processes are in.
    fn in_nodes_network(cgroup: &Path) -> Self {
        let node = OwnedFd::from(File::open("/proc/self/ns/net").unwrap());
        let network = inode(&node);
        Self::start(cgroup, || setns(&node, CloneFlags::CLONE_NEWNET), |found| found == network)
    }

    /// Starts one, and waits until it is where it goes.
    fn start(cgroup: &Path, go: impl FnOnce() -> nix::Result<()>, is_there: impl Fn(u64) -> bool) -> Self {
        let go = || go().map_err(|error| Errno::from_raw_os_error(error as i32));
        let pid = Cgroup::create(cgroup.to_owned()).run(|| fork_and_stay(go));
        let begun = Instant::now();
        loop {
            let network = inode(&network_of(pid));
            if is_there(network) {
                return Self { pid, network };
            }
            assert!(begun.elapsed() < SOON, "it is in another network");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        kill(self.pid, Signal::SIGKILL).unwrap();
        waitpid(self.pid, None).unwrap();
    }
}

fn network_of(pid: Pid) -> OwnedFd {
    File::open(format!("/proc/{pid}/ns/net")).unwrap().into()
}

fn inode(namespace: &OwnedFd) -> u64 {
    File::from(namespace.try_clone().unwrap()).metadata().unwrap().ino()
}

/// The network that is found for a pod.
fn found(kubepods: &Kubepods, pod: &Path) -> Option<u64> {
    pod_network::find(kubepods, pod).unwrap().map(|namespace| inode(&namespace))
}

/// A node's kubepods, and the cgroup of a pod of its.
fn pod(node: &Node) -> (Arc<Kubepods>, Cgroup) {
    let pod = Cgroup::create(node.kubepods.path.join("kubepods-podfound.slice"));
    (node.found_kubepods(), pod)
}

#[test]
fn the_oldest_process_in_another_network_than_the_nodes_shows_the_pods() {
    Node::run(|node| {
        let (kubepods, pod) = pod(node);
        assert_eq!(found(&kubepods, &pod.path), None);
        // As the container runtime before it enters the sandbox.
        let _runtime = Process::in_nodes_network(&pod.path.join("sandbox"));
        assert_eq!(found(&kubepods, &pod.path), None);
        // What a workload makes for itself, in a cgroup of its own below its container's, shows nothing.
        let _nested = Process::in_own_network(&pod.path.join("app/kubepods/pod"), CloneFlags::empty());
        assert_eq!(found(&kubepods, &pod.path), None);
        let sandbox = Process::in_own_network(&pod.path.join("sandbox"), CloneFlags::empty());
        assert_eq!(found(&kubepods, &pod.path), Some(sandbox.network));
        // Nor does what it makes later in its container's. Ages are in ticks of 10 ms.
        thread::sleep(Duration::from_millis(30));
        let workload = Process::in_own_network(&pod.path.join("app"), CloneFlags::empty());
        assert_eq!(found(&kubepods, &pod.path), Some(sandbox.network));
        // The sandbox has ended: whatever is left is all that there is.
        drop(sandbox);
        assert_eq!(found(&kubepods, &pod.path), Some(workload.network));
    });
}

#[test]
fn a_network_that_other_users_own_is_listened_in_like_any_other() {
    Node::run(|node| {
        let (kubepods, pod) = pod(node);
        // The second as that of a pod with `hostUsers: false`.
        for flags in [CloneFlags::empty(), CloneFlags::CLONE_NEWUSER] {
            let sandbox = Process::in_own_network(&pod.path.join("sandbox"), flags);
            let namespace = pod_network::find(&kubepods, &pod.path).unwrap().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (sockets, cookie) = runtime.block_on(async {
                let thread = NetnsThread::spawn().unwrap();
                let listen = || {
                    netlink(async |handle| {
                        handle.link().set(LinkUnspec::new_with_index(LO).up().build()).execute().await
                    });
                    (PodSockets::listen(&[]).unwrap(), netns::own_cookie().unwrap())
                };
                let (sockets, cookie) = thread.run(namespace, listen).await.unwrap();
                let (namespace, listeners) = (of(&sockets).unwrap(), sockets.addresses());
                let begin = move || in_pod::begin_probe(&listeners).unwrap();
                in_pod::finish_probe(thread.run(namespace, begin).await.unwrap()).await.unwrap();
                (sockets, cookie)
            });
            assert_eq!(inode(&of(&sockets).unwrap()), sandbox.network, "{flags:?}");
            assert_ne!(cookie, netns::own_cookie().unwrap());
        }
    });
}

/// The network that podgate's listeners are in.
fn of(sockets: &PodSockets) -> io::Result<OwnedFd> {
    netns::of_socket(sockets.iter().next().unwrap())
}
