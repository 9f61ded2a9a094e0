//! How far a command is: a line that moves on a terminal, a line now and then elsewhere.
//!
//! Owns the looks of progress and the reading of cargo's. Never starts or stops anything.

use std::{
    io::{self, IsTerminal as _, Read, Write},
    sync::{
        LazyLock, OnceLock,
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use parking_lot::Mutex;

/// How often the line on a terminal moves.
const TICK: Duration = Duration::from_millis(100);
/// How often a line is written where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(15);
/// What cargo shows on a terminal, and only there unless told otherwise.
pub(super) const CARGO_VARIABLES: [(&str, &str); 2] =
    [("CARGO_TERM_PROGRESS_WHEN", "always"), ("CARGO_TERM_PROGRESS_WIDTH", "100")];

/// The lines of commands that run at the same time.
static LINES: LazyLock<MultiProgress> = LazyLock::new(MultiProgress::new);
/// When this program was started, or nearly.
static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);
/// The steps of this program's run, by their names, where they are known beforehand.
static STEPS: OnceLock<Vec<String>> = OnceLock::new();

/// What a line of cargo's says about its progress.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Note<'a> {
    /// It compiles: so many crates of all, and those it is at.
    Compiling { done: u32, all: u32, current: &'a str },
    /// It fetches something.
    Fetching,
    /// Another cargo holds this lock.
    Waiting { lock: &'a str },
    /// It does something: waits no longer.
    Working,
}

/// Shows one command's progress until dropped.
pub(super) struct Progress {
    what: String,
    started: Instant,
    line: ProgressBar,
    is_terminal: bool,
    detail: Mutex<String>,
}

/// Starts the clock that `in_all` reads.
pub(crate) fn start_clock() {
    LazyLock::force(&STARTED);
}

/// Tells which steps there will be, so that each can be shown with its number.
pub(crate) fn set_steps(steps: Vec<String>) {
    // A command has one list. Were there a second, the numbers would stay those of the first.
    let _ = STEPS.set(steps);
}

/// The name of a step, with its number if it has one.
pub(super) fn numbered(what: &str) -> String {
    let steps = STEPS.get().map_or(&[][..], Vec::as_slice);
    match steps.iter().position(|step| step == what) {
        Some(index) => format!("[{}/{}] {what}", index + 1, steps.len()),
        None => what.to_owned(),
    }
}

/// How long this program has been running.
pub(super) fn in_all() -> Duration {
    STARTED.elapsed()
}

/// A duration as people read it: `0:07`, `12:45`, `1:02:03`.
pub(crate) fn clock(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 { format!("{hours}:{minutes:02}:{seconds:02}") } else { format!("{minutes}:{seconds:02}") }
}

/// Prints a line above those that move.
pub(super) fn say(line: impl std::fmt::Display) {
    LINES.suspend(|| eprintln!("{line}"));
}

// === impl Progress ===

impl Progress {
    pub(super) fn new(what: &str) -> Self {
        let what = numbered(what);
        let is_terminal = io::stderr().is_terminal();
        let line = if is_terminal {
            let style = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}");
            let line = ProgressBar::new_spinner()
                .with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            let line = LINES.add(line).with_message(format!("{what} …"));
            line.enable_steady_tick(TICK);
            line
        } else {
            say(format_args!("  {what} …"));
            ProgressBar::hidden()
        };
        Self { what, started: Instant::now(), line, is_terminal, detail: Mutex::default() }
    }

    /// Writes a line every now and then until `ended` is disconnected, unless the terminal shows it anyway.
    pub(super) fn keep_writing(&self, ended: &Receiver<()>) {
        while ended.recv_timeout(LINE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            if !self.is_terminal {
                let detail = self.detail.lock();
                say(format_args!("  {}", status(&self.what, &detail, self.started.elapsed(), in_all())));
            }
        }
    }

    /// Reads what cargo writes to its end: progress is shown, everything else goes to `log`.
    pub(super) fn follow_cargo(&self, from: impl Read, log: &mut impl Write) -> io::Result<()> {
        for_each_line(from, |line| {
            let note = note(line);
            if let Some(note) = &note {
                self.show(note);
            }
            // Waiting is worth a line in the log, a bar is not.
            if matches!(note, None | Some(Note::Waiting { .. } | Note::Working)) {
                writeln!(log, "{line}")?;
            }
            Ok(())
        })
    }

    fn show(&self, note: &Note<'_>) {
        let text = describe(note);
        self.line.set_message(if text.is_empty() {
            format!("{} …", self.what)
        } else {
            format!("{}: {text}", self.what)
        });
        let mut detail = self.detail.lock();
        // The lock of another cargo can be held for minutes: that is said at once.
        if !self.is_terminal && matches!(note, Note::Waiting { .. }) && *detail != text {
            say(format_args!("  {}", status(&self.what, &text, self.started.elapsed(), in_all())));
        }
        *detail = text;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.line.finish_and_clear();
        LINES.remove(&self.line);
    }
}

/// One line on how a step is going.
fn status(what: &str, detail: &str, step: Duration, all: Duration) -> String {
    let detail = if detail.is_empty() { "running" } else { detail };
    format!("{what}: {detail}; {}, {} in all", clock(step), clock(all))
}

fn describe(note: &Note<'_>) -> String {
    match note {
        Note::Compiling { done, all, current: "" } => format!("{done} of {all} crates"),
        Note::Compiling { done, all, current } => format!("{done} of {all} crates ({current})"),
        Note::Fetching => "fetching crates".to_owned(),
        Note::Waiting { lock } => format!("waiting for another cargo, which holds the lock of the {lock}"),
        Note::Working => String::new(),
    }
}

/// What a line of cargo's says about its progress, if anything.
pub(super) fn note(line: &str) -> Option<Note<'_>> {
    let line = line.trim();
    if let Some(lock) = line.strip_prefix("Blocking waiting for file lock on ") {
        return Some(Note::Waiting { lock });
    }
    let (verb, rest) = line.split_once(' ')?;
    if let Some((_, bar)) = rest.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        if verb != "Building" {
            return Some(Note::Fetching);
        }
        let (numbers, current) = bar.split_once(": ").unwrap_or((bar.trim_end_matches(':'), ""));
        let (done, all) = numbers.trim().split_once('/')?;
        return Some(Note::Compiling { done: done.parse().ok()?, all: all.parse().ok()?, current });
    }
    matches!(verb, "Compiling" | "Checking" | "Downloading" | "Updating" | "Locking" | "Installing")
        .then_some(Note::Working)
}

