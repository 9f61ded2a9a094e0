//! The commands of `cargo xtask` that the pages name, against its command line. The other half of this is the agent's
//! test `documents`, with which it shares the reading of pages.

#[path = "../../agent/tests/documents/commands.rs"]
mod commands;
#[path = "../../agent/tests/documents/markdown.rs"]
mod markdown;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

use clap::{Command, CommandFactory as _};

use crate::workspace::root;

const CONTRIBUTING: &str = "xtask/CONTRIBUTING.md";
const SECURITY: &str = "deploy/docs/security.md";
/// Begins the rows of the table that says which attacks try to break what.
const ATTACKED: &str = "| what holds |";

fn pages() -> BTreeMap<PathBuf, String> {
    let mut files = vec![root().join("README.md"), root().join(CONTRIBUTING)];
    for directory in ["deploy", "deploy/docs", ".github"] {
        let entries = fs::read_dir(root().join(directory)).unwrap();
        files.extend(entries.map(|entry| entry.unwrap().path()));
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "md"));
    files.into_iter().map(|file| (file.clone(), fs::read_to_string(file).unwrap())).collect()
}

fn command() -> Command {
    let mut command = super::Arguments::command();
    command.build();
    command
}

/// Every call in a page that the command line does not take.
fn problems(command: &Command, page: &str) -> Vec<String> {
    let mut problems = Vec::new();
    for block in markdown::blocks(page) {
        let lines = commands::lines(&block);
        let calls: Vec<_> =
            lines.iter().flat_map(|line| commands::calls(line, &["cargo", "xtask"])).collect();
        let mut found: Vec<_> = calls.iter().filter_map(|call| commands::unknown(command, call)).collect();
        // Flags in code of their own are those of the command that a table's row names first.
        if let Some(first) = calls.first().filter(|_| block.kind == markdown::Kind::Row) {
            let flags = lines.iter().filter(|line| line.starts_with("--"));
            found.extend(flags.filter_map(|flag| {
                let words: Vec<_> = first.iter().copied().chain(flag.split_whitespace()).collect();
                commands::unknown(command, &words)
            }));
        }
        problems.extend(found.into_iter().map(|problem| format!("{}: {problem}", block.line)));
    }
    problems
}

#[test]
fn pages_name_only_commands_and_flags_that_there_are() {
    let command = command();
    for (file, page) in pages() {
        assert_eq!(problems(&command, &page), [""; 0], "{}", file.display());
    }
}

#[test]
fn every_command_is_documented() {
    let page = fs::read_to_string(root().join(CONTRIBUTING)).unwrap();
    for command in commands::leaves(&command()) {
        let command = command.replacen("xtask", "cargo xtask", 1);
        assert!(page.contains(&command), "{CONTRIBUTING} does not have `{command}`");
    }
}

#[test]
fn every_attack_is_named_by_what_it_tries_to_break() {
    let page = fs::read_to_string(root().join(SECURITY)).unwrap();
    let blocks = markdown::blocks(&page);
    let table = blocks.iter().skip_while(|block| !block.text.starts_with(ATTACKED));
    let rows = table.skip(2).take_while(|block| block.kind == markdown::Kind::Row);
    let mut named = BTreeSet::new();
    for row in rows {
        let cells = markdown::cells(&row.text);
        let attacks = markdown::spans(&cells[1]);
        assert!(!attacks.is_empty(), "{}", cells[0]);
        named.extend(attacks.into_iter().map(str::to_owned));
    }
    assert_eq!(named, crate::attack::names().map(str::to_owned).collect());
}

#[test]
fn a_command_or_flag_that_there_is_not_is_found() {
    for (page, problem) in [
        ("`cargo xtask brew`", "1: `xtask` has no command brew"),
        ("`cargo xtask test --tire unit`", "1: `test` has no --tire"),
        ("`cargo xtask test --tier moon`", "1: --tier of `test` is never moon"),
        ("| `cargo xtask fuzz` | `--tmie SECONDS` |", "1: `fuzz` has no --tmie"),
        ("    cargo xtask lab up    # --pots 2", "1: `up` has no --pots"),
    ] {
        assert_eq!(problems(&command(), page), [problem], "{page}");
    }
    assert_eq!(problems(&command(), "`cargo xtask test --tier vm-6.1`, `cargo xtask check`"), [""; 0]);
}
