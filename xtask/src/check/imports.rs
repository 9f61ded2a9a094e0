//! What the modules of a crate import: read from the sources, and checked against the table in `import_rules`.
//!
//! Owns the reading of paths and the search for circles; never decides what is allowed. Tests may import anything, and
//! so they are left out. A parent may use its own children; a child that uses its parent, or a sibling, is an import.
//! In circles, who names a child's item by way of its parent, which uses it or offers it (`pub use`), imports the child.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    str::FromStr as _,
};

use anyhow::{Context as _, anyhow};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::{
    import_rules::{self, Rule, name},
    source_files::source_files,
};

/// A module as the segments of its path, without `crate`.
type Module = Vec<String>;

/// The modules of one crate, and the paths that each of them names.
#[derive(Debug, Default)]
pub(super) struct Crate {
    modules: BTreeMap<Module, BTreeSet<Vec<String>>>,
    /// The paths that others can name as if they were the module's own.
    uses: BTreeMap<Module, BTreeSet<Vec<String>>>,
}

/// One module uses another.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Import {
    from: Module,
    to: Module,
}

// === impl Crate ===

impl Crate {
    /// Reads every source file below `sources` but those of tests.
    pub(super) fn read(sources: &Path) -> anyhow::Result<Self> {
        let (mut modules, mut uses) = (BTreeMap::new(), BTreeMap::new());
        let is_of_tests = |path: &Path| path.file_stem().is_some_and(|name| name == "tests");
        for file in source_files(sources, &is_of_tests)? {
            let text =
                fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let tokens = TokenStream::from_str(&text)
                .map_err(|error| anyhow!("cannot read {} as Rust: {error}", file.display()))?;
            let module = module_of(file.strip_prefix(sources).unwrap_or(&file));
            let mut paths = BTreeSet::new();
            collect(use_items(&tokens), &[], &mut paths);
            uses.entry(module.clone()).or_insert_with(BTreeSet::new).append(&mut paths);
            collect(tokens, &[], &mut paths);
            // `lib.rs` and `main.rs` are one root.
            modules.entry(module).or_insert_with(BTreeSet::new).append(&mut paths);
        }
        Ok(Self { modules, uses })
    }

    /// Every circle of modules, as a line for a person.
    pub(super) fn circles(&self) -> Vec<String> {
        let mut imports: BTreeMap<&Module, BTreeSet<&Module>> = BTreeMap::new();
        let found = self.imports();
        for import in found.iter().filter(|import| !import.to.starts_with(&import.from)) {
            imports.entry(&import.from).or_default().insert(&import.to);
        }
        let reach = |from: &Module| {
            let mut seen = BTreeSet::new();
            let mut next: Vec<_> = imports.get(from).into_iter().flatten().copied().collect();
            while let Some(module) = next.pop() {
                if seen.insert(module) {
                    next.extend(imports.get(module).into_iter().flatten().copied());
                }
            }
            seen
        };
        let reachable: BTreeMap<_, _> = self.modules.keys().map(|module| (module, reach(module))).collect();
        let mut circles = BTreeSet::new();
        for (module, reached) in &reachable {
            if reached.contains(module) {
                let members = reached.iter().filter(|other| reachable[**other].contains(module));
                circles.insert(members.map(|member| name(member)).collect::<Vec<_>>());
            }
        }
        circles.iter().map(|members| format!("a circle of imports: {}", members.join(", "))).collect()
    }

    /// Every import and every capability that the table does not allow, as a line for a person.
    pub(super) fn violations(&self, rules: &[Rule]) -> Vec<String> {
        let mut violations = BTreeSet::new();
        for (module, paths) in &self.modules {
            let Some(rule) = import_rules::rule_of(rules, module) else {
                violations.insert(format!("{}: this module has no row in the table", name(module)));
                continue;
            };
            for to in paths.iter().filter_map(|path| self.resolve(module, path)) {
                if !rule.allows(module, &to) {
                    violations.insert(format!("{}: must not import {}", name(module), name(&to)));
                }
            }
            for path in paths {
                if let Some(capability) = import_rules::capability_of(path)
                    && !rule.may.contains(&capability)
                {
                    let path = path.join("::");
                    violations.insert(format!("{}: must not use {path} ({capability:?})", name(module)));
                }
            }
        }
        let known: BTreeSet<_> = self.modules.keys().map(|module| name(module)).collect();
        for rule in rules.iter().filter(|rule| !known.contains(rule.module)) {
            violations
                .insert(format!("{}: the table has a row for it, but there is no such module", rule.module));
        }
        violations.into_iter().collect()
    }

    fn imports(&self) -> BTreeSet<Import> {
        let mut imports = BTreeSet::new();
        for (from, paths) in &self.modules {
            for to in paths.iter().filter_map(|path| self.origin(from, path)) {
                imports.insert(Import { from: from.clone(), to });
            }
        }
        imports
    }

