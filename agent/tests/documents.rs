//! The pages against the program: no dead link, no name that the program does not have, and nothing left out.
#![expect(clippy::unwrap_used, reason = "test code")]

#[path = "documents/commands.rs"]
mod commands;
#[path = "documents/fields.rs"]
mod fields;
#[path = "documents/markdown.rs"]
mod markdown;
#[path = "documents/names.rs"]
mod names;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use agent::{
    cli::Cli,
    control::fence::FenceMetrics,
    credentials::metrics::CacheMetrics,
    serve::metrics::RequestMetrics,
    takeover::{pod_listeners::PodListenerMetrics, transfer::HandoverMetrics},
};
use agent_common::counter::Counter;
use clap::CommandFactory as _;
use prometheus_client::registry::Registry;

use self::markdown::{blocks, spans, tables};

/// Flags of other programs that the pages name.
const FOREIGN_FLAGS: [&str; 1] = ["root-dir"];
/// The only page whose flags are those of `cargo xtask`, which has a test of its own for them.
const CONTRIBUTING: &str = "xtask/CONTRIBUTING.md";
const CHANGELOG: &str = "deploy/CHANGELOG.md";
const CONFIGURATION: &str = "deploy/docs/configuration.md";
const METRICS: &str = "deploy/docs/metrics.md";
const OPERATIONS: &str = "deploy/docs/operations.md";
const POLICY: &str = "deploy/docs/policy.md";
const TROUBLESHOOTING: &str = "deploy/docs/troubleshooting.md";

/// The repository, or a small one made up for a test.
struct Repository {
    root: PathBuf,
    /// Text by path.
    pages: BTreeMap<String, String>,
}

/// The names that the program has.
struct Program {
    command: clap::Command,
    /// `PODGATE_…`, for operators and for developers.
    variables: BTreeSet<String>,
    /// As they are printed, with what they are.
    metrics: BTreeMap<String, String>,
    annotations: BTreeSet<String>,
    maps: BTreeSet<String>,
    events: BTreeSet<&'static str>,
    /// The agent's sources and the shared records, in one, with strings that go on in the next line joined.
    sources: String,
}

// === impl Repository ===

impl Repository {
    fn read() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned();
        let mut files = vec![root.join("README.md")];
        for directory in ["agent", "xtask"] {
            files.extend(children(&root.join(directory)));
        }
        for directory in ["deploy", ".github"] {
            files.extend(below(&root.join(directory)));
        }
        let is_form = |file: &Path| file.parent().is_some_and(|parent| parent.ends_with("ISSUE_TEMPLATE"));
        files.retain(|file| file.extension().is_some_and(|extension| extension == "md") || is_form(file));
        let page = |file: PathBuf| {
            let name = file.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(file).unwrap())
        };
        let pages = files.into_iter().map(page).collect();
        Self { root, pages }
    }

    /// Every link within the repository that leads nowhere.
    fn dead_links(&self) -> Vec<String> {
        let mut dead = Vec::new();
        for (name, text) in &self.pages {
            for block in blocks(text) {
                let links = markdown::links(&block).into_iter();
                let broken =
                    links.filter(|link| !link.starts_with("https://") && !self.leads_somewhere(name, link));
                dead.extend(broken.map(|link| format!("{name}:{}: {link} leads nowhere", block.line)));
            }
        }
        dead
    }

    fn leads_somewhere(&self, page: &str, link: &str) -> bool {
        let (file, anchor) = link.split_once('#').map_or((link, None), |(file, anchor)| (file, Some(anchor)));
        let target = if file.is_empty() { page.to_owned() } else { beside(page, file) };
        match (self.pages.get(&target), anchor) {
            (Some(text), Some(anchor)) => markdown::anchors(text).iter().any(|there| there == anchor),
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (None, None) => self.root.join(&target).exists(),
        }
    }

    /// Every path in code that is not in the repository.
    fn missing_paths(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for (name, text) in self.pages.iter().filter(|(name, _)| *name != CHANGELOG) {
            for block in blocks(text) {
                let paths = commands::lines(&block).into_iter().filter_map(names::path);
                let paths = paths.filter(|path| !self.root.join(path).exists());
                missing.extend(paths.map(|path| format!("{name}:{}: there is no {path}", block.line)));
            }
        }
        missing
    }

    /// Every `--test NAME` of `cargo test` that no crate has.
    fn missing_tests(&self) -> Vec<String> {
        let mut missing = Vec::new();
        let tests = ["agent", "xtask", "xtask/lab"].map(|krate| self.root.join(krate).join("tests"));
        let exists = |name: &str| {
            tests.iter().any(|tests| {
                tests.join(format!("{name}.rs")).exists() || tests.join(name).join("main.rs").exists()
            })
        };
        for (name, text) in &self.pages {
            for block in blocks(text) {
                for call in commands::lines(&block)
                    .into_iter()
                    .flat_map(|line| commands::calls(line, &["cargo", "test"]))
                {
                    let tests = call.windows(2).filter(|pair| pair[0] == "--test" && !exists(pair[1]));
                    missing.extend(
                        tests.map(|pair| format!("{name}:{}: there is no test {}", block.line, pair[1])),
                    );
                }
            }
        }
        missing
    }

    fn page(&self, name: &str) -> &str {
        self.pages.get(name).unwrap_or_else(|| panic!("{name} is missing"))
    }
}

