//! `cargo xtask fuzz`: feeds random inputs to every parser of external data.
//!
//! Owns building the targets of `agent/fuzz` and running each for its time; never decides what must hold, which is the
//! agent's `testing::outside`. Inputs that reach new code are stored below `target/fuzz` for the next run.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::Context as _;
use clap::Args;

use crate::{
    cmd, report,
    setup::{Build, Need, Plan},
    workspace::{cargo_install, root, target_directory, tools},
};

/// Version of cargo-fuzz.
const CARGO_FUZZ_VERSION: &str = "0.13.2";
/// Where the targets are, in the workspace.
const DIRECTORY: &str = "agent/fuzz";
/// Longest input, in bytes.
const INPUT_MAX: u32 = 8 * 1024;
/// Longest inputs of targets that have a limit of their own beyond that: heads are read up to 64 KiB, tokens up to 16.
const LONGER: [(&str, u32); 4] =
    [("http_head", 72 * 1024), ("jwt", 20 * 1024), ("key_set", 20 * 1024), ("kubelets_token", 20 * 1024)];
/// Seconds after which an input counts as one that never ends.
const HANGS_AFTER: u32 = 10;

/// How to fuzz.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Seconds that each target runs.
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    time: u32,
    /// Run this target only.
    #[arg(long, value_name = "NAME")]
    target: Option<String>,
}

/// The result of fuzzing a target.
struct Outcome {
    executions: Option<String>,
    coverage: Option<String>,
    error: Option<String>,
}

/// Builds and runs every target.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let targets = targets(arguments.target.as_deref())?;
    let fuzzer = (!fuzzer().is_file()).then(|| Need::cargo(fuzzer_step(), "building the targets", 60));
    let runs = Duration::from_secs(targets.len() as u64 * u64::from(arguments.time));
    Plan::new(&format!("Random inputs for {} parsers of external data.", targets.len()), runs)
        .needs(fuzzer)
        .builds([Build::FuzzTargets])
        .begin()?;
    let programs = build()?;
    let mut table = report::table(&["target", "inputs", "coverage", "result"]);
    let mut failed = 0;
    for target in &targets {
        let outcome = fuzz(target, &programs.join(target), arguments.time)?;
        failed += usize::from(outcome.error.is_some());
        if let Some(error) = &outcome.error {
            eprintln!("{} {error}", report::failure("✗"));
        }
        let unknown = || "?".to_owned();
        table.add_row([
            target.into(),
            outcome.executions.unwrap_or_else(unknown).into(),
            outcome.coverage.unwrap_or_else(unknown).into(),
            report::verdict(outcome.error.is_none(), if outcome.error.is_none() { "ok" } else { "failed" }),
        ]);
    }
    println!("{table}");
    println!("{} passed, {failed} failed", targets.len() - failed);
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The names of the targets, or the one that is asked for.
fn targets(only: Option<&str>) -> anyhow::Result<Vec<String>> {
    let directory = root().join(DIRECTORY).join("fuzz_targets");
    let entries = fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            names.push(path.file_stem().unwrap_or_default().to_string_lossy().into_owned());
        }
    }
    names.sort();
    if let Some(only) = only {
        let all = names.join(", ");
        names.retain(|name| name == only);
        anyhow::ensure!(!names.is_empty(), "there is no target {only}; there are: {all}");
    }
    Ok(names)
}

/// Builds the programs and tells where they are. cargo-fuzz sets the flags that sanitizer and coverage need, which stable
/// Rust has but does not offer.
fn build() -> anyhow::Result<PathBuf> {
    let program = fuzzer();
    if !program.is_file() {
        cmd::run(&fuzzer_step(), &mut cargo_install("cargo-fuzz", CARGO_FUZZ_VERSION))?;
    }
    let host = cmd::ask(Command::new("rustc").args(["--print", "host-tuple"]))?;
    let mut command = Command::new(program);
    command.args(["build", "--fuzz-dir", ".", "--target", &host, "--target-dir"]).arg(directory());
    cmd::run("fuzz targets", command.current_dir(root().join(DIRECTORY)).env("RUSTC_BOOTSTRAP", "1"))?;
    Ok(directory().join(host).join("release"))
}

fn fuzzer() -> PathBuf {
    tools().join("bin/cargo-fuzz")
}

fn fuzzer_step() -> String {
    format!("cargo-fuzz {CARGO_FUZZ_VERSION}")
}

/// Runs one target for so many seconds.
fn fuzz(target: &str, program: &Path, seconds: u32) -> anyhow::Result<Outcome> {
    let corpus = directory_of("corpus", target)?;
    let artifacts = directory_of("artifacts", target)?;
    let sources = root().join(DIRECTORY);
    let mut command = Command::new(program);
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={}", input_max(target)))
        .arg(format!("-timeout={HANGS_AFTER}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-print_final_stats=1", "-use_value_profile=1"]);
    let dictionary = sources.join(format!("{target}.dict"));
    if dictionary.is_file() {
        command.arg(format!("-dict={}", dictionary.display()));
    }
    command.arg(corpus).arg(sources.join("seeds").join(target));
    let what = format!("fuzz {target}");
    let result = cmd::run(&what, &mut command);
    let log = cmd::log_of(&what)?;
    let again = format!("again, with what was found: {} {}/*", program.display(), artifacts.display());
    let error = result.err().map(|error| format!("{error:#}\n{again}"));
    Ok(Outcome {
        executions: after(&log, "stat::number_of_executed_units: "),
        coverage: coverage(&log),
        error,
    })
}

/// How long a target's inputs may be.
fn input_max(target: &str) -> u32 {
    LONGER.iter().find(|(longer, _)| *longer == target).map_or(INPUT_MAX, |(_, longest)| *longest)
}

fn directory() -> PathBuf {
    target_directory().join("fuzz")
}

/// A directory of this target's that outlives the run.
fn directory_of(what: &str, target: &str) -> anyhow::Result<PathBuf> {
    let path = directory().join(what).join(target);
    fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(path)
}

/// The rest of the last line with this in it.
fn after(log: &str, what: &str) -> Option<String> {
    log.lines().rev().find_map(|line| Some(line.split_once(what)?.1.trim().to_owned()))
}

/// The edges that were reached, as last reported: `#1024 DONE cov: 312 ft: …`.
fn coverage(log: &str) -> Option<String> {
    after(log, " cov: ")?.split(' ').next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_libfuzzer_is_read() {
        let log = "#2\tINITED cov: 10 ft: 11 corp: 1/1b\n#77\tDONE   cov: 312 ft: 900 corp: 5/9b\n\
                   stat::number_of_executed_units: 77\nstat::average_exec_per_sec:     7\n";
        assert_eq!(coverage(log).as_deref(), Some("312"));
        assert_eq!(after(log, "stat::number_of_executed_units: ").as_deref(), Some("77"));
        assert_eq!(after(log, "absent"), None);
    }

    #[test]
    fn every_target_has_seeds() {
        for target in targets(None).unwrap() {
            let seeds = root().join(DIRECTORY).join("seeds").join(&target);
            assert!(fs::read_dir(&seeds).unwrap().count() > 0, "{target}");
        }
        assert!(targets(Some("absent")).is_err());
    }
}