    /// The other module of this crate that has what a path in `module` names, whoever offers it under its own name.
    fn origin(&self, module: &Module, path: &[String]) -> Option<Module> {
        let offers = self.resolve(module, path)?;
        let uses = self.uses.get(&offers).into_iter().flatten();
        let origins = uses.filter(|used| used.last() == path.last());
        let origin =
            origins.filter_map(|used| self.resolve(&offers, used)).find(|origin| origin.len() > offers.len());
        let origin = origin.unwrap_or(offers);
        (origin != *module).then_some(origin)
    }

    /// The other module of this crate that a path in `module` leads to: the deepest one on its way.
    fn resolve(&self, module: &Module, path: &[String]) -> Option<Module> {
        let (mut at, rest) = match path.first()?.as_str() {
            "crate" => (Module::new(), &path[1..]),
            "self" => (module.clone(), &path[1..]),
            "super" => {
                let ups = path.iter().take_while(|segment| *segment == "super").count();
                (module[..module.len().checked_sub(ups)?].to_vec(), &path[ups..])
            }
            _ => (module.clone(), path),
        };
        for segment in rest {
            at.push(segment.clone());
            if !self.modules.contains_key(&at) {
                at.pop();
                break;
            }
        }
        (at != *module).then_some(at)
    }
}

/// Every path in these tokens that has two segments or more, those of `use` trees one by one. Macros are looked into;
/// what is compiled for tests alone is not.
fn collect(tokens: TokenStream, prefix: &[String], paths: &mut BTreeSet<Vec<String>>) {
    let tokens: Vec<_> = tokens.into_iter().collect();
    let mut at = 0;
    while at < tokens.len() {
        if is_test_only(&tokens[at..]) {
            at += item_len(&tokens[at..]);
            continue;
        }
        match &tokens[at] {
            // Another name for what was just imported.
            TokenTree::Ident(word) if word == "as" => at += 2,
            TokenTree::Ident(first) => at = path(first.to_string(), &tokens, at + 1, prefix, paths),
            TokenTree::Group(group) => {
                collect(group.stream(), &[], paths);
                at += 1;
            }
            _ => at += 1,
        }
    }
}

/// The `use` items of a module, by which others name what is not its own: its children whether they are public or not.
fn use_items(tokens: &TokenStream) -> TokenStream {
    let tokens: Vec<_> = tokens.clone().into_iter().collect();
    let mut uses = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let is_use = matches!(&tokens[at], TokenTree::Ident(ident) if ident == "use");
        let len = if is_use || is_test_only(&tokens[at..]) { item_len(&tokens[at..]) } else { 1 };
        if is_use {
            uses.extend_from_slice(&tokens[at..at + len]);
        }
        at += len;
    }
    uses.into_iter().collect()
}

/// Reads one path whose first segment is known, and whatever its braces hold. Where the tokens go on behind it.
fn path(
    first: String,
    tokens: &[TokenTree],
    mut at: usize,
    prefix: &[String],
    paths: &mut BTreeSet<Vec<String>>,
) -> usize {
    let mut segments = prefix.to_vec();
    if prefix.is_empty() || first != "self" {
        segments.push(first);
    }
    while is_path_separator(&tokens[at..]) {
        match tokens.get(at + 2) {
            Some(TokenTree::Ident(segment)) => {
                segments.push(segment.to_string());
                at += 3;
            }
            Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                collect(group.stream(), &segments, paths);
                return at + 3;
            }
            _ => {
                at += 2;
                break;
            }
        }
    }
    if segments.len() > 1 {
        paths.insert(segments);
    }
    at
}

fn is_path_separator(tokens: &[TokenTree]) -> bool {
    let is_colon =
        |token: Option<&TokenTree>| matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == ':');
    is_colon(tokens.first()) && is_colon(tokens.get(1))
}

/// Whether an attribute begins here that leaves what follows out of every build but those of tests.
fn is_test_only(tokens: &[TokenTree]) -> bool {
    let [TokenTree::Punct(hash), TokenTree::Group(attribute), ..] = tokens else { return false };
    let attribute = attribute.to_string().replace(' ', "");
    hash.as_char() == '#' && (attribute == "[cfg(test)]" || attribute.starts_with("[cfg(all(test"))
}

