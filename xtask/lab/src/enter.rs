//! Becoming a process of a pod: its cgroup, its network namespace, a `/run` of its own, a clean environment.
//!
//! Owns the steps between a lab's process and the command it turns into. Runs in a process of its own that has
//! one thread, as a hidden subcommand of xtask; it never returns but to report an error.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fs::{self, File, OpenOptions},
    os::{fd::AsRawFd as _, unix::fs::OpenOptionsExt as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, anyhow};
use nix::{
    fcntl::OFlag,
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde::{Deserialize, Serialize};

use crate::{cgroupfs, simulated_network::NetNs};

/// The name of xtask's hidden subcommand: `xtask lab-enter ENTRY -- COMMAND…`.
pub const SUBCOMMAND: &str = "lab-enter";

/// The name of xtask's hidden subcommand that calls [`pause`].
pub const PAUSE_SUBCOMMAND: &str = "lab-pause";

/// The running executable, even after a build has put another one in its place.
pub const OWN_EXECUTABLE: &str = "/proc/self/exe";

/// Where a command runs and what it finds there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// The cgroup's directory.
    pub cgroup: PathBuf,
    /// The network namespace, as `/proc/PID/ns/net`.
    pub netns: PathBuf,
    /// What is in `/run`.
    pub run: RunDirectory,
    /// The whole environment.
    pub env: BTreeMap<String, String>,
}

/// The command's `/run`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum RunDirectory {
    /// The host's: for processes of the node.
    Host,
    /// An empty one with these directories bound into it, by where they appear below `/run`.
    Own(BTreeMap<PathBuf, PathBuf>),
}

/// Does nothing until killed: keeps a network namespace and a cgroup busy, as a pod's pause container does.
pub fn pause() -> ! {
    loop {
        std::thread::park();
    }
}

/// Turns this process into `command` in the place that `entry` describes. Returns only an error.
pub fn enter(entry: &Entry, command: &[String]) -> anyhow::Result<Infallible> {
    let [program, arguments @ ..] = command else {
        return Err(anyhow!("no command given: put it after --"));
    };
    cgroupfs::join(&entry.cgroup, 0)?;
    NetNs::open(&entry.netns)?.enter()?;
    if let RunDirectory::Own(binds) = &entry.run {
        replace_run(binds)?;
    }
    let error = Command::new(program).args(arguments).env_clear().envs(&entry.env).exec();
    Err(error).with_context(|| format!("cannot run {program}"))
}

/// Puts a tmpfs over `/run`, in a mount namespace of our own, and the directories into it.
fn replace_run(binds: &BTreeMap<PathBuf, PathBuf>) -> anyhow::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("cannot create a mount namespace: run as root")?;
    mount_with(None, Path::new("/"), None, MsFlags::MS_REC | MsFlags::MS_PRIVATE)?;
    // Opened first: the sources are below the host's /run, which the tmpfs hides.
    let binds = binds
        .iter()
        .map(|(target, source)| Ok((target, open_path(source)?)))
        .collect::<anyhow::Result<Vec<(&PathBuf, File)>>>()?;
    mount_with(Some(Path::new("tmpfs")), Path::new("/run"), Some("tmpfs"), MsFlags::empty())?;
    for (target, source) in binds {
        fs::create_dir_all(target).with_context(|| format!("cannot create {}", target.display()))?;
        let source = PathBuf::from(format!("/proc/self/fd/{}", source.as_raw_fd()));
        mount_with(Some(&source), target, None, MsFlags::MS_BIND | MsFlags::MS_REC)?;
    }
    Ok(())
}

/// The environment of every process of the lab. `HOME` is where no `~/.aws` can be.
pub(crate) fn base_environment() -> BTreeMap<String, String> {
    [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/nonexistent")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}

fn open_path(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_PATH.bits())
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

fn mount_with(
    source: Option<&Path>,
    target: &Path,
    fs_type: Option<&str>,
    flags: MsFlags,
) -> anyhow::Result<()> {
    mount(source, target, fs_type, flags, None::<&str>)
        .with_context(|| format!("cannot mount {}", target.display()))
}
