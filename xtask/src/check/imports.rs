//! The import rules: data moves through the agent in one direction, and each stage knows only what it may.
//!
//! Owns the table and a scan of paths in the sources; never parses Rust beyond that. Tests may import anything.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

/// The stages of a request, from left to right.
const STAGES: [&str; 6] = ["accept", "identity", "policy", "credentials", "dialect", "intercept"];

/// A module and what it must not name: `crate::module`, or a crate; a trailing `*` stands for any ending.
const RULES: [(&str, &[&str]); 8] = [
    ("intercept", &["crate::identity", "crate::credentials", "crate::dialect", "hyper*", "kube"]),
    ("accept", &["aya", "kube", "aws_config", "aws_sdk*", "aws_smithy*"]),
    ("identity", &["crate::intercept", "crate::credentials", "crate::dialect"]),
    ("credentials", &["crate::intercept", "crate::dialect", "hyper*"]),
    ("policy", &["aws_config", "aws_sdk*", "aws_smithy*", "hyper*", "aya"]),
    (
        "dialect",
        &[
            "kube",
            "aws_config",
            "aws_sdk*",
            "aws_smithy*",
            "aya",
            "tokio",
            "std::fs",
            "std::net",
            "std::io",
            "std::process",
        ],
    ),
    ("serve", &["crate::config"]),
    ("link", &["crate::*"]),
];

/// Modules that belong to no stage and know none.
const LIFECYCLE: [&str; 2] = ["drain", "telemetry"];

/// Modules that put everything together, and what tests are made with: only these may name `serve` and `app`.
const COMPOSITION: [&str; 6] = ["app", "cli", "main", "observe", "serve", "testing"];

/// Every place below `sources` that breaks a rule, as a line for a person.
pub(super) fn violations(sources: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for file in files(sources)? {
        let relative = file.strip_prefix(sources).unwrap_or(&file);
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let module = relative.iter().next().unwrap_or_default().to_string_lossy();
        let module = module.trim_end_matches(".rs");
        found.extend(
            named(&text)
                .into_iter()
                .filter(|path| !may_name(module, path))
                .map(|path| format!("{}: {module} must not name {path}", relative.display())),
        );
    }
    Ok(found)
}

/// Whether a module may name a path.
fn may_name(module: &str, path: &str) -> bool {
    let forbidden =
        RULES.iter().find(|(name, _)| *name == module).map_or(&[][..], |(_, forbidden)| forbidden);
    let is_forbidden = |pattern: &&str| match pattern.strip_suffix('*') {
        Some(prefix) => path.starts_with(prefix),
        None => path == *pattern,
    };
    if forbidden.iter().any(is_forbidden) {
        return false;
    }
    let Some(other) = path.strip_prefix("crate::") else { return true };
    match other {
        "app" | "serve" => COMPOSITION.contains(&module),
        other if LIFECYCLE.contains(&module) => !STAGES.contains(&other),
        _ => true,
    }
}

/// The first two segments of the paths from `crate` and `std`, and the first of the others.
fn named(text: &str) -> BTreeSet<String> {
    let code: String = text
        .split("#[cfg(test)]\nmod tests")
        .next()
        .unwrap_or_default()
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n");
    let mut names = BTreeSet::new();
    for (end, _) in code.match_indices("::") {
        let start = code[..end].rfind(|c: char| !is_identifier(c)).map_or(0, |before| before + 1);
        let root = &code[start..end];
        if root.is_empty() || code[..start].ends_with("::") {
            continue;
        }
        if root == "crate" || root == "std" {
            names.extend(branches(&code[end + 2..]).into_iter().map(|name| format!("{root}::{name}")));
        } else {
            names.insert(root.to_owned());
        }
    }
    names
}

/// The names that a path goes on with: one, or those of a `{…}` at its outermost level.
fn branches(rest: &str) -> Vec<&str> {
    let Some(list) = rest.strip_prefix('{') else {
        return vec![leading_identifier(rest)];
    };
    let mut names = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (place, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            ',' | '}' if depth == 0 => {
                names.push(leading_identifier(list[start..place].trim_start()));
                start = place + 1;
                if c == '}' {
                    break;
                }
            }
            '}' => depth -= 1,
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

fn leading_identifier(text: &str) -> &str {
    &text[..text.find(|c: char| !is_identifier(c)).unwrap_or(text.len())]
}

fn is_identifier(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The Rust sources below a directory, without those of tests.
fn files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if name == "tests" || name == "testing" {
            continue;
        }
        if path.is_dir() {
            found.extend(files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_wherever_they_are() {
        let text = "use std::{fs, net::{IpAddr, Ipv4Addr}};\n\
                    use crate::{drain::Watch, intercept::{self, Origin},\n    serve};\n\
                    // aya::Ebpf is not named\n\
                    fn f() -> hyper::Result<()> { crate::policy::decide::<kube::Client>() }\n\
                    #[cfg(test)]\nmod tests { use aws_config::load; }\n";
        let found = named(text);
        for name in [
            "crate::drain",
            "crate::intercept",
            "crate::policy",
            "crate::serve",
            "hyper",
            "kube",
            "std::fs",
            "std::net",
        ] {
            assert!(found.contains(name), "{name}: {found:?}");
        }
        for name in ["aya", "aws_config"] {
            assert!(!found.contains(name), "{name}: {found:?}");
        }
    }

    #[test]
    fn each_rule_refuses_what_it_names() {
        for (module, path, expected) in [
            ("accept", "aya", false),
            ("accept", "crate::intercept", true),
            ("identity", "crate::credentials", false),
            ("identity", "crate::policy", true),
            ("credentials", "aws_config", true),
            ("dialect", "aws_config", false),
            ("dialect", "aws_sdk_eksauth", false),
            ("dialect", "aws_lc_rs", true),
            ("dialect", "tokio", false),
            ("dialect", "std::net", false),
            ("dialect", "std::time", true),
            ("drain", "crate::identity", false),
            ("drain", "tokio", true),
            ("credentials", "crate::serve", false),
            ("app", "crate::serve", true),
            ("link", "crate::config", false),
        ] {
            assert_eq!(may_name(module, path), expected, "{module} {path}");
        }
    }

    #[test]
    fn a_violation_is_shown_with_its_file() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("dialect")).unwrap();
        fs::write(root.path().join("dialect/imds.rs"), "use kube::Client;\n").unwrap();
        fs::write(root.path().join("identity.rs"), "use kube::Client;\n").unwrap();
        assert_eq!(violations(root.path()).unwrap(), ["dialect/imds.rs: dialect must not name kube"]);
    }
}
