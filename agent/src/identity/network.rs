//! Whether a dial came from the caller's own network.
//!
//! A node-wide proxy, as a mesh has it, may take up an application's connection and dial again, from its own cgroup
//! through a socket in the application's network namespace. Its cgroup must not be taken for the caller then. Owns
//! this second condition on the kernel's attestation; never a source of identity by itself.

use std::{
    collections::HashMap,
    fs::File,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock},
};

use procfs::process::Process;

use super::{Pod, PodUid, cgroupfs};
use crate::identity::netns;

/// Finds a pod's network by its processes. A trait because only a real node has them.
pub trait PodProcesses: Send + Sync + 'static {
    /// The network namespace's cookie of the pod whose own cgroup is at this path below kubepods; `None` without a
    /// process that can tell.
    fn network(&self, pod: &Path) -> io::Result<Option<u64>>;
}

/// The networks of pods, as far as dials have shown them.
#[derive(Debug)]
pub struct Networks {
    host: u64,
    known: RwLock<HashMap<PodUid, u64>>,
}

/// What is known of a dial's network without asking further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the pod's own.
    Own,
    /// It is not.
    Foreign,
    /// The pod's processes can tell.
    Unproven,
}

// === impl Networks ===

impl Networks {
    /// Nothing is known yet. `host` is the cookie of the host's network.
    pub fn new(host: u64) -> Self {
        Self { host, known: RwLock::default() }
    }

    /// Judges a dial from the network `cookie` that arrived from the address `peer`.
    pub fn judge(&self, pod: &Pod, cookie: u64, peer: IpAddr) -> Verdict {
        if pod.host_network {
            return if cookie == self.host { Verdict::Own } else { Verdict::Foreign };
        }
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner).get(&pod.uid).copied();
        if known == Some(cookie) {
            return Verdict::Own;
        }
        // Nobody but the pod has its address, unless a proxy hides who dialled: then it is not the pod's.
        if pod.ips.contains(&peer) {
            self.learn(pod.uid, cookie);
            return Verdict::Own;
        }
        Verdict::Unproven
    }

    /// Judges by what the pod's processes tell.
    pub fn prove(&self, pod: &Pod, cookie: u64, of_processes: Option<u64>) -> Verdict {
        if of_processes != Some(cookie) {
            return Verdict::Foreign;
        }
        self.learn(pod.uid, cookie);
        Verdict::Own
    }

    /// Drops what is known of a pod that is gone.
    pub fn forget(&self, uid: PodUid) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).remove(&uid);
    }

    fn learn(&self, uid: PodUid, cookie: u64) {
        self.known.write().unwrap_or_else(PoisonError::into_inner).insert(uid, cookie);
    }
}

/// The network of the pod whose own cgroup is in this directory: that of its oldest process, which is the sandbox's.
/// A later process may have gone elsewhere.
pub fn of_pod(directory: &Path) -> io::Result<Option<u64>> {
    let mut oldest = None;
    for pid in processes(directory)? {
        // Gone in the meantime: not the one.
        let Ok(stat) = Process::new(pid).and_then(|process| process.stat()) else { continue };
        if oldest.is_none_or(|(started, _)| stat.starttime < started) {
            oldest = Some((stat.starttime, pid));
        }
    }
    let Some((_, pid)) = oldest else { return Ok(None) };
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    // The number may have been given to another process before its namespace was opened.
    let cgroup = cgroupfs::cgroup_of(Some(pid)).map_err(io::Error::other)?;
    let mount = cgroupfs::cgroup2_mount().map_err(io::Error::other)?;
    let is_of_pod = cgroupfs::join(&mount, &cgroup).starts_with(directory);
    if is_of_pod { netns::cookie_of(namespace).map(Some) } else { Ok(None) }
}

/// Every process in a cgroup and below it.
fn processes(directory: &Path) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::from(directory)];
    while let Some(directory) = directories.pop() {
        let listed = std::fs::read_to_string(directory.join("cgroup.procs"))?;
        found.extend(listed.lines().filter_map(|line| line.parse::<i32>().ok()));
        for entry in std::fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod;

    const HOST: u64 = 1;
    const OWN: u64 = 10;
    const OTHER: u64 = 20;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn the_pod_s_address_proves_its_network_and_another_address_nothing() {
        let networks = Networks::new(HOST);
        let pod = Pod { ips: vec![ip(7)], ..pod("app", "web") };
        assert_eq!(networks.judge(&pod, OWN, ip(9)), Verdict::Unproven);
        assert_eq!(networks.judge(&pod, OWN, ip(7)), Verdict::Own);
        assert_eq!(networks.judge(&pod, OWN, ip(9)), Verdict::Own, "known by now");
        assert_eq!(networks.judge(&pod, OTHER, ip(9)), Verdict::Unproven);
        networks.forget(pod.uid);
        assert_eq!(networks.judge(&pod, OWN, ip(9)), Verdict::Unproven);
    }

    #[test]
    fn the_pod_s_processes_decide_where_the_address_does_not() {
        let networks = Networks::new(HOST);
        let pod = pod("app", "web");
        assert_eq!(networks.prove(&pod, OTHER, Some(OWN)), Verdict::Foreign);
        assert_eq!(networks.prove(&pod, OTHER, None), Verdict::Foreign);
        assert_eq!(networks.prove(&pod, OWN, Some(OWN)), Verdict::Own);
        assert_eq!(networks.judge(&pod, OWN, ip(9)), Verdict::Own, "known by now");
    }

    #[test]
    fn a_pod_on_the_host_s_network_dials_from_there_and_nowhere_else() {
        let networks = Networks::new(HOST);
        let proxy = Pod { host_network: true, ips: vec![ip(1)], ..pod("mesh", "proxy") };
        assert_eq!(networks.judge(&proxy, HOST, ip(1)), Verdict::Own);
        assert_eq!(networks.judge(&proxy, OTHER, ip(1)), Verdict::Foreign);
    }
}
