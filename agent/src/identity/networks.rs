//! Whether a connection came from the caller's own network.
//!
//! A node-wide proxy, as some meshes have it, may intercept an application's connection and make another one: from its own
//! cgroup, through a socket in the application's network namespace. Its cgroup must not count as the caller then. Owns this
//! second condition of attestation; never a source of identity by itself.

use std::{io, path::Path, sync::Arc};

use papaya::HashMap as ConcurrentMap;

use super::{Pod, PodUid, cgroupfs::Kubepods, netns, pod_network};

/// Finds a pod's network from its processes. A trait because only a real node has them.
pub trait PodProcesses: Send + Sync + 'static {
    /// The netns cookie of the pod whose own cgroup is at this path below kubepods; `None` if it has no process to read it
    /// from.
    fn network(&self, pod: &Path) -> io::Result<Option<u64>>;
}

/// The netns cookies of pods, learned where podgate listens in their networks, and from their processes.
#[derive(Debug)]
pub struct Networks {
    host: u64,
    known: ConcurrentMap<PodUid, u64>,
    listened: ConcurrentMap<PodUid, u16>,
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
        Self { host, known: ConcurrentMap::new(), listened: ConcurrentMap::new() }
    }

    /// Judges a connection from the network `cookie`.
    pub fn judge(&self, pod: &Pod, cookie: u64) -> Verdict {
        if pod.host_network {
            return if cookie == self.host { Verdict::Own } else { Verdict::Foreign };
        }
        if self.known.pin().get(&pod.uid) == Some(&cookie) { Verdict::Own } else { Verdict::Unproven }
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

    /// Learns the network of a pod.
    pub fn learn(&self, uid: PodUid, cookie: u64) {
        self.known.pin().insert(uid, cookie);
    }

    /// Notes the port on a pod's own loopback at which podgate listens; `None` once it does no more.
    pub fn set_listened(&self, uid: PodUid, port: Option<u16>) {
        let listened = self.listened.pin();
        match port {
            Some(port) => listened.insert(uid, port),
            None => listened.remove(&uid),
        };
    }

    /// The port on a pod's own loopback at which podgate listens: no program of the pod can listen there.
    pub fn listened(&self, uid: PodUid) -> Option<u16> {
        self.listened.pin().get(&uid).copied()
    }
}

// === impl Kubepods ===

impl PodProcesses for Arc<Kubepods> {
    fn network(&self, pod: &Path) -> io::Result<Option<u64>> {
        pod_network::find(self, &self.path().join(pod))?
            .map(|namespace| netns::cookie_of(namespace.into()))
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod;

    const HOST: u64 = 1;
    const OWN: u64 = 10;
    const OTHER: u64 = 20;

    #[test]
    fn only_what_was_learned_proves_a_network() {
        let networks = Networks::new(HOST);
        let pod = pod("app", "web");
        assert_eq!(networks.judge(&pod, OWN), Verdict::Unproven);
        networks.learn(pod.uid, OWN);
        assert_eq!(networks.judge(&pod, OWN), Verdict::Own);
        assert_eq!(networks.judge(&pod, OTHER), Verdict::Unproven, "its sandbox may have been made again");
        networks.remove(pod.uid);
        assert_eq!(networks.judge(&pod, OWN), Verdict::Unproven);
    }

    #[test]
    fn the_processes_of_the_pod_decide_where_nothing_was_learned() {
        let networks = Networks::new(HOST);
        let pod = pod("app", "web");
        assert_eq!(networks.prove(&pod, OTHER, Some(OWN)), Verdict::Foreign);
        assert_eq!(networks.prove(&pod, OTHER, None), Verdict::Foreign);
        assert_eq!(networks.prove(&pod, OWN, Some(OWN)), Verdict::Own);
        assert_eq!(networks.judge(&pod, OWN), Verdict::Own, "known by now");
    }

    #[test]
    fn a_pod_on_the_host_network_connects_from_there_only() {
        let networks = Networks::new(HOST);
        let proxy = Pod { host_network: true, ..pod("mesh", "proxy") };
        assert_eq!(networks.judge(&proxy, HOST), Verdict::Own);
        assert_eq!(networks.judge(&proxy, OTHER), Verdict::Foreign);
    }
}