// === impl Program ===

impl Program {
    fn read(root: &Path) -> Self {
        let mut command = Cli::command();
        command.build();
        let sources =
            joined(&[below(&root.join("agent/src")), below(&root.join("agent-common/src"))].concat());
        let tools = joined(
            &[
                below(&root.join("xtask/src")),
                below(&root.join("xtask/tests")),
                vec![root.join("agent/build.rs")],
            ]
            .concat(),
        );
        let mut variables: BTreeSet<_> = commands_of(&command)
            .into_iter()
            .flat_map(clap::Command::get_arguments)
            .filter_map(|argument| Some(argument.get_env()?.to_str()?.to_owned()))
            .collect();
        variables.extend(literals(&tools, names::variables));
        Self {
            variables,
            metrics: metrics(&sources),
            annotations: literals(&sources, names::annotations),
            maps: maps(root),
            events: Counter::ALL.iter().map(|counter| counter.label()).collect(),
            command,
            sources,
        }
    }

    fn knows_flag(&self, flag: &str) -> bool {
        commands::flags(&self.command).contains(&flag) || FOREIGN_FLAGS.contains(&flag)
    }

    /// What a text names that the program does not have.
    fn unknown(&self, text: &str) -> Vec<String> {
        let variables = names::variables(text).into_iter().filter(|name| !self.variables.contains(*name));
        let metrics = names::metrics(text).into_iter().filter(|name| !self.metrics.contains_key(*name));
        let annotations =
            names::annotations(text).into_iter().filter(|name| !self.annotations.contains(*name));
        let events = names::events(text).into_iter().filter(|name| !self.events.contains(name));
        let unknown = variables.chain(metrics).chain(annotations).chain(events);
        unknown.map(|name| format!("{name} is not in the program")).collect()
    }

    /// What a line of code calls that the program does not have.
    fn unknown_calls(&self, line: &str) -> Vec<String> {
        let calls = commands::calls(line, &["podgate"]).into_iter();
        let maps = |call: &[&str]| {
            let name = match call {
                ["maps", "show" | "dump", name, ..] => *name,
                _ => return None,
            };
            let is_known = name == "NAME" || self.maps.contains(name);
            (!is_known).then(|| format!("there is no map {name}"))
        };
        calls.filter_map(|call| commands::unknown(&self.command, &call).or_else(|| maps(&call))).collect()
    }

    /// Everything in a page that the program does not have.
    fn problems(&self, name: &str, page: &str) -> Vec<String> {
        let mut problems = Vec::new();
        for block in blocks(page) {
            let mut found = self.unknown(&block.text);
            for line in commands::lines(&block) {
                found.extend(self.unknown_calls(line));
                let flag = names::flag(line).filter(|flag| name != CONTRIBUTING && !self.knows_flag(flag));
                found.extend(flag.map(|flag| format!("there is no --{flag}")));
            }
            problems.extend(found.into_iter().map(|problem| format!("{name}:{}: {problem}", block.line)));
        }
        problems
    }

