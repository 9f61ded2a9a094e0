//! The network namespaces of all pods of a node, as long as they last.
//!
//! Owns the walk over the pods' cgroups and how a namespace is known to be the same as before; never holds one open, which
//! would outlive its pod. Never judges a connection: that is `networks`'. One pod's is `pod_network`'s.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    cgroup,
    cgroupfs::{self, Kubepods},
    pod_network::{self, SandboxProcess},
};

/// How long a new pod may take until it has a network: pulling the sandbox's image included.
const NEW_FOR: Duration = Duration::from_secs(10);

/// The networks of the pods of a node, by the pods' own cgroups.
#[derive(Debug)]
pub struct Sandboxes {
    kubepods: Arc<Kubepods>,
    host: u64,
    pods: HashMap<u64, State>,
}

/// A network in which a pod's sandbox was found, open until its number is known.
#[derive(Debug)]
pub struct Found {
    pod: u64,
    process: Process,
    /// The namespace.
    pub namespace: File,
}

/// What is known of a pod.
#[derive(Debug)]
struct State {
    directory: PathBuf,
    since: Instant,
    /// The sandbox's process, and the number by which the node's netdevs name its network.
    network: Option<(Process, i32)>,
}

/// A process in a network namespace: as long as it is there, so is the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: i32,
    started: u64,
    /// The namespace's inode.
    network: u64,
}

// === impl Sandboxes ===

impl Sandboxes {
    /// Of the pods below kubepods. Knows none yet.
    pub fn new(kubepods: Arc<Kubepods>) -> io::Result<Self> {
        let host = fs::metadata("/proc/thread-self/ns/net")?.ino();
        Ok(Self { kubepods, host, pods: HashMap::new() })
    }

    /// Looks at what pods there are, and forgets the networks that ended. The networks that are new; whoever has found their
    /// numbers calls [`learn`](Self::learn).
    pub fn refresh(&mut self, now: Instant) -> io::Result<Vec<Found>> {
        let present = pods(self.kubepods.path())?;
        self.pods.retain(|pod, _| present.contains_key(pod));
        let mut found = Vec::new();
        for (pod, directory) in present {
            let state =
                self.pods.entry(pod).or_insert_with(|| State { directory, since: now, network: None });
            if state.network.is_some_and(|(process, _)| process.lasts()) {
                continue;
            }
            state.network = None;
            // What ends meanwhile is seen next time.
            let sandbox = Process::sandbox(&self.kubepods, &state.directory).unwrap_or(None);
            let sandbox = sandbox.filter(|(process, _)| process.network != self.host);
            found.extend(sandbox.map(|(process, namespace)| Found { pod, process, namespace }));
        }
        Ok(found)
    }

    /// Notes the number of a network, if it is still the pod's.
    pub fn learn(&mut self, found: &Found, id: i32) {
        if let Some(state) = self.pods.get_mut(&found.pod)
            && found.process.lasts()
        {
            state.network = Some((found.process, id));
        }
    }

    /// Every pod with a network of its own: the network's number, and the id of the pod's cgroup.
    pub fn known(&self) -> impl Iterator<Item = (i32, u64)> {
        self.pods.iter().filter_map(|(pod, state)| Some((state.network?.1, *pod)))
    }

    /// Whether some pod is new and has no network yet. Pods on the host's network never have one.
    pub fn are_incomplete(&self, now: Instant) -> bool {
        let is_new = |state: &State| now.saturating_duration_since(state.since) < NEW_FOR;
        self.pods.values().any(|state| state.network.is_none() && is_new(state))
    }
}

// === impl Process ===

impl Process {
    /// The oldest of a pod, with its network. A process that is about to enter the pod's may be seen in the host's.
    fn sandbox(kubepods: &Kubepods, directory: &Path) -> io::Result<Option<(Self, File)>> {
        let Some(SandboxProcess { pid, started, .. }) = pod_network::sandbox_process(directory)? else {
            return Ok(None);
        };
        let namespace = File::open(namespace_of(pid))?;
        let process = Self { pid, started, network: namespace.metadata()?.ino() };
        // The PID may have been reused before the namespace was opened.
        let is_sandbox = kubepods.contains(directory, pid).map_err(io::Error::other)? && process.lasts();
        Ok(is_sandbox.then_some((process, namespace)))
    }

    fn lasts(&self) -> bool {
        let stat = procfs::process::Process::new(self.pid).and_then(|process| process.stat());
        stat.is_ok_and(|stat| stat.starttime == self.started)
            && fs::metadata(namespace_of(self.pid)).is_ok_and(|namespace| namespace.ino() == self.network)
    }
}

fn namespace_of(pid: i32) -> String {
    format!("/proc/{pid}/ns/net")
}

/// The pods' own cgroups below a directory, by id.
fn pods(kubepods: &Path) -> io::Result<HashMap<u64, PathBuf>> {
    let mut found = HashMap::new();
    let mut note = |relative: &Path| {
        let is_pod = cgroup::parse(relative).is_some_and(|pod| pod.pod == relative);
        if is_pod && let Ok(id) = cgroupfs::cgroup_id(&kubepods.join(relative)) {
            found.insert(id, kubepods.join(relative));
        }
        is_pod
    };
    for name in directories(kubepods)? {
        if !note(Path::new(&name)) {
            // A class of service. It may be removed meanwhile.
            for below in directories(&kubepods.join(&name)).unwrap_or_default() {
                note(&Path::new(&name).join(below));
            }
        }
    }
    Ok(found)
}

fn directories(path: &Path) -> io::Result<Vec<std::ffi::OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.push(entry.file_name());
        }
    }
    Ok(names)
}
