//! What a lab leaves on disk so that other processes can enter it, and clean up after it.
//!
//! Owns `/run/podgate-lab/NAME`: claiming it, `state.json` in it, and removing everything that a lab has on the machine.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail, ensure};
use nix::{
    errno::Errno,
    mount::{MntFlags, umount2},
};
use serde::{Deserialize, Serialize};

use crate::{cgroupfs, pod::Pod, process_id::Process, simulated_node::NodePlace};

/// Every lab's directory is below this one.
const LABS: &str = "/run/podgate-lab";
const STATE_FILE: &str = "state.json";
const NAME_RULE: &str = "a lab's name is up to 24 of a-z, 0-9 and -";

/// A lab as others see it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct State {
    /// The lab's name.
    pub name: String,
    /// The process that runs the lab's servers; the lab is dead without it.
    pub owner: Process,
    /// Whether the owner does nothing else and may be told to stop.
    pub served: bool,
    /// The node, once it is up.
    pub node: Option<NodePlace>,
    /// The pods, the agent's own included.
    pub pods: Vec<Pod>,
    /// The agent's process, if one was started.
    pub agent: Option<Process>,
}

/// A lab's directory, claimed. Everything the lab has on the machine is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    name: String,
    released: bool,
}

// === impl State ===

impl State {
    /// The state of the lab called `name`.
    pub fn load(name: &str) -> anyhow::Result<Self> {
        let path = directory(name).join(STATE_FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!("there is no lab {name}: start it with `cargo xtask lab up --name {name}`")
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        serde_json::from_str(&text).with_context(|| format!("{} is not a lab's state", path.display()))
    }

    /// Every lab on this machine, dead ones included, by name.
    pub fn list() -> anyhow::Result<Vec<Self>> {
        let entries = match fs::read_dir(LABS) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).context("cannot list the labs"),
        };
        let mut labs = Vec::new();
        for entry in entries {
            let name = entry?.file_name().to_string_lossy().into_owned();
            // One without its state is just being removed.
            if is_name(&name) && directory(&name).join(STATE_FILE).exists() {
                labs.push(Self::load(&name)?);
            }
        }
        labs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(labs)
    }

    /// Whether the lab's servers still run.
    pub fn is_alive(&self) -> bool {
        self.owner.is_running()
    }

    /// The pod called `name`, as `NAMESPACE/NAME` or just `NAME`.
    pub fn pod(&self, name: &str) -> anyhow::Result<&Pod> {
        self.pods.iter().find(|pod| pod.name == name || pod.full_name() == name).with_context(|| {
            let known: Vec<_> = self.pods.iter().map(Pod::full_name).collect();
            format!("the lab {} has no pod {name}; it has {}", self.name, known.join(", "))
        })
    }

    /// Replaces the file in one step, for readers that come at any moment.
    pub(crate) fn save(&self) -> anyhow::Result<()> {
        let directory = directory(&self.name);
        self.write_to(&directory).with_context(|| format!("cannot write the state of the lab {}", self.name))
    }

    fn write_to(&self, directory: &Path) -> anyhow::Result<()> {
        let draft = directory.join(".state.json");
        fs::write(&draft, serde_json::to_vec_pretty(self)?)?;
        Ok(fs::rename(draft, directory.join(STATE_FILE))?)
    }
}

// === impl Claim ===

impl Claim {
    /// Takes the name for this process. What a dead lab of that name left behind is removed first.
    pub(crate) fn take(name: &str, served: bool) -> anyhow::Result<(Self, State)> {
        check_name(name)?;
        if let Ok(earlier) = State::load(name) {
            ensure!(
                !earlier.is_alive(),
                "the lab {name} is up already: `cargo xtask lab down --name {name}`"
            );
            clean(name)?;
        }
        let state = State {
            name: name.to_owned(),
            owner: Process::own()?,
            served,
            node: None,
            pods: Vec::new(),
            agent: None,
        };
        // The directory appears with its state in it: a lab is never without an owner.
        let draft = Path::new(LABS).join(format!(".{name}.{}", state.owner.pid));
        fs::create_dir_all(&draft)
            .with_context(|| format!("cannot create {}: run as root", draft.display()))?;
        state.write_to(&draft)?;
        if let Err(error) = fs::rename(&draft, directory(name)) {
            fs::remove_dir_all(&draft)?;
            return Err(error).with_context(|| format!("the lab {name} is being started by another process"));
        }
        Ok((Self { name: name.to_owned(), released: false }, state))
    }

    /// Removes everything and says what could not be removed.
    pub(crate) fn release(mut self) -> anyhow::Result<()> {
        self.released = true;
        clean(&self.name)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.released
            && let Err(error) = clean(&self.name)
        {
            eprintln!("the lab {} could not be removed: {error:#}", self.name);
        }
    }
}

/// An error unless a lab can be called `name`.
pub fn check_name(name: &str) -> anyhow::Result<()> {
    ensure!(is_name(name), "{NAME_RULE}, not {name:?}");
    Ok(())
}

/// The logs of the agents that a lab has run, oldest first.
pub fn agent_logs(name: &str) -> anyhow::Result<Vec<PathBuf>> {
    let directory = directory(name);
    let mut logs = Vec::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let entry = entry?;
        let file = entry.file_name().to_string_lossy().into_owned();
        let number =
            file.strip_prefix("agent-").and_then(|rest| rest.strip_suffix(".log")?.parse::<u32>().ok());
        logs.extend(number.map(|number| (number, entry.path())));
    }
    logs.sort();
    Ok(logs.into_iter().map(|(_, path)| path).collect())
}

/// The directory of the lab called `name`.
pub fn directory(name: &str) -> PathBuf {
    Path::new(LABS).join(name)
}

/// Where a process that serves the lab called `name` logs: next to the lab's directory, which is created later.
pub fn log_file(name: &str) -> anyhow::Result<PathBuf> {
    check_name(name)?;
    fs::create_dir_all(LABS).with_context(|| format!("cannot create {LABS}: run as root"))?;
    Ok(Path::new(LABS).join(format!(".{name}.log")))
}

/// Removes what the lab has on the machine: its cgroups with every process in them (and with those the network
/// namespaces and veths), its mounts, its directory.
pub fn clean(name: &str) -> anyhow::Result<()> {
    cgroupfs::remove(&cgroupfs::of_lab(name)?)?;
    let directory = directory(name);
    match umount2(&NodePlace::bpffs_in(&directory), MntFlags::MNT_DETACH) {
        // Not a mount point, or not there: never mounted.
        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
        Err(error) => return Err(error).context("cannot unmount the lab's bpffs"),
    }
    // The name becomes free in one step: no reader sees a lab with half of its files.
    let doomed = Path::new(LABS).join(format!(".{name}.removed"));
    let removed = remove(fs::remove_dir_all(&doomed))
        .and_then(|()| remove(fs::rename(&directory, &doomed)))
        .and_then(|()| remove(fs::remove_dir_all(&doomed)))
        .and_then(|()| remove(fs::remove_file(log_file(name).map_err(io::Error::other)?)));
    removed.with_context(|| format!("cannot remove {}", directory.display()))
}

/// What is not there needs no removal.
fn remove(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

fn is_name(name: &str) -> bool {
    (1..=24).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_lab_is_a_path_segment_and_nothing_more() {
        for good in ["dev", "a", "lab-2"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "A", ".dev.77", "a-name-that-is-much-too-long"] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
