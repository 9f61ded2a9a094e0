//! The node's cgroups, in the layout the kubelet gives them.
//!
//! Owns one subtree below the cgroup2 mount, everything in it included: `remove` kills what still runs there.
//! Never touches the root cgroup or another lab's subtree.

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

/// How long a killed process may take to leave its cgroup.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// How the kubelet names cgroups: `--cgroup-driver`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CgroupDriver {
    /// `kubepods.slice/kubepods-burstable.slice/…`: what EKS uses.
    #[default]
    Systemd,
    /// `kubepods/burstable/pod…`.
    Cgroupfs,
}

/// A pod's quality of service class, which decides where its cgroup lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Qos {
    /// Directly below kubepods.
    Guaranteed,
    /// One level further down.
    #[default]
    Burstable,
    /// One level further down.
    BestEffort,
}

/// One node's subtree.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeCgroups {
    /// The directory that holds the kubepods cgroup and the node's own processes.
    pub root: PathBuf,
    /// The same below the cgroup2 mount, as the kubelet's `--cgroup-root` wants it.
    pub below_mount: String,
    driver: CgroupDriver,
}

// === impl NodeCgroups ===

impl NodeCgroups {
    /// Creates the subtree of the lab called `name`.
    pub fn create(name: &str, driver: CgroupDriver) -> anyhow::Result<Self> {
        let cgroups = Self { root: of_lab(name)?, below_mount: format!("/{}", directory_name(name)), driver };
        create(&cgroups.root)?;
        create(&cgroups.system())?;
        create(&cgroups.kubepods())?;
        Ok(cgroups)
    }

    /// Where processes of the node run that belong to no pod.
    pub fn system(&self) -> PathBuf {
        self.root.join("system.slice")
    }

    /// The kubepods cgroup.
    pub fn kubepods(&self) -> PathBuf {
        self.root.join(match self.driver {
            CgroupDriver::Systemd => "kubepods.slice",
            CgroupDriver::Cgroupfs => "kubepods",
        })
    }

    /// The cgroup of a pod.
    pub fn pod(&self, qos: Qos, uid: &str) -> PathBuf {
        let kubepods = self.kubepods();
        let class = match qos {
            Qos::Guaranteed => None,
            Qos::Burstable => Some("burstable"),
            Qos::BestEffort => Some("besteffort"),
        };
        match (self.driver, class) {
            (CgroupDriver::Systemd, None) => kubepods.join(format!("kubepods-pod{}.slice", systemd_uid(uid))),
            (CgroupDriver::Systemd, Some(class)) => kubepods
                .join(format!("kubepods-{class}.slice"))
                .join(format!("kubepods-{class}-pod{}.slice", systemd_uid(uid))),
            (CgroupDriver::Cgroupfs, None) => kubepods.join(format!("pod{uid}")),
            (CgroupDriver::Cgroupfs, Some(class)) => kubepods.join(class).join(format!("pod{uid}")),
        }
    }

    /// The cgroup of a container of the pod at `pod`.
    pub fn container(&self, pod: &Path, id: &str) -> PathBuf {
        pod.join(match self.driver {
            CgroupDriver::Systemd => format!("cri-containerd-{id}.scope"),
            CgroupDriver::Cgroupfs => id.to_owned(),
        })
    }
}

/// The cgroup2 mount: the only one there is, or the `unified` one of a hybrid hierarchy.
pub fn mount_point() -> anyhow::Result<PathBuf> {
    let mounts = procfs::process::Process::myself().and_then(|own| own.mountinfo());
    mounts
        .context("cannot read /proc/self/mountinfo")?
        .into_iter()
        .find(|mount| mount.fs_type == "cgroup2")
        .map(|mount| mount.mount_point)
        .context("cgroup2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")
}

/// The directory of the lab called `name`.
pub(crate) fn of_lab(name: &str) -> anyhow::Result<PathBuf> {
    Ok(mount_point()?.join(directory_name(name)))
}

