//! What must be true of the node before anything is loaded.
//!
//! Owns the list of preconditions and the remedy for each; finds all that are missing, changes nothing.

use std::{fmt, path::Path};

use procfs::process::Process;

use crate::{
    config::Config,
    identity::cgroupfs::{self, Kubepods},
};

mod kernel;

/// A precondition that does not hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub remedy: &'static str,
}

/// What was found on the node.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Effective user id.
    pub euid: u32,
    /// Effective capabilities, a bit each.
    pub capabilities: u64,
    /// The kernel's release, and what the programs need that it does not have.
    pub kernel: (String, Vec<&'static str>),
    /// What is wrong with cgroup2 and kubepods, if anything.
    pub kubepods: Result<(), String>,
    /// Whether the agent's own cgroup is visible as the node sees it.
    pub own_cgroup: OwnCgroup,
    /// Whether bpffs is mounted where it was said to be.
    pub bpffs: Result<(), String>,
}

/// Where the agent itself is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OwnCgroup {
    /// In a cgroup of its own.
    Own,
    /// In the root of the hierarchy.
    Root,
    /// In a private cgroup namespace: its real place cannot be seen.
    Hidden,
}

/// The initial cgroup namespace's inode, `PROC_CGROUP_INIT_INO` of `include/linux/proc_ns.h`.
const CGROUP_INIT_INO: u64 = 0xefff_fffb;
/// The capabilities that are needed, with their bits in `include/uapi/linux/capability.h` and what for.
const CAPABILITIES: [(u32, &str, &str); 4] = [
    (39, "CAP_BPF", "load the programs"),
    (38, "CAP_PERFMON", "load the programs"),
    (12, "CAP_NET_ADMIN", "attach the programs and make podgate's network interface"),
    (2, "CAP_DAC_READ_SEARCH", "find a cgroup by its id"),
];

// === impl Facts ===

impl Facts {
    /// Looks at the node.
    pub(crate) fn gather(config: &Config) -> Self {
        let status = Process::myself().and_then(|me| me.status()).ok();
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        Self {
            euid: rustix::process::geteuid().as_raw(),
            capabilities: status.map_or(0, |status| status.capeff),
            kernel: (release, kernel::missing()),
            kubepods: Kubepods::find(&config.cgroup_root).map(drop).map_err(|error| error.to_string()),
            own_cgroup: own_cgroup(),
            bpffs: bpffs(&config.bpffs),
        }
    }

    /// Everything that is wrong, each with its remedy.
    pub(crate) fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut find = |problem: String, remedy| findings.push(Finding { problem, remedy });
        if self.euid != 0 {
            find(format!("podgate runs as user {}", self.euid), "run it as root (runAsUser: 0)");
        }
        for (bit, name, what) in CAPABILITIES {
            if self.capabilities & (1 << bit) == 0 {
                find(format!("{name} is missing, which it takes to {what}"), "run the container privileged");
            }
        }
        let (release, missing) = &self.kernel;
        for feature in missing {
            let remedy = "use nodes with Amazon Linux 2023 or another system with Linux 6.1 or later";
            find(format!("Linux {release} does not have {feature}"), remedy);
        }
        if let Err(problem) = &self.kubepods {
            find(problem.clone(), "check the hostPath mount of /sys/fs/cgroup and --cgroup-root");
        }
        match self.own_cgroup {
            OwnCgroup::Own => {}
            OwnCgroup::Root => find(
                "podgate runs in the root cgroup, where its program would see every connection of the node"
                    .into(),
                "start it as a pod, or in a cgroup of its own",
            ),
            OwnCgroup::Hidden => find(
                "podgate runs in a private cgroup namespace and cannot tell its own cgroup".into(),
                "run the container privileged, which gives it the host's cgroup namespace",
            ),
        }
        if let Err(problem) = &self.bpffs {
            find(problem.clone(), "mount it: `mount -t bpf bpf /sys/fs/bpf`, and the hostPath /sys/fs/bpf");
        }
        findings
    }
}

// === impl Finding ===

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.problem, self.remedy)
    }
}

fn own_cgroup() -> OwnCgroup {
    use std::os::unix::fs::MetadataExt as _;
    let namespace = std::fs::metadata("/proc/self/ns/cgroup").map(|metadata| metadata.ino());
    if namespace.is_ok_and(|inode| inode != CGROUP_INIT_INO) {
        return OwnCgroup::Hidden;
    }
    match cgroupfs::cgroup_of(None) {
        Ok(path) if path == Path::new("/") => OwnCgroup::Root,
        _ => OwnCgroup::Own,
    }
}

/// `BPF_FS_MAGIC` of `include/uapi/linux/magic.h`.
fn bpffs(path: &Path) -> Result<(), String> {
    const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
    match rustix::fs::statfs(path) {
        Ok(stat) if stat.f_type == BPF_FS_MAGIC => Ok(()),
        Ok(_) => Err(format!("no bpffs is mounted at {}", path.display())),
        Err(error) => Err(format!("no bpffs is mounted at {}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Facts {
        Facts {
            euid: 0,
            capabilities: u64::MAX,
            kernel: ("6.1.0".into(), Vec::new()),
            kubepods: Ok(()),
            own_cgroup: OwnCgroup::Own,
            bpffs: Ok(()),
        }
    }

    #[test]
    fn a_good_node_has_no_findings() {
        assert_eq!(good().findings(), []);
    }

    #[test]
    fn all_findings_come_at_once_and_each_has_a_remedy() {
        let facts = Facts {
            euid: 1000,
            capabilities: 0,
            kernel: ("5.10.223-212.873.amzn2.x86_64".into(), vec!["socket storage", "ring buffers"]),
            kubepods: Err("no cgroup2 file system is mounted".into()),
            own_cgroup: OwnCgroup::Root,
            bpffs: Err("no bpffs".into()),
        };
        let findings = facts.findings();
        assert_eq!(findings.len(), 6 + CAPABILITIES.len());
        assert!(findings.iter().all(|finding| !finding.remedy.is_empty()));
        for part in [
            "user 1000",
            "CAP_BPF",
            "5.10.223",
            "socket storage",
            "ring buffers",
            "cgroup2",
            "root cgroup",
            "bpffs",
        ] {
            assert!(findings.iter().any(|finding| finding.problem.contains(part)), "{part}");
        }
    }

    #[test]
    fn one_missing_capability_is_one_finding() {
        let findings = Facts { capabilities: !(1 << 39), ..good() }.findings();
        assert_eq!(findings.len(), 1);
        assert!(findings[0].to_string().contains("CAP_BPF"));
    }
}
