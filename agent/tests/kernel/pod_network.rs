//! The network of a pod, found through its processes, and entered.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
    process::{self, Child, Command},
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

use crate::kernel_node::{Cgroup, Node};

/// Time in which a process is where it is told to be.
const SOON: Duration = Duration::from_secs(10);
/// A network of its own.
const OWN_NETWORK: &[&str] = &["unshare", "--net"];
/// The same, owned by a user namespace of its own, as that of a pod with `hostUsers: false`.
const OWN_USERS: &[&str] = &["unshare", "--user", "--map-root-user", "--net"];

/// A process of a pod, in one of the pod's cgroups.
struct Process {
    child: Child,
    network: u64,
}

// === impl Process ===

impl Process {
    /// Starts one that `command` brings to a network, and waits until it is there.
    fn start(cgroup: &Path, command: &[&str]) -> Self {
        let cgroup = Cgroup::create(cgroup.to_owned());
        let mut child = Command::new(command[0]);
        let child = child.args(&command[1..]).args(["sh", "-c", "ip link set lo up; exec sleep 600"]);
        let child = child.spawn().unwrap();
        fs::write(cgroup.path.join("cgroup.procs"), child.id().to_string()).unwrap();
        let begun = Instant::now();
        while fs::read_to_string(format!("/proc/{}/comm", child.id())).unwrap() != "sleep\n" {
            assert!(begun.elapsed() < SOON, "{command:?}");
            thread::sleep(Duration::from_millis(5));
        }
        let network = inode(&fs::metadata(format!("/proc/{}/ns/net", child.id())).unwrap());
        Self { child, network }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn inode(namespace: &fs::Metadata) -> u64 {
    namespace.ino()
}

/// The network that is found for a pod.
fn found(kubepods: &Kubepods, pod: &Path) -> Option<u64> {
    let namespace = pod_network::find(kubepods, pod).unwrap()?;
    Some(inode(&fs::File::from(namespace).metadata().unwrap()))
}

/// A node's kubepods, and the cgroup of a pod of its.
fn pod(node: &Node) -> (Arc<Kubepods>, Cgroup) {
    let root = Path::new("/").join(node.kubepods.path.parent().and_then(Path::file_name).unwrap());
    let pod = Cgroup::create(node.kubepods.path.join("kubepods-podfound.slice"));
    (Arc::new(Kubepods::find(&root).unwrap()), pod)
}

#[test]
fn the_oldest_process_in_another_network_than_the_nodes_shows_the_pods() {
    Node::run(|node| {
        let (kubepods, pod) = pod(node);
        assert_eq!(found(&kubepods, &pod.path), None);
        // As the container runtime before it enters the sandbox.
        let on_node = format!("--net=/proc/{}/ns/net", process::id());
        let _runtime = Process::start(&pod.path.join("sandbox"), &["nsenter", &on_node]);
        assert_eq!(found(&kubepods, &pod.path), None);
        // What a workload makes for itself, in a cgroup of its own below its container's, shows nothing.
        let _nested = Process::start(&pod.path.join("app/kubepods/pod"), OWN_NETWORK);
        assert_eq!(found(&kubepods, &pod.path), None);
        let sandbox = Process::start(&pod.path.join("sandbox"), OWN_NETWORK);
        assert_eq!(found(&kubepods, &pod.path), Some(sandbox.network));
        // Nor does what it makes later in its container's.
        let workload = Process::start(&pod.path.join("app"), OWN_NETWORK);
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
        for command in [OWN_NETWORK, OWN_USERS] {
            let sandbox = Process::start(&pod.path.join("sandbox"), command);
            let namespace = pod_network::find(&kubepods, &pod.path).unwrap().unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let (sockets, cookie) = runtime.block_on(async {
                let thread = NetnsThread::spawn().unwrap();
                let listen = || (PodSockets::listen(&[]).unwrap(), netns::own_cookie().unwrap());
                let (sockets, cookie) = thread.run(namespace, listen).await.unwrap();
                let namespace = of(&sockets).unwrap();
                let port = sockets.port;
                let begin = move || in_pod::begin_probe(port, true, true).unwrap();
                in_pod::finish_probe(thread.run(namespace, begin).await.unwrap()).await.unwrap();
                (sockets, cookie)
            });
            let network = of(&sockets).unwrap();
            assert_eq!(inode(&fs::File::from(network).metadata().unwrap()), sandbox.network, "{command:?}");
            assert_ne!(cookie, netns::own_cookie().unwrap());
        }
    });
}

/// The network that podgate's listeners are in.
fn of(sockets: &PodSockets) -> io::Result<OwnedFd> {
    netns::of_socket(sockets.iter().next().unwrap())
}