/// Creates a cgroup and its parents.
pub fn create(cgroup: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(cgroup)
        .with_context(|| format!("cannot create cgroup {}: run as root", cgroup.display()))
}

/// Moves the process `pid` into a cgroup; 0 is the calling process.
pub fn join(cgroup: &Path, pid: u32) -> anyhow::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), pid.to_string())
        .with_context(|| format!("cannot move process {pid} into cgroup {}", cgroup.display()))
}

/// Kills every process in a cgroup and below (`cgroup.kill`, kernel 5.14) and removes it with all its
/// children. A cgroup that is not there is fine.
pub fn remove(cgroup: &Path) -> anyhow::Result<()> {
    if !cgroup.exists() {
        return Ok(());
    }
    fs::write(cgroup.join("cgroup.kill"), "1")
        .with_context(|| format!("cannot kill the processes in {}", cgroup.display()))?;
    let deadline = Instant::now() + KILL_TIMEOUT;
    while is_populated(cgroup)? {
        if Instant::now() > deadline {
            bail!("processes in {} are still there {KILL_TIMEOUT:?} after SIGKILL", cgroup.display());
        }
        thread::sleep(Duration::from_millis(5));
    }
    remove_empty(cgroup)
}

/// Whether a process runs in the cgroup or below.
fn is_populated(cgroup: &Path) -> anyhow::Result<bool> {
    let events = fs::read_to_string(cgroup.join("cgroup.events"))
        .with_context(|| format!("cannot read the events of {}", cgroup.display()))?;
    Ok(events.lines().any(|line| line == "populated 1"))
}

fn remove_empty(cgroup: &Path) -> anyhow::Result<()> {
    let entries =
        fs::read_dir(cgroup).with_context(|| format!("cannot list the cgroup {}", cgroup.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_empty(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup).with_context(|| format!("cannot remove the cgroup {}", cgroup.display()))
}

fn directory_name(lab: &str) -> String {
    format!("podgate-lab-{lab}")
}

/// systemd reads `-` in a slice's name as a level of its own.
fn systemd_uid(uid: &str) -> String {
    uid.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_of_a_pod_lies_where_the_kubelet_puts_it() {
        let uid = "5b1c3a52-8d3c-4a50-a2f6-9d6b7c1e0f11";
        let cases = [
            (
                CgroupDriver::Systemd,
                Qos::Guaranteed,
                "/c/kubepods.slice/kubepods-pod5b1c3a52_8d3c_4a50_a2f6_9d6b7c1e0f11.slice/cri-containerd-ab.scope",
            ),
            (
                CgroupDriver::Systemd,
                Qos::Burstable,
                "/c/kubepods.slice/kubepods-burstable.slice/\
                 kubepods-burstable-pod5b1c3a52_8d3c_4a50_a2f6_9d6b7c1e0f11.slice/cri-containerd-ab.scope",
            ),
            (
                CgroupDriver::Systemd,
                Qos::BestEffort,
                "/c/kubepods.slice/kubepods-besteffort.slice/\
                 kubepods-besteffort-pod5b1c3a52_8d3c_4a50_a2f6_9d6b7c1e0f11.slice/cri-containerd-ab.scope",
            ),
            (
                CgroupDriver::Cgroupfs,
                Qos::Guaranteed,
                "/c/kubepods/pod5b1c3a52-8d3c-4a50-a2f6-9d6b7c1e0f11/ab",
            ),
            (
                CgroupDriver::Cgroupfs,
                Qos::BestEffort,
                "/c/kubepods/besteffort/pod5b1c3a52-8d3c-4a50-a2f6-9d6b7c1e0f11/ab",
            ),
        ];
        for (driver, qos, expected) in cases {
            let cgroups = NodeCgroups { root: "/c".into(), below_mount: "/c".into(), driver };
            let container = cgroups.container(&cgroups.pod(qos, uid), "ab");
            assert_eq!(container, Path::new(expected), "{driver:?} {qos:?}");
        }
    }
}
