//! `cargo xtask check`: formatting, lints, documentation, dependencies and the import rules.
//!
//! Owns the list of checks and the verdict; runs every check even when one fails. What could not run is never shown
//! as passed.

mod features;
mod import_rules;
mod imports;
mod source_files;
mod test_names;

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::bail;

use crate::{
    cmd, report,
    setup::{Build, Need, Plan},
    workspace::{cargo, cargo_install, root, target_directory, tools},
};

/// What the checks take where nothing has changed.
const RUNS: Duration = Duration::from_secs(30);
/// Version of cargo-deny.
const DENY_VERSION: &str = "0.20.2";

/// Every check: what it is called, and how it is run under that name.
const CHECKS: [(&str, Check); 10] = [
    ("formatting", formatting),
    ("lints (agent and tools)", lints),
    // Stable's clippy on the host's target: the BPF toolchains have none. The code is the same but for aya's assembly.
    ("lints (kernel programs, as host code)", kernel_lints),
    ("the oldest Rust that is promised", oldest_rust),
    ("documentation", documentation),
    ("bans, licenses and sources", dependencies),
    ("security advisories", advisories),
    ("import rules", import_rules),
    ("names of tests", test_names),
    ("one build of each dependency", one_build),
];

/// A check. An error means that it failed.
type Check = fn(&str) -> anyhow::Result<Outcome>;

/// Result of a check that did not fail.
enum Outcome {
    Passed,
    NotRun(String),
}

/// Runs every check.
pub(crate) fn run() -> anyhow::Result<()> {
    let deny = (!deny_program().is_file()).then(|| Need::cargo(deny_step(), "licenses and advisories", 120));
    Plan::new("Formatting, lints, documentation, dependencies and the import rules.", RUNS)
        .needs(deny)
        .builds([Build::Lints])
        .begin()?;
    let mut table = report::table(&["check", "result", "seconds"]);
    let (mut passed, mut failed, mut not_run) = (0, 0, 0);
    for (name, check) in CHECKS {
        let started = Instant::now();
        let result = match check(name) {
            Ok(Outcome::Passed) => {
                passed += 1;
                report::success("passed")
            }
            Ok(Outcome::NotRun(reason)) => {
                not_run += 1;
                format!("not run: {reason}")
            }
            Err(error) => {
                eprintln!("{} {error:#}", report::failure("✗"));
                failed += 1;
                report::failure("failed")
            }
        };
        table.add_row([name.to_owned(), result, format!("{:.1}", started.elapsed().as_secs_f64())]);
    }
    println!("{table}");
    println!("{passed} passed, {failed} failed, {not_run} not run");
    if failed > 0 {
        bail!("{failed} of {} checks failed", CHECKS.len());
    }
    Ok(())
}

fn formatting(name: &str) -> anyhow::Result<Outcome> {
    pass(name, cargo().args(["fmt", "--all", "--check"]))
}

fn lints(name: &str) -> anyhow::Result<Outcome> {
    pass(name, cargo().args(["clippy", "--all-targets", "--all-features", "--", "-D", "warnings"]))
}

fn kernel_lints(name: &str) -> anyhow::Result<Outcome> {
    // The profile of the programs: a panic handler of one's own is allowed only where panics abort.
    let arguments = ["clippy", "--package", "agent-ebpf", "--profile", "ebpf", "--", "-D", "warnings"];
    pass(name, cargo().args(arguments))
}

/// The `rust-version` of the workspace must be true.
fn oldest_rust(name: &str) -> anyhow::Result<Outcome> {
    let oldest = env!("CARGO_PKG_RUST_VERSION");
    let current = cmd::ask(Command::new("rustc").arg("--version"))?;
    if current.starts_with(&format!("rustc {oldest}.")) {
        // The lints have just compiled everything with it.
        return Ok(Outcome::Passed);
    }
    let installed = cmd::ask(Command::new("rustup").args(["toolchain", "list"])).unwrap_or_default();
    let Some(toolchain) = installed.split_whitespace().find(|name| name.starts_with(&format!("{oldest}.")))
    else {
        return Ok(Outcome::NotRun(format!("`rustup toolchain install {oldest}` would bring it")));
    };
    let mut check = Command::new("rustup");
    check.args(["run", toolchain, "cargo", "check", "--all-targets", "--target-dir"]);
    pass(name, check.arg(target_directory().join("oldest-rust")).current_dir(root()))
}

fn documentation(name: &str) -> anyhow::Result<Outcome> {
    pass(name, cargo().args(["doc", "--no-deps", "--all-features"]).env("RUSTDOCFLAGS", "-D warnings"))
}

fn dependencies(name: &str) -> anyhow::Result<Outcome> {
    pass(name, cargo_deny()?.args(["check", "bans", "licenses", "sources"]))
}

fn advisories(name: &str) -> anyhow::Result<Outcome> {
    // Without the network there is no database, and without it no verdict.
    if let Err(error) = cmd::run("advisory database", cargo_deny()?.args(["fetch", "db"])) {
        eprintln!("{error:#}");
        return Ok(Outcome::NotRun("the advisory database cannot be fetched".to_owned()));
    }
    pass(name, cargo_deny()?.args(["check", "--disable-fetch", "advisories"]))
}

fn import_rules(_: &str) -> anyhow::Result<Outcome> {
    let agent = imports::Crate::read(&root().join("agent/src"))?;
    let mut violations = agent.violations(import_rules::AGENT);
    violations.extend(agent.circles());
    for sources in ["agent-common/src", "agent-ebpf/src", "xtask/src", "xtask/lab/src"] {
        violations.extend(imports::Crate::read(&root().join(sources))?.circles());
    }
    if !violations.is_empty() {
        bail!("the import rules are broken:\n{}", violations.join("\n"));
    }
    Ok(Outcome::Passed)
}

fn test_names(_: &str) -> anyhow::Result<Outcome> {
    let too_long = test_names::too_long()?;
    if !too_long.is_empty() {
        bail!("these names are longer than 70 characters:\n{}", too_long.join("\n"));
    }
    Ok(Outcome::Passed)
}

fn one_build(_: &str) -> anyhow::Result<Outcome> {
    let differences = features::differences()?;
    if !differences.is_empty() {
        bail!(
            "dependencies that are built twice, because the agent or a test needs other features than these; \
             xtask/Cargo.toml has a list to add them to:\n{}",
            differences.join("\n")
        );
    }
    Ok(Outcome::Passed)
}

fn pass(name: &str, command: &mut Command) -> anyhow::Result<Outcome> {
    cmd::run(name, command)?;
    Ok(Outcome::Passed)
}

fn deny_program() -> PathBuf {
    tools().join("bin/cargo-deny")
}

fn deny_step() -> String {
    format!("cargo-deny {DENY_VERSION}")
}

/// cargo-deny from `target/tools`, installed there first if it is not there.
fn cargo_deny() -> anyhow::Result<Command> {
    let program = deny_program();
    if !program.is_file() {
        cmd::run(&deny_step(), &mut cargo_install("cargo-deny", DENY_VERSION))?;
    }
    let mut command = Command::new(program);
    command.current_dir(root()).args(["--config", ".deny.toml"]);
    Ok(command)
}
