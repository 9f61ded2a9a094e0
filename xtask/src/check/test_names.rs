//! Names of tests that are too long to be read in a list.
//!
//! Owns how a test is found in a source, and the limit; never judges what a name says.

use std::fs;

use anyhow::Context as _;

use super::source_files::source_files;
use crate::workspace;

/// Most characters of a test's name.
const LENGTH_MAX: usize = 70;
/// Where the workspace has sources.
const DIRECTORIES: [&str; 4] = ["agent", "agent-common", "agent-ebpf", "xtask"];

/// Every test whose name is too long, as a line for a person.
pub(super) fn too_long() -> anyhow::Result<Vec<String>> {
    let root = workspace::root();
    let mut found = Vec::new();
    for directory in DIRECTORIES {
        // What a build made is not the workspace's.
        for file in source_files(&root.join(directory), &|path| path.is_dir() && path.ends_with("target"))? {
            let text =
                fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let file = file.strip_prefix(root).unwrap_or(&file).display();
            let names = tests(&text).into_iter().filter(|name| name.len() > LENGTH_MAX);
            found.extend(names.map(|name| format!("{file}: {name} ({} characters)", name.len())));
        }
    }
    Ok(found)
}

/// The functions with an attribute such as `#[test]` or `#[tokio::test(…)]`.
fn tests(text: &str) -> Vec<&str> {
    let mut names = Vec::new();
    let mut is_test = false;
    for line in text.lines().map(str::trim_start) {
        if let Some(attribute) = line.strip_prefix("#[") {
            let path = attribute.split(['(', ']']).next().unwrap_or_default();
            is_test |= path.split("::").last() == Some("test");
        } else if let Some((_, function)) = line.split_once("fn ") {
            if is_test {
                names.extend(function.split(['(', '<']).next());
            }
            is_test = false;
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_found_and_nothing_else() {
        let text = "#[test]\nfn one() {}\nfn helper() {}\n    #[tokio::test(start_paused = true)]\n    #[expect(x)]\n    \
                    async fn two() {}\n#[cfg(test)]\nmod tests {\n    fn another(test: u8) {}\n}\n";
        assert_eq!(tests(text), ["one", "two"]);
    }

    #[test]
    fn no_name_is_too_long() {
        assert_eq!(too_long().unwrap(), [""; 0]);
        let name = "x".repeat(LENGTH_MAX + 1);
        assert!(tests(&format!("#[test]\nfn {name}() {{}}\n"))[0].len() > LENGTH_MAX);
    }
}