/// Calls `f` with each line, whether it ends with a line feed or, as those that overwrite each other, a carriage return.
fn for_each_line(mut from: impl Read, mut f: impl FnMut(&str) -> io::Result<()>) -> io::Result<()> {
    let mut pending = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let length = match from.read(&mut chunk) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        pending.extend_from_slice(&chunk[..length]);
        while let Some(end) = pending.iter().position(|byte| matches!(byte, b'\n' | b'\r')) {
            let line: Vec<u8> = pending.drain(..=end).collect();
            emit(&line[..end], &mut f)?;
        }
    }
    emit(&pending, &mut f)
}

fn emit(line: &[u8], f: &mut impl FnMut(&str) -> io::Result<()>) -> io::Result<()> {
    let line = String::from_utf8_lossy(line);
    let line = line.strip_prefix("\u{1b}[K").unwrap_or(&line);
    if line.trim().is_empty() { Ok(()) } else { f(line) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_of_cargo_is_read_from_its_bar() {
        for (line, expected) in [
            (
                "    Building [========>         ] 12/312: serde, tokio(build)      ",
                Some(Note::Compiling { done: 12, all: 312, current: "serde, tokio(build)" }),
            ),
            ("    Building [>  ] 0/3", Some(Note::Compiling { done: 0, all: 3, current: "" })),
            ("       Fetch [=====>      ] 12.34%, 1.20MiB/s", Some(Note::Fetching)),
            (
                "    Blocking waiting for file lock on build directory",
                Some(Note::Waiting { lock: "build directory" }),
            ),
            ("   Compiling serde v1.0.229", Some(Note::Working)),
            ("warning: unused variable: `x`", None),
            ("error[E0308]: mismatched types", None),
            ("", None),
        ] {
            assert_eq!(note(line), expected, "{line}");
        }
    }

    #[test]
    fn lines_that_overwrite_each_other_are_told_apart() {
        let mut lines = Vec::new();
        let written = b"   Compiling a\n    Building [>] 0/2: a\r\x1b[K   Compiling b\r\n\nlast";
        for_each_line(&written[..], |line| {
            lines.push(line.trim().to_owned());
            Ok(())
        })
        .unwrap();
        assert_eq!(lines, ["Compiling a", "Building [>] 0/2: a", "Compiling b", "last"]);
    }

    #[test]
    fn only_what_is_no_bar_is_logged() {
        let progress = Progress::new("something");
        let mut log = Vec::new();
        let written = "    Building [>] 0/2: a\r   Compiling b\nerror: no\n";
        progress.follow_cargo(written.as_bytes(), &mut log).unwrap();
        assert_eq!(String::from_utf8(log).unwrap(), "   Compiling b\nerror: no\n");
    }

    #[test]
    fn a_line_of_progress_says_how_far_and_how_long() {
        let detail = describe(&Note::Compiling { done: 12, all: 312, current: "serde" });
        assert_eq!(
            status("[2/4] podgate", &detail, Duration::from_secs(65), Duration::from_secs(3723)),
            "[2/4] podgate: 12 of 312 crates (serde); 1:05, 1:02:03 in all"
        );
        assert_eq!(status("apt", "", Duration::ZERO, Duration::ZERO), "apt: running; 0:00, 0:00 in all");
        let waiting = describe(&Note::Waiting { lock: "build directory" });
        assert_eq!(waiting, "waiting for another cargo, which holds the lock of the build directory");
    }
}
