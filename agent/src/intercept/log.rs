//! The programs' debugging log as part of the agent's: target `kernel`, level debug.
//!
//! Owns the reading, and the question whether anybody wants it; the texts are the programs'. Off, as it is unless the
//! agent's log is asked for it, it costs the programs nothing: what they never do is not loaded.

use std::{error::Error as StdError, fmt, io};

use agent_common::abi::map;
use aya::Ebpf;
use aya_log::{EbpfLogger, Level};
use log::{Log, Metadata, Record};
use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};
use tracing::{debug, enabled};

use super::Error;

/// The target of its lines.
const TARGET: &str = "kernel";
/// No level at all.
const OFF: u8 = 0;
/// The log's ring buffer while nothing is written to it: a page, the least there is.
const NO_BYTES: u32 = 4096;
/// While something is: some 500 lines.
const BYTES: u32 = 128 * 1024;

/// The log, for one reader. It waits in the kernel while nobody reads, until there is no room.
pub struct DebugLog(EbpfLogger<Lines>);

/// Makes the programs' lines the agent's.
struct Lines;

/// What the programs are to say, and the room for it.
pub(super) fn level() -> (u8, u32) {
    if enabled!(target: TARGET, tracing::Level::DEBUG) {
        (Level::Debug as u8, BYTES)
    } else {
        (OFF, NO_BYTES)
    }
}

// === impl DebugLog ===

impl DebugLog {
    /// Takes the log of programs that were loaded with a [`level`]; none if it was off.
    pub(super) fn take(programs: &mut Ebpf) -> Result<Option<Self>, Error> {
        if level().0 == OFF {
            return Ok(None);
        }
        let log = EbpfLogger::init_with_logger(programs, Lines);
        log.map(|log| Some(Self(log))).map_err(|source| failed(source.into()))
    }

    /// Writes what there is to the agent's log.
    pub fn flush(&mut self) {
        self.0.flush();
    }

    /// Writes all that comes, until it cannot be waited for.
    pub fn run(mut self) -> Error {
        loop {
            self.flush();
            match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return failed(io::Error::from(errno).into()),
            }
        }
    }
}

impl fmt::Debug for DebugLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DebugLog").finish_non_exhaustive()
    }
}

// === impl Lines ===

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // Their texts are as long as the longest.
        let line = record.args().to_string();
        debug!(target: TARGET, "{}", line.trim_end());
    }

    fn flush(&self) {}
}

fn failed(source: Box<dyn StdError + Send + Sync>) -> Error {
    Error::Map { action: "reading", map: map::LOG, source }
}
