//! One step of the tests: commands run one after the other, watched, timed and counted.
//!
//! Owns the running and the counting. Which commands and what they mean is the caller's.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
    time::timeout_at,
};

use crate::report;

/// What is to be run, and how long it may take.
pub(super) struct Step {
    name: String,
    budget: Duration,
    last_word: Option<&'static str>,
    is_held_back: bool,
    filters: Vec<String>,
}

/// Result of a step.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) name: String,
    pub(super) budget: Duration,
    pub(super) took: Duration,
    pub(super) passed: u64,
    pub(super) failed: u64,
    ignored: u64,
    has_tests: bool,
    filters: Vec<String>,
    /// A line that must still come.
    missing: Option<&'static str>,
    /// Why the step failed, where that is no failing test.
    error: Option<String>,
    /// Output that is not printed yet, of a step that runs alongside another.
    held_back: Option<String>,
}

// === impl Step ===

impl Step {
    pub(super) fn new(name: String, budget: Duration) -> Self {
        println!("\n{}", report::heading(&name));
        Self { name, budget, last_word: None, is_held_back: false, filters: Vec::new() }
    }

    /// A step that runs alongside another: its output is held back for [`Outcome::print_held_back`].
    pub(super) fn held_back(name: String, budget: Duration) -> Self {
        Self { name, budget, last_word: None, is_held_back: true, filters: Vec::new() }
    }

    /// Only tests that match run; that there is none is a failure which names the filters.
    pub(super) fn with_filters(self, filters: &[String]) -> Self {
        Self { filters: filters.to_vec(), ..self }
    }

    /// The step fails unless its output has this line: for commands that cannot tell by their exit status.
    pub(super) fn with_last_word(self, line: &'static str) -> Self {
        Self { last_word: Some(line), ..self }
    }

    /// Times something that is no test.
    pub(super) fn measure(self, work: impl FnOnce() -> anyhow::Result<()>) -> Outcome {
        let began = Instant::now();
        let result = work();
        let mut outcome = self.outcome();
        outcome.took = began.elapsed();
        if let Err(error) = result {
            let error = format!("{error:#}");
            println!("{error}");
            // The table has room for one line.
            outcome.error = error.lines().next().map(str::to_owned);
        }
        outcome
    }

    /// Runs the commands one after the other; what still runs when the budget is exceeded is killed. An error only
    /// when the run is interrupted.
    pub(super) async fn run(self, commands: Vec<Command>) -> anyhow::Result<Outcome> {
        let began = Instant::now();
        let deadline = tokio::time::Instant::now() + self.budget;
        let mut outcome = self.outcome();
        for mut command in commands {
            // A group of its own: the command's children are killed with it.
            let mut child = command
                .process_group(0)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .spawn()
                .with_context(|| format!("cannot run {}", command.as_std().get_program().display()))?;
            let group = child.id().context("BUG: the command was waited for already")?;
            tokio::select! {
                followed = timeout_at(deadline, outcome.follow(&mut child)) => {
                    if let Ok(followed) = followed {
                        followed?;
                    } else {
                        outcome.error = Some("killed: over its budget".to_owned());
                        kill_group(group)?;
                    }
                }
                _ = tokio::signal::ctrl_c() => {
                    kill_group(group)?;
                    bail!("interrupted");
                }
            }
        }
        outcome.took = began.elapsed();
        Ok(outcome)
    }

    fn outcome(self) -> Outcome {
        Outcome {
            name: self.name,
            budget: self.budget,
            took: Duration::ZERO,
            passed: 0,
            failed: 0,
            ignored: 0,
            has_tests: false,
            missing: self.last_word,
            filters: self.filters,
            error: None,
            held_back: self.is_held_back.then(String::new),
        }
    }
}

// === impl Outcome ===

impl Outcome {
    /// Passes the child's output on and counts its tests until it ends.
    async fn follow(&mut self, child: &mut Child) -> anyhow::Result<()> {
        let stdout = child.stdout.take().context("BUG: the output is not a pipe")?;
        let mut lines = BufReader::new(stdout).lines();
        while let Some(line) = lines.next_line().await? {
            match &mut self.held_back {
                Some(text) => text.extend([line.as_str(), "\n"]),
                None => println!("{line}"),
            }
            self.note(&line);
        }
        let status = child.wait().await?;
        if !status.success() && self.failed == 0 {
            self.error = Some(status.to_string());
        }
        Ok(())
    }

