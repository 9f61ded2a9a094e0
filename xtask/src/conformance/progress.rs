//! What those who wait see.
//!
//! Owns the bar on a terminal, and the lines that are printed without one.

use std::{
    io::IsTerminal as _,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

use indicatif::{ProgressBar, ProgressStyle};

use super::cell::Cell;
use crate::report;

/// Without a terminal, a line for so many cells.
const LINES: usize = 20;

/// Counts cells.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    done: AtomicUsize,
    all: usize,
}

// === impl Progress ===

impl Progress {
    pub(super) fn new(all: usize) -> Self {
        let style = ProgressStyle::with_template("{spinner} {pos} of {len} cells {wide_bar} {elapsed}");
        let bar = std::io::stderr().is_terminal().then(|| {
            let length = u64::try_from(all).unwrap_or(u64::MAX);
            ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { bar, done: AtomicUsize::new(0), all }
    }

    /// One more cell; one that is not as it should be is said at once.
    pub(super) fn done(&self, cell: Cell) -> Cell {
        let done = self.done.fetch_add(1, Relaxed) + 1;
        if cell.verdict.is_failure() {
            let why = cell.note().unwrap_or_default();
            self.say(&format!(
                "{} {}, {}: {why}",
                report::failure(cell.text()),
                cell.client,
                cell.column.title()
            ));
        }
        match &self.bar {
            Some(bar) => bar.inc(1),
            None if done.is_multiple_of(LINES) => eprintln!("  {done} of {} cells", self.all),
            None => {}
        }
        cell
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
