//! Shows that the tests of the credential cache notice broken promises: applies each patch in `agent/tests/mutants` to a
//! copy of the workspace, and runs the tests that must fail.
//!
//! Owns the copy, and what counts as caught: the tests fail with one of the texts that the patch names. A patch that no
//! longer applies or compiles is a failure. Never changes the workspace itself.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};

use crate::{
    cmd, report,
    setup::{Build, Plan},
    workspace,
};

/// The patches, in the workspace.
const PATCHES: &str = "agent/tests/mutants";
/// What a patch takes: the agent is compiled with it, and a few tests run.
const PATCH_TAKES: Duration = Duration::from_secs(15);

/// What to show.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Apply every patch, not only those that CI applies.
    #[arg(long)]
    all: bool,
    /// Apply only patches whose name contains this.
    filter: Option<String>,
}

/// A patch, and what its header says.
#[derive(Debug, PartialEq, Eq)]
struct Mutant {
    name: String,
    bug: String,
    /// A filter for the tests that must fail.
    test: String,
    /// One of these must be in their output.
    noticed: Vec<String>,
    is_in_ci: bool,
    patch: PathBuf,
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Caught(String),
    /// The tests passed.
    Survived,
    /// The tests failed, but for another reason.
    OtherFailure,
    DoesNotApply(String),
    DoesNotCompile(String),
}

/// Applies the patches one by one, and reports which were caught.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let is_wanted = |mutant: &Mutant| match &arguments.filter {
        Some(filter) => mutant.name.contains(filter.as_str()),
        None => arguments.all || mutant.is_in_ci,
    };
    let mutants: Vec<_> = mutants(workspace::root())?.into_iter().filter(is_wanted).collect();
    if mutants.is_empty() {
        bail!("no patch in {PATCHES} has such a name");
    }
    let count = u32::try_from(mutants.len())?;
    Plan::new(
        &format!("Tests of the credential cache against {count} bugs, one by one."),
        PATCH_TAKES * count,
    )
    .builds([Build::MutantTests])
    .begin()?;
    let copy = workspace::target_directory().join("xtask/mutants");
    copy_workspace(workspace::root(), &copy)?;
    let mut table = report::table(&["PATCH", "BUG", "VERDICT", "SECONDS"]);
    let mut are_all_caught = true;
    for (number, mutant) in mutants.iter().enumerate() {
        eprintln!("mutant {} of {}: {}", number + 1, mutants.len(), mutant.name);
        let started = Instant::now();
        let verdict = try_mutant(mutant, &copy)?;
        let is_caught = matches!(verdict, Verdict::Caught(_));
        are_all_caught &= is_caught;
        let line = format!("{}: {}", mutant.name, verdict.describe());
        eprintln!("{}", if is_caught { report::success(line) } else { report::failure(line) });
        table.add_row([
            mutant.name.clone().into(),
            mutant.bug.clone().into(),
            report::verdict(is_caught, verdict.describe()),
            format!("{:.0}", started.elapsed().as_secs_f64()).into(),
        ]);
    }
    println!("{table}");
    Ok(are_all_caught)
}

// === impl Mutant ===

impl Mutant {
    fn parse(patch: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string(patch).with_context(|| format!("cannot read {}", patch.display()))?;
        let field = |name: &str| {
            let line =
                text.lines().take_while(|line| !line.is_empty()).find_map(|line| line.strip_prefix(name));
            line.map(|value| value.trim().to_owned())
                .with_context(|| format!("{} has no line that begins with {name}", patch.display()))
        };
        Ok(Self {
            name: patch.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
            bug: field("Bug:")?,
            test: field("Test:")?,
            noticed: field("Noticed:")?.split(" | ").map(str::to_owned).collect(),
            is_in_ci: field("CI:")? == "yes",
            patch: patch.to_owned(),
        })
    }
}

// === impl Verdict ===

impl Verdict {
    fn describe(&self) -> String {
        match self {
            Self::Caught(text) => format!("caught: {text}"),
            Self::Survived => "NOT caught: the tests pass".to_owned(),
            Self::OtherFailure => "the tests fail for another reason".to_owned(),
            Self::DoesNotApply(error) => format!("does not apply: {error}"),
            Self::DoesNotCompile(error) => format!("does not compile: {error}"),
        }
    }
}

/// All patches of the workspace, by name.
fn mutants(root: &Path) -> anyhow::Result<Vec<Mutant>> {
    let directory = root.join(PATCHES);
    let entries = fs::read_dir(&directory).with_context(|| format!("cannot read {}", directory.display()))?;
    let mut patches = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    patches.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
    patches.sort();
    patches.iter().map(|patch| Mutant::parse(patch)).collect()
}