    /// What a changelog calls renamed and is not.
    fn wrong_renames(&self, changelog: &str) -> Vec<String> {
        let mut problems = Vec::new();
        for table in tables(changelog) {
            if !table.header.iter().any(|cell| cell.ends_with("old")) {
                continue;
            }
            let names = self.names_of(&table.header[0]);
            let has = |span: &str| self.has(span) || names.contains(span);
            for (line, cells) in table.rows {
                let still = spans(&cells[0]).into_iter().filter(|span| has(span));
                problems
                    .extend(still.map(|span| format!("{CHANGELOG}:{line}: {span} is still in the program")));
                let [_, new] = &cells[..] else { panic!("{CHANGELOG}:{line}: old and new") };
                let lacks = spans(new).into_iter().filter(|span| !has(span));
                problems
                    .extend(lacks.map(|span| format!("{CHANGELOG}:{line}: {span} is not in the program")));
            }
        }
        problems
    }

    /// What else a table of the changelog says was renamed: the names of that kind which the program has.
    fn names_of(&self, header: &str) -> BTreeSet<String> {
        if header.starts_with("fields of the log") {
            fields::of_log_lines(&self.sources)
        } else if header.starts_with("labels of") {
            let mut labels = fields::of_structs(&self.sources, "EncodeLabelSet");
            labels.extend(self.sources.split('"').map(str::to_owned));
            labels
        } else if header.starts_with("settings in") {
            let run = self.command.find_subcommand("run").unwrap();
            run.get_arguments().map(|argument| argument.get_id().to_string()).collect()
        } else if header.starts_with("fields of") {
            fields::of_structs(&self.sources, "Serialize")
        } else if header.starts_with("fields in") {
            fields::of_structs(&self.sources, "repr(C)")
        } else {
            BTreeSet::new()
        }
    }

    /// Whether a name is still in use.
    fn has(&self, span: &str) -> bool {
        let is_flag = names::flag(span).is_some_and(|flag| self.knows_flag(flag));
        let named = names::variables(span).into_iter().any(|name| self.variables.contains(name));
        let counted = names::metrics(span).into_iter().any(|name| self.metrics.contains_key(name));
        let event = names::events(span).into_iter().next();
        let counted = event.map_or(counted, |event| self.events.contains(event));
        is_flag || named || counted || self.maps.contains(span)
    }
}

/// The files right in a directory.
fn children(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_file()).collect()
}

/// Every file below a directory.
fn below(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { below(&path) } else { vec![path] }).collect()
}

