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
    Ok(of_others(&cmd::ask(&mut tree)?))
}

/// The lines of a tree but those of the workspace's own packages: they have a path, and features that differ on purpose.
/// A package without features has a space at its end, which the last line of an answer has lost.
fn of_others(tree: &str) -> BTreeSet<String> {
    let lines = tree.lines().filter(|line| !line.contains("(/"));
    lines.map(|line| line.trim_end().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_a_package_in_the_tree_does_not_matter() {
        assert_eq!(of_others("b v1 \na v1 std\nown v1 (/p) x"), of_others("a v1 std\nb v1"));
    }

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
