//! The cgroup2 mount: from a cgroup's id to its path and back, without walking the tree.
//!
//! Owns where cgroup2 and kubepods are; never interprets a name below kubepods.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use agent_common::defense::{Defense, holds};
use procfs::process::{MountInfo, Process};

/// Finds the path of a cgroup. A trait because only a real cgroup2 has ids, and only root may resolve them.
pub trait CgroupPaths: Send + Sync + 'static {
    /// The path of the cgroup with this id, relative to the kubepods cgroup; `None` when it is elsewhere.
    ///
    /// # Errors
    /// `ESTALE` when the cgroup was removed; otherwise the kernel's error.
    fn below_kubepods(&self, cgroup_id: u64) -> io::Result<Option<PathBuf>>;
}

/// The kubepods cgroup on the cgroup2 mount.
#[derive(Debug)]
pub struct Kubepods {
    mount: PathBuf,
    mount_dir: File,
    path: PathBuf,
}

/// Why the kubepods cgroup could not be found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// cgroup2 is not mounted, or not in this container.
    #[error("no cgroup2 file system is mounted: mount the host's /sys/fs/cgroup into the agent's container")]
    NoCgroup2,
    /// The kubelet has its pods elsewhere.
    #[error(
        "neither {0}/kubepods.slice nor {0}/kubepods exists: is this a Kubernetes node? If the kubelet runs with \
         --cgroup-root, give podgate the same"
    )]
    NoKubepods(PathBuf),
    /// `/proc` or the mount could not be read.
    #[error("cannot read {what}: {source}")]
    Read {
        /// What could not be read.
        what: String,
        /// Why.
        source: io::Error,
    },
}

/// `struct file_handle` of `open_by_handle_at(2)` with the handle that kernfs defines: the 64-bit id.
#[repr(C)]
struct KernfsHandle {
    bytes: u32,
    kind: i32,
    id: u64,
}

/// `FILEID_KERNFS` of `include/linux/exportfs.h`, Linux 5.5:
/// <https://github.com/torvalds/linux/commit/33c5ac9175195c36a0b7005aaf503a2e81f117a1>
const FILEID_KERNFS: i32 = 0xfe;

// === impl Kubepods ===

impl Kubepods {
    /// Finds kubepods below the kubelet's `--cgroup-root`, in either driver's form.
    pub fn find(cgroup_root: &Path) -> Result<Self, Error> {
        let mount = cgroup2_mount()?;
        let root = join(&mount, cgroup_root);
        let path = ["kubepods.slice", "kubepods"]
            .iter()
            .map(|name| root.join(name))
            .find(|path| path.is_dir())
            .ok_or(Error::NoKubepods(root))?;
        let mount_dir =
            File::open(&mount).map_err(|source| Error::Read { what: mount.display().to_string(), source })?;
        Ok(Self { mount, mount_dir, path })
    }

    /// The directory of kubepods.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many levels kubepods is below the root of the cgroup2 hierarchy, which is level 0.
    pub fn level(&self) -> u32 {
        let below = self.path.strip_prefix(&self.mount).unwrap_or(&self.path);
        u32::try_from(below.components().count()).unwrap_or(u32::MAX)
    }

    /// The directory of the cgroup that a process is in.
    pub fn of_process(&self, pid: Option<i32>) -> Result<PathBuf, Error> {
        cgroup_of(pid).map(|path| join(&self.mount, &path))
    }

    /// Whether a process is in the cgroup at this directory, or below it.
    pub fn contains(&self, directory: &Path, pid: i32) -> Result<bool, Error> {
        self.of_process(Some(pid)).map(|cgroup| cgroup.starts_with(directory))
    }
}

impl CgroupPaths for std::sync::Arc<Kubepods> {
    fn below_kubepods(&self, cgroup_id: u64) -> io::Result<Option<PathBuf>> {
        let cgroup = open_by_id(&self.mount_dir, cgroup_id)?;
        let path = std::fs::read_link(format!("/proc/self/fd/{}", cgroup.as_raw_fd()))?;
        // Removed between the two calls: its path says so, and belongs to no pod any more.
        if path.to_string_lossy().ends_with(" (deleted)") {
            return Err(rustix::io::Errno::STALE.into());
        }
        if !holds(Defense::BelowKubepods) {
            let kubepods = path.ancestors().find(|parent| parent.file_name() == self.path.file_name());
            return Ok(kubepods.and_then(|kubepods| path.strip_prefix(kubepods).ok()).map(Path::to_path_buf));
        }
        Ok(path.strip_prefix(&self.path).ok().map(Path::to_path_buf))
    }
}

/// The cgroup id of a directory: its inode number, which is 64 bits wide since Linux 5.5: `kernfs_id_ino` of
/// <https://github.com/torvalds/linux/blob/v5.5/include/linux/kernfs.h>
pub fn cgroup_id(path: &Path) -> io::Result<u64> {
    std::fs::metadata(path).map(|metadata| metadata.ino())
}

/// The mount point of the whole cgroup2 hierarchy, on hybrid machines too.
fn cgroup2_mount() -> Result<PathBuf, Error> {
    let mounts = Process::myself().and_then(|me| me.mountinfo());
    let mounts = mounts.map_err(|error| unreadable("/proc/self/mountinfo", error))?;
    let whole = |mount: &MountInfo| mount.fs_type == "cgroup2" && mount.root == "/";
    mounts.into_iter().find(whole).map(|mount| mount.mount_point).ok_or(Error::NoCgroup2)
}

/// The cgroup2 path of a process, as the caller's cgroup namespace shows it.
pub fn cgroup_of(pid: Option<i32>) -> Result<PathBuf, Error> {
    let process = pid.map_or_else(Process::myself, Process::new);
    let cgroups = process.and_then(|process| process.cgroups());
    let what = || format!("/proc/{}/cgroup", pid.map_or_else(|| "self".into(), |pid| pid.to_string()));
    let cgroups = cgroups.map_err(|error| unreadable(&what(), error))?;
    let unified = cgroups.into_iter().find(|cgroup| cgroup.hierarchy == 0);
    unified.map(|cgroup| PathBuf::from(cgroup.pathname)).ok_or(Error::NoCgroup2)
}

/// A path of the hierarchy, which begins with a slash, on its mount.
fn join(mount: &Path, path: &Path) -> PathBuf {
    mount.join(path.strip_prefix("/").unwrap_or(path))
}

fn unreadable(what: &str, error: procfs::ProcError) -> Error {
    Error::Read { what: what.to_owned(), source: io::Error::other(error) }
}

#[expect(unsafe_code, reason = "no crate wraps open_by_handle_at with a handle of one's own")]
fn open_by_id(mount: &File, id: u64) -> io::Result<OwnedFd> {
    let mut handle = KernfsHandle { bytes: 8, kind: FILEID_KERNFS, id };
    // SAFETY: `KernfsHandle` has the layout of `struct file_handle` (two 32-bit fields, then `handle_bytes` = 8
    // bytes) and lives across the call; the mount's descriptor is open as long as `mount` is.
    let fd = unsafe {
        libc::open_by_handle_at(
            mount.as_fd().as_raw_fd(),
            (&raw mut handle).cast(),
            libc::O_PATH | libc::O_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