/// A link's file, as the repository names it.
fn beside(page: &str, link: &str) -> String {
    let mut parts: Vec<_> = page.split('/').collect();
    parts.pop();
    for part in link.split('/') {
        match part {
            "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Sources in one text, each string on one line.
fn joined(files: &[PathBuf]) -> String {
    let sources = files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "rs"));
    let text: String = sources.map(|file| fs::read_to_string(file).unwrap()).collect();
    let mut lines = text.lines();
    let mut joined = String::new();
    while let Some(line) = lines.next() {
        let mut line = line.to_owned();
        while line.ends_with('\\') {
            line.pop();
            line.push_str(lines.next().unwrap_or_default().trim_start());
        }
        joined.push_str(&line);
        joined.push('\n');
    }
    joined
}

/// The names that are string literals of their own.
fn literals(sources: &str, names: fn(&str) -> Vec<&str>) -> BTreeSet<String> {
    let literals = sources.split('"').filter(|literal| names(literal) == [*literal]);
    literals.map(str::to_owned).collect()
}

/// Commands and those below them.
fn commands_of(command: &clap::Command) -> Vec<&clap::Command> {
    [command].into_iter().chain(command.get_subcommands().flat_map(commands_of)).collect()
}

/// Every metric that the agent registers, as it is printed, with its type.
fn metrics(sources: &str) -> BTreeMap<String, String> {
    let mut registry = Registry::default();
    RequestMetrics::register(&mut registry);
    CacheMetrics::register(&mut registry);
    HandoverMetrics::register(&mut registry);
    FenceMetrics::register(&mut registry);
    PodListenerMetrics::register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    let types: BTreeMap<_, _> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    // A metric with labels is not printed before it has some, as the fence's has. All others are counters, as the kernel's
    // are.
    assert!(
        !sources.contains(", Gauge>") && !sources.contains(", Histogram>"),
        "this test must tell types apart"
    );
    let printed = |name: String| match types.get(&*name) {
        Some(&"gauge") => (name, "gauge".to_owned()),
        _ => (format!("{name}_total"), "counter".to_owned()),
    };
    let names = literals(sources, names::metrics).into_iter().filter(|name| !name.ends_with("_total"));
    names.map(printed).collect()
}

/// The names of the programs' maps.
fn maps(root: &Path) -> BTreeSet<String> {
    let abi = fs::read_to_string(root.join("agent-common/src/abi.rs")).unwrap();
    let (_, module) = abi.split_once("pub mod map {").unwrap();
    let (module, _) = module.split_once("\n}").unwrap();
    let names = module.split('"').skip(1).step_by(2).map(str::to_owned);
    names.collect()
}

fn read() -> (Repository, Program) {
    let repository = Repository::read();
    let program = Program::read(&repository.root);
    (repository, program)
}

fn assert_none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn no_link_is_dead() {
    assert_none(&Repository::read().dead_links());
}

#[test]
fn files_and_tests_that_pages_name_exist() {
    let repository = Repository::read();
    assert_none(&[repository.missing_paths(), repository.missing_tests()].concat());
}

#[test]
fn pages_name_only_what_the_program_has() {
    let (repository, program) = read();
    let mut problems = Vec::new();
    for (name, page) in repository.pages.iter().filter(|(name, _)| *name != CHANGELOG) {
        // Refusals are quoted there, and are no commands.
        let quotes = name == TROUBLESHOOTING;
        let page: String = page
            .lines()
            .filter(|line| !quotes || !line.starts_with("| `podgate runs"))
            .flat_map(|line| [line, "\n"])
            .collect();
        problems.extend(program.problems(name, &page));
    }
    let manifest = repository.root.join("deploy/podgate.yaml");
    problems.extend(program.unknown(&fs::read_to_string(manifest).unwrap()));
    assert_none(&problems);
}

#[test]
fn renamed_names_are_gone_and_their_successors_are_there() {
    let (repository, program) = read();
    assert_none(&program.wrong_renames(repository.page(CHANGELOG)));
}

#[test]
fn every_setting_has_its_row_with_variable_and_default() {
    let (repository, program) = read();
    let run = program.command.find_subcommand("run").unwrap();
    let mut rows = BTreeMap::new();
    for table in tables(repository.page(CONFIGURATION)) {
        for (_, cells) in table.rows {
            if let Some(flag) = spans(&cells[0]).first().and_then(|span| names::flag(span)) {
                rows.insert(flag.to_owned(), (table.header.clone(), cells));
            }
        }
    }
    let mut problems = Vec::new();
    for argument in run.get_arguments() {
        let Some(flag) = argument.get_long().filter(|flag| *flag != "help") else { continue };
        let Some((header, cells)) = rows.remove(flag) else {
            problems.push(format!("{CONFIGURATION} has no row for --{flag}"));
            continue;
        };
        let variable = argument.get_env().and_then(|variable| variable.to_str()).unwrap_or_default();
        if spans(&cells[1]) != [variable] {
            problems.push(format!("{CONFIGURATION}: the variable of --{flag} is {variable}"));
        }
        let default =
            argument.get_default_values().first().and_then(|value| value.to_str()).unwrap_or_default();
        let shown = header.iter().position(|cell| cell == "default").map(|column| spans(&cells[column]));
        // A switch, or a setting without a default, says so in words.
        let is_in_words = default.is_empty() || !argument.get_action().takes_values();
        if !is_in_words && shown.is_some_and(|shown| shown != [default]) {
            problems.push(format!("{CONFIGURATION}: the default of --{flag} is {default}"));
        }
    }
    problems.extend(rows.keys().map(|flag| format!("{CONFIGURATION}: `podgate run` has no --{flag}")));
    assert_none(&problems);
}

#[test]
fn every_other_command_and_flag_is_documented() {
    let (repository, program) = read();
    let page = repository.page(CONFIGURATION);
    let mut problems = Vec::new();
    for command in commands::leaves(&program.command).iter().filter(|command| *command != "podgate run") {
        if !page.contains(&format!("`{command}")) {
            problems.push(format!("{CONFIGURATION} does not have `{command}`"));
        }
    }
    for flag in commands::flags(&program.command) {
        if flag != "help" && !page.contains(&format!("--{flag}")) {
            problems.push(format!("{CONFIGURATION} does not have --{flag}"));
        }
    }
    assert_none(&problems);
}

#[test]
fn every_metric_and_event_is_documented() {
    let (repository, program) = read();
    let mut rows = BTreeMap::new();
    let mut first_cells = BTreeSet::new();
    for table in tables(repository.page(METRICS)) {
        for (_, cells) in table.rows {
            first_cells.extend(spans(&cells[0]).into_iter().map(str::to_owned));
            if table.header[0] == "metric" {
                rows.insert(cells[0].trim_matches('`').to_owned(), cells[1].clone());
            }
        }
    }
    rows.insert("podgate_kernel_events_total".to_owned(), "counter".to_owned());
    assert_eq!(rows, program.metrics);
    let page = repository.page(METRICS);
    assert!(page.contains("`podgate_kernel_events_total`, counter, label `event`"));
    let left_out: Vec<_> = program.events.iter().filter(|event| !first_cells.contains(**event)).collect();
    assert!(left_out.is_empty(), "{METRICS} does not have {left_out:?}");
}

#[test]
fn labels_and_log_fields_are_those_of_the_program() {
    let (repository, program) = read();
    let is_in_sources = |span: &str| {
        program.events.contains(span)
            || program.sources.contains(&format!("\"{span}\""))
            || program.sources.contains(&format!("{span}:"))
            || program.sources.contains(&format!("{span} = "))
            || program.sources.contains(&format!("            {span},"))
    };
    let mut problems = Vec::new();
    for (name, header) in [(METRICS, None), (OPERATIONS, Some("target"))] {
        for table in tables(repository.page(name)) {
            if header.is_some_and(|header| table.header[0] != header) {
                continue;
            }
            for (line, cells) in table.rows {
                let words = cells.iter().flat_map(|cell| spans(cell)).filter(|span| {
                    !span.starts_with("podgate")
                        && span.chars().all(|c| c.is_ascii_lowercase() || matches!(c, '_' | '-' | '.'))
                        && !span.starts_with('-')
                });
                let unknown = words.filter(|word| !is_in_sources(word));
                problems.extend(unknown.map(|word| format!("{name}:{line}: {word} is not in the program")));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn every_annotation_is_documented() {
    let (repository, program) = read();
    let documented: BTreeSet<_> =
        names::annotations(repository.page(POLICY)).into_iter().map(str::to_owned).collect();
    assert_eq!(documented, program.annotations);
}

#[test]
fn every_map_is_documented() {
    let (repository, program) = read();
    let page = repository.page(OPERATIONS);
    let table = tables(page).into_iter().find(|table| table.header[0] == "pinned map").unwrap();
    for (line, cells) in &table.rows {
        for span in spans(&cells[0]) {
            assert!(program.maps.contains(span), "{OPERATIONS}:{line}: there is no map {span}");
        }
    }
    let all: BTreeSet<_> =
        blocks(page).iter().flat_map(|block| spans(&block.text)).map(str::to_owned).collect();
    let left_out: Vec<_> = program.maps.difference(&all).collect();
    assert!(left_out.is_empty(), "{OPERATIONS} does not have {left_out:?}");
}

#[test]
fn quoted_refusals_are_those_of_the_program() {
    let (repository, program) = read();
    let mut problems = Vec::new();
    for table in tables(repository.page(TROUBLESHOOTING)) {
        if table.header[0] != "it says" {
            continue;
        }
        for (line, cells) in table.rows {
            let pieces = spans(&cells[0]).into_iter().flat_map(|span| span.split('…')).map(str::trim);
            let unknown = pieces.filter(|piece| !program.sources.contains(piece));
            problems.extend(unknown.map(|piece| format!("{TROUBLESHOOTING}:{line}: nothing says {piece:?}")));
        }
    }
    assert_none(&problems);
}

#[test]
fn the_readme_names_the_manifest_and_both_commands() {
    let repository = Repository::read();
    let readme = repository.page("README.md");
    for named in ["deploy/podgate.yaml", "cargo xtask demo", "cargo xtask test"] {
        assert!(readme.contains(named), "{named}");
    }
}

mod planted {
    //! What is planted is found.

    use super::*;

    fn repository(pages: &[(&str, &str)]) -> Repository {
        let pages = pages.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        Repository { root: Repository::read().root, pages }
    }

    #[test]
    fn a_dead_link_or_anchor_is_found() {
        let pages = [
            (
                "README.md",
                "# One\n\n[a](docs/a.md#two), [b](docs/b.md), [c](#one), [d](docs/a.md#three), [e](no/file)\n",
            ),
            (
                "docs/a.md",
                "## Two\n\n[up](../README.md#one) [license](../LICENSE) [out](https://example.com)\n",
            ),
        ];
        let dead = repository(&pages).dead_links();
        let expected = ["docs/b.md", "docs/a.md#three", "no/file"];
        assert_eq!(dead, expected.map(|link| format!("README.md:3: {link} leads nowhere")));
    }

    #[test]
    fn a_missing_file_or_test_is_found() {
        let page = "Read `agent/src/lib.rs` and `agent/src/nothing.rs`.\n\n    cargo test -p agent --test golden --test silver\n";
        let repository = repository(&[("README.md", page)]);
        assert_eq!(repository.missing_paths(), ["README.md:1: there is no agent/src/nothing.rs"]);
        assert_eq!(repository.missing_tests(), ["README.md:3: there is no test silver"]);
    }

    #[test]
    fn a_name_that_the_program_has_not_is_found() {
        let program = Program::read(&Repository::read().root);
        for (text, problem) in [
            ("`--stock-agent`", "there is no --stock-agent"),
            ("`podgate run --stock-agent x`", "`run` has no --stock-agent"),
            ("`podgate stop`", "`podgate` has no command stop"),
            ("    kubectl exec POD -- podgate maps dump CLASSES", "there is no map CLASSES"),
            ("PODGATE_STOCK_AGENT", "PODGATE_STOCK_AGENT is not in the program"),
            ("podgate_foreign_tokens_total", "podgate_foreign_tokens_total is not in the program"),
            ("podgate_requests", "podgate_requests is not in the program"),
            ("podgate.dev/imds-v9", "podgate.dev/imds-v9 is not in the program"),
            ("`x{event=\"guard_dropped\"}`", "guard_dropped is not in the program"),
        ] {
            assert_eq!(program.problems("page.md", text), [format!("page.md:1: {problem}")], "{text}");
        }
    }

    #[test]
    fn a_name_that_was_not_renamed_is_found() {
        let program = Program::read(&Repository::read().root);
        for (table, old, new) in [
            ("flags: old", "--imds", "--imds"),
            ("settings in the log's first line (`config`): old", "imds_floor", "imds_floor"),
            ("fields of `podgate detach --json`: old", "netdev", "netdev"),
            ("fields in `podgate maps dump TICKETS`: old", "started_at_ns", "started_at_ns"),
            ("metrics: old", "podgate_requests_total", "podgate_requests_total"),
            ("maps: old", "TICKETS", "TICKETS"),
            ("labels of `podgate_credentials_fetches_total`: old", "priority", "priority"),
            ("labels of `podgate_handovers_total`: old", "successor", "successor"),
            ("fields of the log: old", "suppressed", "suppressed"),
        ] {
            let page = |old, new| format!("| {table} | new |\n|---|---|\n| `{old}` | `{new}` |\n");
            let still = format!("{CHANGELOG}:3: {old} is still in the program");
            assert_eq!(program.wrong_renames(&page(old, new)), [still], "{table}");
            let lacks = format!("{CHANGELOG}:3: no_such_name is not in the program");
            assert_eq!(program.wrong_renames(&page("no_old_name", "no_such_name")), [lacks], "{table}");
        }
    }

    #[test]
    fn names_that_the_program_has_are_fine() {
        let program = Program::read(&Repository::read().root);
        let page = "`--imds off`, `podgate whois --pid PID --json`, `PODGATE_IMDS`, `podgate_requests_total`, \
                    `podgate.dev/imds`, `event=\"denied\"`, `podgate maps dump POLICIES`, PODGATE_EBPF_OBJECT";
        assert_none(&program.problems("page.md", page));
    }
}
