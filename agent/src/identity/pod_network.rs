//! The network of a pod, found through its processes: when its first one starts, which namespace is the pod's, and when the
//! last one has ended.
//!
//! Owns that search; never enters a namespace. Whether a pod is on the host's network its object says, never a process.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _},
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    path::Path,
};

use procfs::process::Process;
use tokio::io::{Interest, unix::AsyncFd};

use super::cgroupfs::Kubepods;

/// Tells whether a cgroup has processes, in it or below.
///
/// Of each change the kernel tells who polls `cgroup.events`:
/// <https://github.com/torvalds/linux/blob/v6.1/Documentation/admin-guide/cgroup-v2.rst>
#[derive(Debug)]
pub struct Populated(AsyncFd<File>);

/// By which two namespaces that are open are told apart: device and inode.
type NamespaceId = (u64, u64);

/// A process that shows the network of its pod.
#[derive(Clone, Copy, Debug)]
pub(super) struct SandboxProcess {
    pub(super) pid: i32,
    /// When it was started, in clock ticks since boot.
    pub(super) started: u64,
    namespace: NamespaceId,
}

// === impl Populated ===

impl Populated {
    /// Follows the cgroup at this directory. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the cgroup has been removed, or the limit of open files is reached.
    #[expect(
        unsafe_code,
        reason = "tokio asks who owns the descriptor, and the safe function for it does not"
    )]
    pub fn follow(cgroup: &Path) -> io::Result<Self> {
        let events = File::open(cgroup.join("cgroup.events"))?;
        // SAFETY: the file is the descriptor's one owner, and closed with the registration; it is never replaced.
        let events = unsafe { AsyncFd::register_with_interest(events, Interest::PRIORITY) };
        Ok(Self(events?))
    }

    /// Returns once it has processes, or none any more. A cgroup that was removed has none.
    ///
    /// # Errors
    /// When the kernel's file cannot be read.
    pub async fn becomes(&mut self, populated: bool) -> io::Result<()> {
        loop {
            // Read after each event, not only told of it: two changes within 10 ms are one event.
            if self.read()? == populated {
                return Ok(());
            }
            self.0.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }

    fn read(&mut self) -> io::Result<bool> {
        let file = self.0.get_mut();
        let mut text = String::new();
        match file.rewind().and_then(|()| file.read_to_string(&mut text)) {
            Ok(_) => Ok(text.lines().any(|line| line == "populated 1")),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// The network namespace of the pod whose own cgroup is this directory; `None` while no process shows it.
///
/// That of the oldest process in the cgroups directly below, which is the sandbox's. At first there is the container
/// runtime's own, in the host's network, which shows nothing. What a workload makes for itself, a cgroup further down or a
/// network of its own, comes later and decides nothing.
///
/// # Errors
/// When the cgroup or `/proc` cannot be read.
pub fn find(kubepods: &Kubepods, pod: &Path) -> io::Result<Option<OwnedFd>> {
    let Some(sandbox) = sandbox_process(pod)? else { return Ok(None) };
    let namespace = File::open(of_process(sandbox.pid))?;
    // The PID may have been reused before the namespace was opened, also by a process of the pod's that is still in the
    // host's network.
    let is_same = id(&namespace.metadata()?) == sandbox.namespace;
    let is_sandbox = is_same && kubepods.contains(pod, sandbox.pid).map_err(io::Error::other)?;
    Ok(is_sandbox.then(|| namespace.into()))
}

/// The oldest process of a pod in a network other than the host's: the sandbox's.
///
/// # Errors
/// When the cgroup cannot be read.
pub(super) fn sandbox_process(pod: &Path) -> io::Result<Option<SandboxProcess>> {
    let host = namespace_id(Path::new("/proc/self/ns/net"))?;
    let mut oldest: Option<SandboxProcess> = None;
    for pid in processes(pod)? {
        // A process that has ended meanwhile shows nothing.
        let Ok(started) = Process::new(pid).and_then(|process| process.stat()).map(|stat| stat.starttime)
        else {
            continue;
        };
        let Ok(namespace) = namespace_id(Path::new(&of_process(pid))) else { continue };
        if namespace != host && oldest.as_ref().is_none_or(|oldest| started < oldest.started) {
            oldest = Some(SandboxProcess { pid, started, namespace });
        }
    }
    Ok(oldest)
}

/// Whether both are the same namespace.
///
/// # Errors
/// When the kernel does not tell.
pub fn is_same(one: &OwnedFd, other: &OwnedFd) -> io::Result<bool> {
    let of = |namespace: &OwnedFd| File::from(namespace.try_clone()?).metadata().map(|found| id(&found));
    Ok(of(one)? == of(other)?)
}

fn of_process(pid: i32) -> String {
    format!("/proc/{pid}/ns/net")
}

fn namespace_id(path: &Path) -> io::Result<NamespaceId> {
    fs::metadata(path).map(|metadata| id(&metadata))
}

fn id(namespace: &fs::Metadata) -> NamespaceId {
    (namespace.dev(), namespace.ino())
}

/// Every process in the pod's containers: in the cgroups directly below.
fn processes(pod: &Path) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(pod)? {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            continue;
        }
        // Removed meanwhile: there is none.
        let Ok(listed) = fs::read_to_string(entry.path().join("cgroup.procs")) else { continue };
        found.extend(listed.lines().filter_map(|line| line.parse::<i32>().ok()));
    }
    Ok(found)
}
