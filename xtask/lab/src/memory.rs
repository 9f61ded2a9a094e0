//! A limit to a process's memory, where the machine has the memory controller: on cgroup v1, or on cgroup2.
//!
//! Owns the v1 cgroup that it makes, and removes it. On cgroup2 the process stays where it is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

use crate::cgroupfs;

const CONTROLLER: &str = "memory";

/// A limit effective.
#[derive(Debug)]
pub struct MemoryLimit {
    directory: PathBuf,
    /// Where the kernel counts the processes it has killed.
    events: &'static str,
    /// Whether the directory is removed with this.
    is_own: bool,
}

// === impl MemoryLimit ===

impl MemoryLimit {
    /// From now on the process `pid`, which is in this cgroup, can take so many bytes more, or on cgroup2 have so many.
    pub(crate) fn set(cgroup: &Path, pid: u32, bytes: u64) -> anyhow::Result<Self> {
        let (limit, limits) = if let Some(mount) = v1_mount()? {
            let directory = mount.join(format!("podgate-lab-{pid}"));
            fs::create_dir(&directory)
                .with_context(|| format!("cannot create the cgroup {}", directory.display()))?;
            (Self { directory, events: "memory.oom_control", is_own: true }, "memory.limit_in_bytes")
        } else {
            enable(cgroup)?;
            (Self { directory: cgroup.to_owned(), events: "memory.events", is_own: false }, "memory.max")
        };
        fs::write(limit.directory.join(limits), bytes.to_string())
            .with_context(|| format!("cannot limit the memory of {}", limit.directory.display()))?;
        if limit.is_own {
            cgroupfs::join(&limit.directory, pid)?;
        }
        Ok(limit)
    }

    /// How many processes the kernel has killed for it.
    pub fn kills(&self) -> anyhow::Result<u64> {
        let path = self.directory.join(self.events);
        let events = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(kills.with_context(|| format!("{} has no oom_kill", path.display()))?.parse()?)
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        if self.is_own
            && let Err(error) = fs::remove_dir(&self.directory)
        {
            eprintln!("the cgroup {} could not be removed: {error}", self.directory.display());
        }
    }
}

/// Where the controller is, if it is on cgroup v1.
fn v1_mount() -> anyhow::Result<Option<PathBuf>> {
    let mounts = procfs::process::Process::myself().and_then(|own| own.mountinfo());
    let mut mounts = mounts.context("cannot read /proc/self/mountinfo")?.into_iter();
    let mount =
        mounts.find(|mount| mount.fs_type == "cgroup" && mount.super_options.contains_key(CONTROLLER));
    Ok(mount.map(|mount| mount.mount_point))
}

/// Enables the controller all the way down to a cgroup, but for the root, which is the machine's.
fn enable(cgroup: &Path) -> anyhow::Result<()> {
    const CHILDREN: &str = "cgroup.subtree_control";
    let mount = cgroupfs::mount_point()?;
    let enabled = fs::read_to_string(mount.join(CHILDREN))?;
    ensure!(
        enabled.split_whitespace().any(|controller| controller == CONTROLLER),
        "the memory controller is on no hierarchy: echo +memory > {}/{CHILDREN}",
        mount.display()
    );
    let mut parents: Vec<_> = cgroup.ancestors().skip(1).take_while(|parent| *parent != mount).collect();
    parents.reverse();
    for parent in parents {
        fs::write(parent.join(CHILDREN), "+memory")
            .with_context(|| format!("cannot enable the memory controller below {}", parent.display()))?;
    }
    Ok(())
}
