//! Who is at the other end of a Unix socket: a process of the node itself, or one of a pod.
//!
//! Owns the access control of podgate's own sockets, by the peer's process id; never serves a pod, never sees a request.
//! `admin` asks it who may command the agent, `takeover::transfer` who may be the next agent.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    cgroup,
    cgroupfs::{self, Error, Kubepods},
};

/// Finds the cgroup of a process. A trait because only a node has kubepods.
pub trait ProcessCgroups: Send + Sync + 'static {
    /// The directory of the cgroup that the process is in.
    fn of_process(&self, pid: i32) -> Result<PathBuf, Error>;
    /// The directory of the cgroup of all pods.
    fn kubepods(&self) -> &Path;
}

/// Tells what the processes that connect to podgate's own sockets are.
#[derive(Clone)]
pub struct Peers {
    cgroups: Arc<dyn ProcessCgroups>,
    own_pod: Option<u64>,
}

/// What a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// One of the node's own, in no pod.
    Node,
    /// One of the pod whose own cgroup has this id.
    Pod(u64),
    /// It has ended, or is in a cgroup of kubepods that is no pod's.
    Unknown,
}

// === impl ProcessCgroups ===

impl ProcessCgroups for Kubepods {
    fn of_process(&self, pid: i32) -> Result<PathBuf, Error> {
        self.of_process(Some(pid))
    }

    fn kubepods(&self) -> &Path {
        self.path()
    }
}

// === impl Peers ===

impl Peers {
    /// Tells them apart by their cgroups. `own_pod` is the cgroup of podgate's own pod, unless it runs outside of pods.
    pub fn new(cgroups: Arc<dyn ProcessCgroups>, own_pod: Option<u64>) -> Self {
        Self { cgroups, own_pod }
    }

    /// What the process with this id is. An id may be reused once its process has ended, so this holds only for a process
    /// that keeps its connection open.
    pub fn of_process(&self, pid: i32) -> Peer {
        let Ok(cgroup) = self.cgroups.of_process(pid) else { return Peer::Unknown };
        let kubepods = self.cgroups.kubepods();
        let Ok(below) = cgroup.strip_prefix(kubepods) else { return Peer::Node };
        let pod = cgroup::parse(below).map(|found| kubepods.join(found.pod));
        pod.and_then(|pod| cgroupfs::cgroup_id(&pod).ok()).map_or(Peer::Unknown, Peer::Pod)
    }

    /// Whether the process may command this agent: one of the node's own, or of podgate's own pod.
    pub fn may_command(&self, pid: i32) -> bool {
        match self.of_process(pid) {
            Peer::Node => true,
            Peer::Pod(id) => Some(id) == self.own_pod,
            Peer::Unknown => false,
        }
    }
}

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peers").field("own_pod", &self.own_pod).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io};

    use super::*;

    const POD: &str = "burstable/pod0c5cb3f2-7a47-4a4b-8f0c-5b0f6a3d2e11";

    /// Plain directories do as well as cgroups here; a process' id chooses one.
    struct Directories(tempfile::TempDir);

    impl ProcessCgroups for Directories {
        fn of_process(&self, pid: i32) -> Result<PathBuf, Error> {
            match pid {
                1 => Ok("/system.slice".into()),
                2 => Ok(self.0.path().join(POD).join("container")),
                3 => Ok(self.0.path().join("burstable")),
                4 => Ok(self.0.path().join(POD.replace('0', "1"))),
                _ => Err(Error::Read { what: "/proc".into(), source: io::ErrorKind::NotFound.into() }),
            }
        }

        fn kubepods(&self) -> &Path {
            self.0.path()
        }
    }

    #[test]
    fn only_the_node_and_podgates_own_pod_may_command() {
        let directories = Directories(tempfile::tempdir().unwrap());
        let pod = directories.0.path().join(POD);
        fs::create_dir_all(&pod).unwrap();
        let id = cgroupfs::cgroup_id(&pod).unwrap();
        let cgroups: Arc<dyn ProcessCgroups> = Arc::new(directories);
        let known = [
            (1, Peer::Node, true),
            (2, Peer::Pod(id), true),
            (3, Peer::Unknown, false),
            (4, Peer::Unknown, false),
            (5, Peer::Unknown, false),
        ];
        let peers = Peers::new(Arc::clone(&cgroups), Some(id));
        for (pid, peer, may_command) in known {
            assert_eq!((peers.of_process(pid), peers.may_command(pid)), (peer, may_command), "{pid}");
        }
        for own_pod in [None, Some(id + 1)] {
            let peers = Peers::new(Arc::clone(&cgroups), own_pod);
            assert!(peers.may_command(1) && !peers.may_command(2), "{own_pod:?}");
        }
    }
}
