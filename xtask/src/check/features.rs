//! Whether `cargo xtask`, the agents of simulated nodes and the tests share one build of each dependency.
//!
//! Cargo chooses the features of a dependency by the packages that a command selects. Where two selections get different
//! features, the dependency is built twice, with all that depends on it. Owns the selections that must agree; never
//! looks at what was built.

use std::{collections::BTreeSet, process::Command};

use crate::{cmd, workspace::cargo};

/// What `cargo xtask` selects, what simulated nodes do, and what the tests do.
const SELECTIONS: [(&[&str], &str); 3] = [
    (&["xtask"], "normal,build"),
    (&["agent", "xtask"], "normal,build"),
    (&["agent", "agent-common", "lab", "xtask"], "normal,build,dev"),
];

/// Each dependency that gets other features in the next selection, with the features that it has in one.
pub(super) fn differences() -> anyhow::Result<Vec<String>> {
    let dependencies: Vec<_> = SELECTIONS.iter().map(dependencies).collect::<anyhow::Result<_>>()?;
    let pairs = dependencies.windows(2);
    Ok(pairs.flat_map(|pair| pair[0].difference(&pair[1]).cloned().collect::<Vec<_>>()).collect())
}

/// Lines such as `bytes v1.12.1 default,std`.
fn dependencies((packages, edges): &(&[&str], &str)) -> anyhow::Result<BTreeSet<String>> {
    let mut tree: Command = cargo();
    tree.args([
        "tree",
        "--locked",
        "--prefix",
        "none",
        "--no-dedupe",
        "--format",
        "{p} {f}",
        "--edges",
        edges,
    ]);
    for package in *packages {
        tree.args(["--package", package]);
    }
    let lines = cmd::ask(&mut tree)?;
    // The workspace's own packages have a path, and features that differ on purpose.
    Ok(lines.lines().filter(|line| !line.contains("(/")).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_selection_has_dependencies_with_features() {
        for selection in &SELECTIONS {
            let found = dependencies(selection).unwrap();
            assert!(
                found.iter().any(|line| line.starts_with("tokio v") && line.contains("net")),
                "{found:?}"
            );
        }
    }
}
