//! Why the kernel side does not work, and what to do about it.

use std::{error::Error as StdError, io, path::PathBuf};

use crate::error::chain;

/// Why the kernel side does not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The build had no eBPF toolchain.
    #[error(
        "this podgate was built without the eBPF object and cannot run: `cargo xtask build-ebpf` prints where the object \
         is, and `PODGATE_EBPF_OBJECT=/path/to/that/object cargo build --release -p agent --bin podgate` builds podgate \
         with it"
    )]
    NoObject,
    /// No randomness for a key.
    #[error("getting randomness for a key: {0}")]
    Randomness(#[source] getrandom::Error),
    /// The kernel or aya does not take the object.
    #[error("loading the eBPF object: {}; the agent must run privileged on Linux 6.1 or later", chain(source.as_ref()))]
    Load {
        /// What aya says.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The object lacks something the agent expects.
    #[error("BUG: the eBPF object has no usable {what}: it was built from other sources than this agent")]
    Mismatch {
        /// The program or map.
        what: &'static str,
    },
    /// The kernel does not take a program.
    #[error(
        "loading the eBPF program {program}: {source}; the agent must run privileged on Linux 6.1 or later{}",
        verifier(log_tail)
    )]
    Rejected {
        /// Name of the program.
        program: &'static str,
        /// The kernel's error.
        source: Box<dyn StdError + Send + Sync>,
        /// The last lines of the verifier's log, if it got that far.
        log_tail: String,
    },
    /// A cgroup directory cannot be opened.
    #[error("opening the cgroup {}: {source}; is it on the cgroup2 mount of the host?", path.display())]
    Cgroup {
        /// The directory.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A program cannot be attached.
    #[error(
        "attaching the eBPF program {program} to {}: {source}; a cgroup must be on a cgroup2 mount, and no other program \
         may be attached there or above exclusively (`bpftool cgroup tree` shows them)",
        to.display()
    )]
    Attach {
        /// Name of the program.
        program: &'static str,
        /// The cgroup, or the host's network.
        to: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A program cannot be attached to a netdev.
    #[error(
        "attaching the eBPF program {program} to what leaves by {netdev}: {source}; where the kernel has no tcx (before 6.6), \
         it needs CONFIG_NET_CLS_BPF, and no filter of another kind at preference 1 (`tc filter show dev {netdev} egress` \
         shows them)"
    )]
    Fence {
        /// Name of the program.
        program: &'static str,
        /// The netdev.
        netdev: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// A program cannot be detached.
    #[error("detaching the eBPF program {program} from {}: {source}", from.display())]
    Detach {
        /// Name of the program.
        program: &'static str,
        /// The cgroup's directory.
        from: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Somebody has removed what all agents of a node share.
    #[error("{} is gone or not this agent's any more: `podgate detach` was run; start this agent again", path.display())]
    Orphaned {
        /// The pin.
        path: PathBuf,
    },
    /// A pin cannot be made, read or removed.
    #[error("the pin {}: {source}; bpffs must be mounted there, and the agent be root on it", path.display())]
    Pin {
        /// The file or directory.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Another agent does not finish what it does with the pins.
    #[error("another podgate has been changing {} for too long: `fuser {}` tells which", path.display(), path.display())]
    Locked {
        /// The directory of all pins.
        path: PathBuf,
    },
    /// A pinned map is not what this agent would make.
    #[error(
        "BUG: {} was made by a podgate of the same ABI version with other records: remove everything with \
         `podgate detach`, and start again",
        path.display()
    )]
    Shape {
        /// The pin.
        path: PathBuf,
    },
    /// The clock cannot be read.
    #[error("BUG: CLOCK_MONOTONIC is out of range")]
    Clock,
    /// The owner of the interceptor cannot be started.
    #[error("starting a thread: {0}; is the limit of tasks of the agent's cgroup reached?")]
    Thread(#[source] io::Error),
    /// The owner of the interceptor has panicked.
    #[error("BUG: the thread that owns the eBPF programs has ended")]
    OwnerEnded,
    /// Only one can read the events.
    #[error("BUG: somebody else reads the events of the eBPF programs already")]
    EventsTaken,
    /// A map cannot be read or written.
    #[error("{action} the eBPF map {map}: {}", chain(source.as_ref()))]
    Map {
        /// "reading" or "writing".
        action: &'static str,
        /// Name of the map.
        map: &'static str,
        /// What aya says.
        source: Box<dyn StdError + Send + Sync>,
    },
}

fn verifier(log_tail: &str) -> String {
    if log_tail.is_empty() { String::new() } else { format!("; the verifier's last words:\n{log_tail}") }
}
