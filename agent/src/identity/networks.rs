//! Whether a connection came from the caller's own network.
//!
//! A node-wide proxy, as some meshes have it, may intercept an application's connection and make another one: from its own
//! cgroup, through a socket in the application's network namespace. Its cgroup must not count as the caller then. Owns this
//! second condition of attestation; never a source of identity by itself.

use std::{
    fs::File,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use papaya::HashMap as ConcurrentMap;
use procfs::process::Process;

use super::{
    Pod, PodUid,
    cgroupfs::{self, Kubepods},
    netns,
};

/// Finds a pod's network from its processes. A trait because only a real node has them.
pub trait PodProcesses: Send + Sync + 'static {
    /// The netns cookie of the pod whose own cgroup is at this path below kubepods; `None` if it has no process to read it
    /// from.
    fn network(&self, pod: &Path) -> io::Result<Option<u64>>;
}

/// The netns cookies of pods, learned from their connections.
#[derive(Debug)]
pub struct Networks {
    host: u64,
    known: ConcurrentMap<PodUid, u64>,
}

/// What is known of a connection's network without asking the pod's processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the pod's own.
    Own,
    /// It is not.
    Foreign,
    /// Only the pod's processes can prove it.
    Unproven,
}

// === impl Networks ===

impl Networks {
    /// Knows no pod's network yet. `host` is the cookie of the host's.
    pub fn new(host: u64) -> Self {
        Self { host, known: ConcurrentMap::new() }
    }

    /// Judges a connection from the network `cookie` that arrived from the address `peer`.
    pub fn judge(&self, pod: &Pod, cookie: u64, peer: IpAddr) -> Verdict {
        if pod.host_network {
            return if cookie == self.host { Verdict::Own } else { Verdict::Foreign };
        }
        let known = self.known.pin().get(&pod.uid).copied();
        if known == Some(cookie) {
            return Verdict::Own;
        }
        // Only the pod has its address, and a proxy that hides its client has another.
        if pod.ips.contains(&peer) {
            self.learn(pod.uid, cookie);
            return Verdict::Own;
        }
        Verdict::Unproven
    }

    /// Judges by the network of the pod's processes.
    pub fn prove(&self, pod: &Pod, cookie: u64, of_processes: Option<u64>) -> Verdict {
        if of_processes != Some(cookie) {
            return Verdict::Foreign;
        }
        self.learn(pod.uid, cookie);
        Verdict::Own
    }

    /// Drops what is known of a pod that was removed.
    pub fn remove(&self, uid: PodUid) {
        self.known.pin().remove(&uid);
    }

    fn learn(&self, uid: PodUid, cookie: u64) {
        self.known.pin().insert(uid, cookie);
    }
}

// === impl Kubepods ===

impl PodProcesses for Arc<Kubepods> {
    fn network(&self, pod: &Path) -> io::Result<Option<u64>> {
        of_pod(&self.path().join(pod))
    }
}

/// The network of the pod whose own cgroup is this directory.
pub fn of_pod(directory: &Path) -> io::Result<Option<u64>> {
    let Some((_, pid)) = oldest_process(directory)? else { return Ok(None) };
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    // The PID may have been reused before the namespace was opened.
    if is_in(pid, directory)? { netns::cookie_of(namespace).map(Some) } else { Ok(None) }
}

/// The oldest process of a pod, which is the sandbox's, and since when it runs. A later process may have entered another
/// network.
pub(super) fn oldest_process(directory: &Path) -> io::Result<Option<(u64, i32)>> {
    let mut oldest = None;
    for pid in processes(directory)? {
        // It has exited meanwhile, so it is not the sandbox's.
        let Ok(stat) = Process::new(pid).and_then(|process| process.stat()) else { continue };
        if oldest.is_none_or(|(started, _)| stat.starttime < started) {
            oldest = Some((stat.starttime, pid));
        }
    }
    Ok(oldest)
}

/// Whether a process is in this cgroup directory or below it.
pub(super) fn is_in(pid: i32, directory: &Path) -> io::Result<bool> {
    let cgroup = cgroupfs::cgroup_of(Some(pid)).map_err(io::Error::other)?;
    let mount = cgroupfs::cgroup2_mount().map_err(io::Error::other)?;
    Ok(cgroupfs::join(&mount, &cgroup).starts_with(directory))
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
    fn only_the_address_of_the_pod_proves_its_network() {
        let networks = Networks::new(HOST);
        let pod = Pod { ips: vec![ip(7)], ..pod("app", "web") };
        assert_eq!(networks.judge(&pod, OWN, ip(9)), Verdict::Unproven);
        assert_eq!(networks.judge(&pod, OWN, ip(7)), Verdict::Own);
        assert_eq!(networks.judge(&pod, OWN, ip(9)), Verdict::Own, "known by now");
        assert_eq!(networks.judge(&pod, OTHER, ip(9)), Verdict::Unproven);
        networks.remove(pod.uid);
        assert_eq!(networks.judge(&pod, OWN, ip(9)), Verdict::Unproven);
    }

    #[test]
    fn the_processes_of_the_pod_decide_where_its_address_does_not() {
        let networks = Networks::new(HOST);
        let pod = pod("app", "web");
        assert_eq!(networks.prove(&pod, OTHER, Some(OWN)), Verdict::Foreign);
        assert_eq!(networks.prove(&pod, OTHER, None), Verdict::Foreign);
        assert_eq!(networks.prove(&pod, OWN, Some(OWN)), Verdict::Own);
        assert_eq!(networks.judge(&pod, OWN, ip(9)), Verdict::Own, "known by now");
    }

    #[test]
    fn a_pod_on_the_host_network_connects_from_there_only() {
        let networks = Networks::new(HOST);
        let proxy = Pod { host_network: true, ips: vec![ip(1)], ..pod("mesh", "proxy") };
        assert_eq!(networks.judge(&proxy, HOST, ip(1)), Verdict::Own);
        assert_eq!(networks.judge(&proxy, OTHER, ip(1)), Verdict::Foreign);
    }
}