    /// Prints what was held back, under its heading.
    pub(super) fn print_held_back(&mut self) {
        if let Some(text) = self.held_back.take() {
            print!("\n{}\n{text}", report::heading(&self.name));
        }
    }

    /// Takes notice of the last word, and adds a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    fn note(&mut self, line: &str) {
        if self.missing == Some(line) {
            self.missing = None;
        }
        let Some(result) = line.strip_prefix("test result: ") else { return };
        self.has_tests = true;
        for part in result.split(['.', ';']) {
            let Some((number, what)) = part.trim().split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }

    pub(super) fn is_good(&self) -> bool {
        self.problem().is_none()
    }

    /// What is wrong, if anything.
    pub(super) fn problem(&self) -> Option<String> {
        if let Some(error) = &self.error {
            Some(error.clone())
        } else if self.failed > 0 {
            Some("failed".to_owned())
        } else if let Some(line) = self.missing {
            Some(format!("exited without saying `{line}`"))
        } else if self.ignored > 0 {
            Some(format!("{} ignored: nothing may be skipped", self.ignored))
        } else if self.passed == 0 && !self.filters.is_empty() {
            Some(format!("no test matches `{}`", self.filters.join(" ")))
        } else if self.has_tests && self.passed == 0 {
            Some("no test ran".to_owned())
        } else if self.took > self.budget {
            Some("over budget".to_owned())
        } else {
            None
        }
    }

    /// A count for the table; steps without tests have none.
    pub(super) fn counts(&self, count: u64) -> String {
        if self.has_tests { count.to_string() } else { "-".to_owned() }
    }
}

fn kill_group(group: u32) -> anyhow::Result<()> {
    killpg(Pid::from_raw(group.cast_signed()), Signal::SIGKILL)
        .context("cannot kill a command and its children")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(lines: &[&str]) -> Outcome {
        let mut outcome = Step::held_back("unit".to_owned(), Duration::from_secs(1)).outcome();
        for line in lines {
            outcome.note(line);
        }
        outcome
    }

    #[test]
    fn the_tests_of_several_binaries_add_up() {
        let outcome = outcome(&[
            "running 3 tests",
            "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s",
        ]);
        assert_eq!((outcome.passed, outcome.failed), (4, 2));
        assert_eq!(outcome.problem().as_deref(), Some("failed"));
    }

    #[test]
    fn an_ignored_test_is_a_failure() {
        let outcome =
            outcome(&["test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out"]);
        assert_eq!(outcome.problem().as_deref(), Some("1 ignored: nothing may be skipped"));
    }

    #[test]
    fn a_step_without_its_last_word_is_a_failure() {
        let step = Step::held_back("vm".to_owned(), Duration::from_secs(1)).with_last_word("vm: success");
        let mut outcome = step.outcome();
        outcome.note("test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured");
        assert_eq!(outcome.problem().as_deref(), Some("exited without saying `vm: success`"));
        outcome.note("vm: success");
        assert_eq!(outcome.problem(), None);
    }

    #[test]
    fn a_tier_without_a_single_test_is_a_failure() {
        let outcome =
            outcome(&["test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out"]);
        assert_eq!(outcome.problem().as_deref(), Some("no test ran"));
    }

    #[test]
    fn a_filter_that_matches_nothing_is_a_failure() {
        let mut outcome =
            outcome(&["test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 9 filtered out"]);
        outcome.filters = vec!["jiter".to_owned()];
        assert_eq!(outcome.problem().as_deref(), Some("no test matches `jiter`"));
        outcome.note("test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 8 filtered out");
        assert_eq!(outcome.problem(), None);
    }

    #[test]
    fn a_step_over_its_budget_is_a_failure() {
        let mut outcome = outcome(&["test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured"]);
        assert!(outcome.is_good());
        outcome.took = Duration::from_secs(2);
        assert_eq!(outcome.problem().as_deref(), Some("over budget"));
    }
}
