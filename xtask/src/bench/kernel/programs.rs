//! What the kernel says about the agent's programs: how often they ran, and how long that took.
//!
//! Owns the reading of the statistics, and finding the programs by who holds them: other agents may be on the machine.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context as _, bail};
use aya::programs::{ProgramInfo, loaded_programs};
use lab::process_id::Process;

/// The programs of one agent.
#[derive(Debug)]
pub(super) struct Programs(BTreeSet<u32>);

/// What a program has done since it was loaded, or between two moments.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    pub(super) nanoseconds: f64,
    pub(super) calls: f64,
}

// === impl Programs ===

impl Programs {
    /// The programs that the process holds open.
    pub(super) fn of(agent: Process) -> anyhow::Result<Self> {
        let directory = format!("/proc/{}/fdinfo", agent.pid);
        let mut ids = BTreeSet::new();
        for entry in fs::read_dir(&directory).with_context(|| format!("cannot list {directory}"))? {
            // A descriptor may be closed meanwhile.
            let Ok(info) = fs::read_to_string(entry?.path()) else { continue };
            let id = info.lines().find_map(|line| line.strip_prefix("prog_id:")?.trim().parse::<u32>().ok());
            ids.extend(id);
        }
        if ids.is_empty() {
            bail!("the agent holds no program");
        }
        Ok(Self(ids))
    }

    /// What each has done so far, by its name. Nothing is counted unless the kernel was told to.
    pub(super) fn work(&self) -> anyhow::Result<BTreeMap<String, Work>> {
        let mut work = BTreeMap::new();
        for info in self.infos()? {
            let name = info.name_as_str().context("a program has a name that is no text")?;
            #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
            let calls = info.run_count() as f64;
            work.insert(name.to_owned(), Work { nanoseconds: info.run_time().as_secs_f64() * 1e9, calls });
        }
        Ok(work)
    }

    fn infos(&self) -> anyhow::Result<Vec<ProgramInfo>> {
        let mut infos = Vec::new();
        for info in loaded_programs() {
            let info = info.context("the kernel does not list its programs")?;
            if self.0.contains(&info.id()) {
                infos.push(info);
            }
        }
        Ok(infos)
    }
}

// === impl Work ===

impl Work {
    pub(super) fn since(self, earlier: Self) -> Self {
        Self { nanoseconds: self.nanoseconds - earlier.nanoseconds, calls: self.calls - earlier.calls }
    }
}
