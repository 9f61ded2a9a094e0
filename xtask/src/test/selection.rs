//! Which tests a run of cargo runs.
//!
//! Owns how filters reach the test binaries. Which tests make a tier is its parent's.

use std::fs;

use anyhow::Context as _;
use tokio::process::Command;

use super::Environment;
use crate::{cmd, workspace};

/// The tests of the kernel's side.
const KERNEL: &str = "kernel";
/// The lab tests that run alone.
pub(super) const ALONE: &str = "upgrade::";

/// Tests of one run of cargo.
pub(super) struct Selection {
    /// Arguments of `cargo test`.
    pub(super) cargo: Vec<String>,
    /// Leaves out the tests whose names contain this.
    pub(super) skip: Option<&'static str>,
    /// Runs nothing but the tests whose names contain this, one after the other.
    pub(super) only: Option<&'static str>,
}

// === impl Selection ===

impl Selection {
    pub(super) fn new(cargo: &str) -> Self {
        Self { cargo: cargo.split(' ').map(str::to_owned).collect(), skip: None, only: None }
    }

    /// Examples in the documentation are compiled as they run.
    pub(super) fn is_compiled_first(&self) -> bool {
        !self.cargo.iter().any(|argument| argument == "--doc")
    }

    /// The run of cargo, without arguments of the test binaries.
    pub(super) fn command(&self, environment: &Environment) -> Command {
        let mut command = Command::from(workspace::cargo());
        command.arg("test").args(&self.cargo);
        command.envs(environment.iter().map(|(name, value)| (*name, value)));
        command
    }

    /// The arguments of the test binaries; `None` if none of their tests matches.
    pub(super) fn harness(
        &self,
        filters: &[String],
        environment: &Environment,
    ) -> anyhow::Result<Option<Vec<String>>> {
        let mut arguments = Vec::new();
        if let Some(skip) = self.skip {
            arguments.extend(["--skip".to_owned(), skip.to_owned()]);
        }
        let Some(only) = self.only else {
            arguments.extend_from_slice(filters);
            return Ok(Some(arguments));
        };
        arguments.extend(["--test-threads=1".to_owned(), "--nocapture".to_owned()]);
        if filters.is_empty() {
            arguments.push(only.to_owned());
            return Ok(Some(arguments));
        }
        // Tests that match any filter run: both can only be asked for by listing them.
        let mut list = workspace::cargo();
        list.args(["test", "--quiet"])
            .args(&self.cargo)
            .args(["--", "--list", "--format=terse"])
            .args(filters);
        list.envs(environment.iter().map(|(name, value)| (*name, value)));
        let names = listed(&cmd::ask(&mut list)?, only);
        if names.is_empty() {
            return Ok(None);
        }
        arguments.push("--exact".to_owned());
        arguments.extend(names);
        Ok(Some(arguments))
    }
}

/// The tests in libtest's list whose names contain `only`.
fn listed(list: &str, only: &str) -> Vec<String> {
    let names = list.lines().filter_map(|line| line.strip_suffix(": test"));
    names.filter(|name| name.contains(only)).map(str::to_owned).collect()
}

/// Selects every integration test in a directory that needs no root.
pub(super) fn tests_in(directory: &str) -> anyhow::Result<Vec<String>> {
    let path = workspace::root().join(directory);
    let entries = fs::read_dir(&path).with_context(|| format!("cannot list {}", path.display()))?;
    let mut selection = Vec::new();
    for entry in entries {
        let path = entry?.path();
        let is_file = path.extension().is_some_and(|extension| extension == "rs");
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        // As cargo finds them. Those of the kernel are a tier of their own.
        if name != KERNEL && (is_file || path.join("main.rs").is_file()) {
            selection.extend(["--test".to_owned(), name.into_owned()]);
        }
    }
    Ok(selection)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test::Tier;

    fn harness(selection: &Selection, filters: &[&str]) -> Vec<String> {
        let filters: Vec<_> = filters.iter().map(|&filter| filter.to_owned()).collect();
        selection.harness(&filters, &Environment::new()).unwrap().unwrap()
    }

    #[test]
    fn every_integration_test_belongs_to_a_tier() {
        let mut metadata = workspace::cargo();
        metadata.args(["metadata", "--no-deps", "--format-version", "1"]);
        let metadata: serde_json::Value = serde_json::from_str(&cmd::ask(&mut metadata).unwrap()).unwrap();
        let packages = metadata["packages"].as_array().unwrap();
        let targets = packages.iter().flat_map(|package| package["targets"].as_array().unwrap());
        let tests = targets.filter(|target| target["kind"][0] == "test");
        let mut tests: Vec<_> = tests.map(|target| target["name"].as_str().unwrap()).collect();
        let tiers = [Tier::Unit, Tier::Pipeline, Tier::Kernel, Tier::Lab];
        let selections: Vec<_> = tiers.into_iter().flat_map(|tier| tier.selections().unwrap()).collect();
        let is_chosen = |name: &str| {
            let mut pairs = selections.iter().flat_map(|selection| selection.cargo.windows(2));
            pairs.any(|pair| pair == ["--test", name])
        };
        tests.retain(|name| !is_chosen(name));
        assert!(tests.is_empty(), "no tier has {tests:?}");
    }

    #[test]
    fn a_filter_reaches_the_test_binaries() {
        let unit = &Tier::Unit.selections().unwrap()[0];
        assert_eq!(harness(unit, &["jitter", "--exact"]), ["jitter", "--exact"]);
        assert!(harness(unit, &[]).is_empty());
        let others = &Tier::Lab.selections().unwrap()[0];
        assert_eq!(harness(others, &["drain"]), ["--skip", ALONE, "drain"]);
    }

    #[test]
    fn lab_tests_that_run_alone_are_chosen_by_name_where_there_is_a_filter() {
        let alone = &Tier::Lab.selections().unwrap()[1];
        assert_eq!(harness(alone, &[]), ["--test-threads=1", "--nocapture", ALONE]);
        let list = "drain::one: test\nupgrade::one: test\nupgrade::two: test\n\n3 tests, 0 benchmarks\n";
        assert_eq!(listed(list, ALONE), ["upgrade::one", "upgrade::two"]);
        assert!(listed("drain::one: test", ALONE).is_empty());
    }
}