/// The length of the item that begins here, its attributes included.
fn item_len(tokens: &[TokenTree]) -> usize {
    let ends = |token: &TokenTree| match token {
        TokenTree::Punct(punct) => punct.as_char() == ';',
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        _ => false,
    };
    let is_use = tokens.iter().any(|token| matches!(token, TokenTree::Ident(ident) if ident == "use"))
        && !tokens.iter().take_while(|token| !ends(token)).any(|token| {
            matches!(token, TokenTree::Ident(ident) if ident == "fn" || ident == "mod" || ident == "impl")
        });
    let end = if is_use {
        tokens.iter().position(|token| matches!(token, TokenTree::Punct(punct) if punct.as_char() == ';'))
    } else {
        tokens.iter().position(ends)
    };
    end.map_or(tokens.len(), |end| end + 1)
}

/// The module that a file below the sources holds.
fn module_of(file: &Path) -> Module {
    let mut module: Module =
        file.with_extension("").iter().map(|segment| segment.to_string_lossy().into_owned()).collect();
    if let ["lib" | "main"] = module.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        module.clear();
    }
    module
}

#[cfg(test)]
mod tests {
    use super::{super::import_rules::Capability, *};

    /// A crate of these files.
    fn sources(files: &[(&str, &str)]) -> Crate {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Crate::read(root.path()).unwrap()
    }

    const RULES: &[Rule] = &[
        Rule { module: "a", imports: &["b"], may: &[Capability::Files] },
        Rule { module: "b", imports: &[], may: &[] },
    ];

    #[test]
    fn paths_are_found_wherever_they_are() {
        let text = "use std::{fs, net::{IpAddr, TcpStream}};\n\
                    use crate::{drain::Watch, intercept::{self, Origin},\n    serve};\n\
                    // aya::Ebpf is not named, nor is \"aya::Ebpf\"\n\
                    fn f() -> hyper::Result<()> { info!(x = crate::policy::decide::<kube::Client>()) }\n\
                    #[cfg(test)]\nuse aws_config::{load, b};\n\
                    #[cfg(test)]\nmod tests { use aws_config::load; }\n\
                    const AFTER: u8 = last::ONE;\n";
        let mut paths = BTreeSet::new();
        collect(TokenStream::from_str(text).unwrap(), &[], &mut paths);
        let paths: BTreeSet<_> = paths.iter().map(|path| path.join("::")).collect();
        for path in [
            "std::fs",
            "std::net::IpAddr",
            "std::net::TcpStream",
            "crate::drain::Watch",
            "crate::intercept",
            "crate::intercept::Origin",
            "crate::serve",
            "crate::policy::decide",
            "hyper::Result",
            "kube::Client",
            "last::ONE",
        ] {
            assert!(paths.contains(path), "{path}: {paths:?}");
        }
        assert!(!paths.iter().any(|path| path.starts_with("aya") || path.starts_with("aws")), "{paths:?}");
    }

    #[test]
    fn what_the_table_does_not_allow_is_reported() {
        let found = sources(&[
            ("a.rs", "use std::fs; use crate::b::B; use crate::c::C;"),
            ("b.rs", "fn f() { std::fs::read(\"x\") }"),
            ("c.rs", ""),
        ]);
        assert_eq!(
            found.violations(RULES),
            [
                "a: must not import c",
                "b: must not use std::fs::read (Files)",
                "c: this module has no row in the table",
            ]
        );
    }

    #[test]
    fn a_row_without_a_module_is_reported() {
        let found = sources(&[("a.rs", "")]);
        assert_eq!(found.violations(RULES), ["b: the table has a row for it, but there is no such module"]);
    }

    #[test]
    fn a_circle_is_found_across_files_and_levels() {
        let found = sources(&[
            ("a.rs", "mod one; use super::b::B;"),
            ("a/one.rs", "use crate::b::B;"),
            ("b.rs", "use crate::a::one::One;"),
        ]);
        assert_eq!(found.circles(), ["a circle of imports: a::one, b"]);
    }

    #[test]
    fn a_circle_is_found_through_what_a_parent_offers() {
        let text = |one| {
            sources(&[
                ("a.rs", one),
                ("a/one.rs", "use super::two::Two;"),
                ("a/two.rs", "use super::{A, One};"),
            ])
        };
        for offered in ["pub use self::one::One;", "pub(crate) use one::{One};", "use self::one::One;"] {
            assert_eq!(text(offered).circles(), ["a circle of imports: a::one, a::two"], "{offered}");
        }
        assert_eq!(text("#[cfg(test)]\nuse self::one::One;").circles(), [""; 0], "in tests alone");
    }

    #[test]
    fn parents_and_children_are_no_circle_unless_siblings_are() {
        let found = sources(&[("a.rs", "mod one; use self::one::One;"), ("a/one.rs", "use super::A;")]);
        assert_eq!(found.circles(), [""; 0]);
        let found = sources(&[
            ("a.rs", "mod one; mod two;"),
            ("a/one.rs", "use super::two::Two;"),
            ("a/two.rs", "use super::one::One;"),
        ]);
        assert_eq!(found.circles(), ["a circle of imports: a::one, a::two"]);
    }
}
