//! A process as another one can name it later: its number together with when it started.
//!
//! Owns telling whether that very process still runs; never signals anything.

use std::path::PathBuf;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

/// A process id that cannot be mistaken for a later process of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// Clock ticks from boot to the start of the process: field 22 of `/proc/PID/stat`.
    pub started_at: u64,
}

// === impl Process ===

impl Process {
    /// The running process `pid`; an error when there is none.
    pub fn of(pid: u32) -> anyhow::Result<Self> {
        let stat = procfs::process::Process::new(pid.cast_signed())
            .and_then(|process| process.stat())
            .with_context(|| format!("process {pid} is not running"))?;
        Ok(Self { pid, started_at: stat.starttime })
    }

    /// This process.
    pub fn own() -> anyhow::Result<Self> {
        Self::of(std::process::id())
    }

    /// Whether the process still runs; a zombie does not.
    pub fn is_running(&self) -> bool {
        procfs::process::Process::new(self.pid.cast_signed())
            .and_then(|process| process.stat())
            .is_ok_and(|stat| stat.starttime == self.started_at && stat.state != 'Z')
    }

    /// The process's network namespace; only good while it runs.
    pub fn netns(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.pid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_of_the_same_number_that_started_later_is_another_one() {
        let own = Process::own().unwrap();
        assert!(own.is_running());
        assert!(!Process { started_at: own.started_at + 1, ..own }.is_running());
    }

    #[test]
    fn a_process_that_has_ended_does_not_run() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(process.is_running());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!process.is_running());
    }
}