/// Copies the files that git knows or would add. Unchanged files are left alone, so that the next build is incremental, and
/// files that the workspace no longer has are removed.
fn copy_workspace(root: &Path, copy: &Path) -> anyhow::Result<()> {
    let list = ["ls-files", "--cached", "--others", "--exclude-standard", "-z"];
    let files = cmd::ask(Command::new("git").current_dir(root).args(list))?;
    let files: Vec<_> = files.split('\0').filter(|file| !file.is_empty()).collect();
    let list_path = copy.join(".files");
    let before = fs::read_to_string(&list_path).unwrap_or_default();
    for gone in before.split('\0').filter(|file| !file.is_empty() && !files.contains(file)) {
        let _ = fs::remove_file(copy.join(gone));
    }
    for file in &files {
        restore(root, copy, file)?;
    }
    fs::write(&list_path, files.join("\0")).with_context(|| format!("cannot write {}", list_path.display()))
}

/// Makes a file of the copy as it is in the workspace.
fn restore(root: &Path, copy: &Path, file: &str) -> anyhow::Result<()> {
    let (from, to) = (root.join(file), copy.join(file));
    let failed = || format!("cannot copy {} to {}", from.display(), to.display());
    let text = match fs::read(&from) {
        Ok(text) => text,
        // Deleted, but not yet in git's index.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(failed),
    };
    if fs::read(&to).is_ok_and(|copied| copied == text) {
        return Ok(());
    }
    fs::create_dir_all(to.parent().unwrap_or(copy)).with_context(failed)?;
    fs::write(&to, text).with_context(failed)
}

/// Builds the tests with the bug, runs those that must fail, and takes the bug out again.
fn try_mutant(mutant: &Mutant, copy: &Path) -> anyhow::Result<Verdict> {
    if let Err(error) = git_apply(copy, &mutant.patch, &[]) {
        return Ok(Verdict::DoesNotApply(last_line(&format!("{error:#}"))));
    }
    let verdict = build_and_test(mutant, copy);
    git_apply(copy, &mutant.patch, &["--reverse"])?;
    verdict
}

fn build_and_test(mutant: &Mutant, copy: &Path) -> anyhow::Result<Verdict> {
    let cargo = || {
        let mut cargo = workspace::cargo();
        // The workspace's own target directory: the dependencies are compiled there already.
        cargo.current_dir(copy).env("CARGO_TARGET_DIR", workspace::target_directory());
        // The agent is compiled once a patch, and its tests run for seconds only. And what is compiled here must never be
        // taken for the workspace's own crates, which have the same names: those are optimized.
        cargo.env("CARGO_PROFILE_DEV_OPT_LEVEL", "0").env("CARGO_INCREMENTAL", "1");
        cargo.args(["test", "--quiet", "--package", "agent", "--lib", "--all-features"]);
        cargo
    };
    if let Err(error) = cmd::run(&format!("build {}", mutant.name), cargo().arg("--no-run")) {
        return Ok(Verdict::DoesNotCompile(first_error(&format!("{error:#}"))));
    }
    let output = cargo().arg(&mutant.test).stdin(Stdio::null()).output().context("cannot run cargo")?;
    if output.status.success() {
        return Ok(Verdict::Survived);
    }
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let noticed = mutant.noticed.iter().find(|noticed| text.contains(noticed.as_str()));
    Ok(noticed.map_or(Verdict::OtherFailure, |noticed| Verdict::Caught(noticed.clone())))
}

/// Applies a patch to a directory, whether or not that is in a repository.
fn git_apply(directory: &Path, patch: &Path, options: &[&str]) -> anyhow::Result<String> {
    let ceiling = directory.parent().unwrap_or(directory);
    cmd::ask(
        Command::new("git")
            .current_dir(directory)
            .env("GIT_CEILING_DIRECTORIES", ceiling)
            .arg("apply")
            .args(options)
            .arg(patch),
    )
}

fn last_line(text: &str) -> String {
    text.lines().last().unwrap_or_default().to_owned()
}

fn first_error(text: &str) -> String {
    text.lines().find(|line| line.starts_with("error")).unwrap_or("see the log").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_patch_has_a_header_and_applies() {
        let mutants = mutants(workspace::root()).unwrap();
        assert!(mutants.iter().any(|mutant| mutant.is_in_ci));
        for mutant in mutants {
            let applied = git_apply(workspace::root(), &mutant.patch, &["--check"]);
            assert!(applied.is_ok(), "{}: {applied:?}", mutant.name);
        }
    }

    #[test]
    fn a_copy_follows_the_workspace_and_leaves_unchanged_files_alone() {
        let (root, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (root, copy) = (root.path(), copy.path());
        assert!(Command::new("git").current_dir(root).args(["init", "-q"]).status().unwrap().success());
        fs::write(root.join("a"), "1").unwrap();
        fs::write(root.join("b"), "1").unwrap();
        copy_workspace(root, copy).unwrap();
        let written = fs::metadata(copy.join("a")).unwrap().modified().unwrap();
        fs::remove_file(root.join("b")).unwrap();
        fs::write(root.join("c"), "1").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        copy_workspace(root, copy).unwrap();
        assert_eq!(fs::metadata(copy.join("a")).unwrap().modified().unwrap(), written);
        assert!(!copy.join("b").exists() && copy.join("c").exists());
    }
}
