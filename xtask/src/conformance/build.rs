//! Getting the clients onto the machine: the languages from the system's packages, the rest from the languages' own
//! registries into `target/clients`.
//!
//! Owns when a client is built again: when its manifest or its program has changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
};

use anyhow::Context as _;

use super::catalog::{Client, Language};
use crate::{
    apt, cmd,
    setup::{Need, Source},
    workspace,
};

/// How many are built at once: what they wait for is mostly the network.
const AT_ONCE: usize = 2;
/// What a build was made from; it is there once the build is complete.
const STAMP: &str = "built-from";
const PROGRAMS: &str = "xtask/clients";

/// A client that can be run, or why it cannot.
pub(super) type Built = Result<Vec<String>, String>;

/// A program that a language needs, and the Debian packages that bring it.
struct Tool {
    probe: &'static [&'static str],
    packages: &'static [&'static str],
}

/// What the clients need and this machine has not: their languages, and themselves.
pub(super) fn missing(clients: &[&'static Client]) -> Vec<Need> {
    let languages: BTreeSet<Language> = clients.iter().map(|client| client.language).collect();
    let packages = languages.into_iter().flat_map(|language| {
        let purpose = format!("the clients in {}", language.name());
        language.missing().into_iter().map(move |package| Need::apt(package, &purpose))
    });
    let mut needs: Vec<_> = packages.collect();
    let unbuilt = clients.iter().filter(|client| {
        !matches!(client.language, Language::Ruby | Language::Shell)
            && !workspace::target_directory().join("clients").join(client.name).join(STAMP).exists()
    });
    needs.extend(unbuilt.map(|client| Need {
        name: client.name.to_owned(),
        source: Source::Registries,
        purpose: format!("the conformance run ({})", client.language.name()),
        seconds: 15,
        mib: 100,
    }));
    needs
}

/// Installs what is missing and builds the clients; the command of each, in their order.
pub(super) fn build(clients: &[&'static Client]) -> Vec<Built> {
    let mut languages: BTreeMap<Language, Result<(), String>> =
        clients.iter().map(|client| (client.language, Ok(()))).collect();
    for (language, ready) in &mut languages {
        *ready = language.install();
    }
    let queue = Mutex::new(clients.iter().enumerate());
    let built = Mutex::new(BTreeMap::new());
    let next = || queue.lock().ok()?.next();
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((index, client)) = next() {
                    let command = languages[&client.language].clone().and_then(|()| client.command());
                    if let Ok(mut built) = built.lock() {
                        built.insert(index, command);
                    }
                }
            });
        }
    });
    built.into_inner().unwrap_or_default().into_values().collect()
}

// === impl Client ===

impl Client {
    /// Builds it unless it is built already; how to run it.
    fn command(&self) -> Built {
        let built = self.build();
        built.inspect_err(|error| eprintln!("{error:#}")).map_err(|error| {
            let text = format!("{error:#}");
            text.lines().next().unwrap_or_default().to_owned()
        })
    }

    fn build(&self) -> anyhow::Result<Vec<String>> {
        let directory = workspace::target_directory().join("clients").join(self.name);
        let stamp = directory.join(STAMP);
        let sources = self.sources()?;
        let made_from = made_from(&sources);
        if fs::read_to_string(&stamp).ok().as_ref() != Some(&made_from) {
            if directory.exists() {
                fs::remove_dir_all(&directory)
                    .with_context(|| format!("cannot remove {}", directory.display()))?;
            }
            for (path, text) in &sources {
                let path = directory.join(path);
                fs::create_dir_all(path.parent().unwrap_or(&directory))?;
                fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            }
            self.language.build(self.name, &directory)?;
            fs::write(&stamp, made_from)?;
        }
        self.language.argv(self.name, &directory)
    }

    /// Its files by their paths: those of the client that it is like, and its own.
    fn sources(&self) -> anyhow::Result<BTreeMap<PathBuf, String>> {
        let mut sources = BTreeMap::new();
        for name in self.like.into_iter().chain([self.name]) {
            let directory = workspace::root().join(PROGRAMS).join(name);
            read_files(&directory, Path::new(""), &mut sources)
                .with_context(|| format!("cannot read {}", directory.display()))?;
        }
        Ok(sources)
    }
}

// === impl Language ===

impl Language {
    fn tools(self) -> &'static [Tool] {
        match self {
            Self::Go => &[Tool { probe: &["go", "version"], packages: &["golang-go"] }],
            Self::Java => &[
                Tool { probe: &["javac", "-version"], packages: &["default-jdk-headless"] },
                Tool { probe: &["mvn", "--version"], packages: &["maven"] },
            ],
            Self::Node => &[
                Tool { probe: &["node", "--version"], packages: &["nodejs"] },
                Tool { probe: &["npm", "--version"], packages: &["npm"] },
            ],
            Self::Python => &[Tool {
                probe: &["python3", "-c", "import ensurepip, venv"],
                packages: &["python3", "python3-venv"],
            }],
            // The gem as Debian packages it: no registry is needed.
            Self::Ruby => {
                &[Tool { probe: &["ruby", "-e", "require 'aws-sdk-core'"], packages: &["ruby-aws-sdk-core"] }]
            }
            // Its toolchain has built this command.
            Self::Rust => &[],
            Self::Shell => &[Tool { probe: &["curl", "--version"], packages: &["curl"] }],
        }
    }

    /// Its packages that this system has not.
    fn missing(self) -> Vec<&'static str> {
        let missing = self.tools().iter().filter(|tool| !cmd::succeeds(tool.probe));
        missing.flat_map(|tool| tool.packages).copied().collect()
    }

    /// Installs what is missing.
    fn install(self) -> Result<(), String> {
        let missing = self.missing();
        if missing.is_empty() {
            return Ok(());
        }
        if !apt::is_usable() {
            return Err(format!(
                "install {} with this system's package manager, on Debian as {}",
                self.name(),
                missing.join(" ")
            ));
        }
        apt::install(&format!("the clients in {}", self.name()), &missing)
            .map_err(|error| format!("{error:#}"))
    }

    fn name(self) -> &'static str {
        match self {
            Self::Go => "Go",
            Self::Java => "Java",
            Self::Node => "JavaScript",
            Self::Python => "Python",
            Self::Ruby => "Ruby",
            Self::Rust => "Rust",
            Self::Shell => "shell",
        }
    }

    /// Runs the language's own package manager in the directory that has the manifest.
    fn build(self, name: &str, directory: &Path) -> anyhow::Result<()> {
        let run = |program: &str, arguments: &[&str]| {
            cmd::run(name, Command::new(program).args(arguments).current_dir(directory))
        };
        match self {
            Self::Ruby | Self::Shell => Ok(()),
            Self::Go => run("go", &["build", "-mod=mod", "-o", "client", "."]),
            Self::Java => run(
                "mvn",
                &[
                    "--quiet",
                    "--batch-mode",
                    "compile",
                    "org.apache.maven.plugins:maven-dependency-plugin:3.6.1:copy-dependencies",
                    "-DincludeScope=runtime",
                ],
            ),
            Self::Node => run("npm", &["install", "--no-audit", "--no-fund", "--no-package-lock"]),
            Self::Python => {
                cmd::run(
                    &format!("{name}, its environment"),
                    Command::new("python3").args(["-m", "venv", "venv"]).current_dir(directory),
                )?;
                let mut pip = Command::new(directory.join("venv/bin/python"));
                pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]);
                cmd::run(name, pip.args(["-r", "requirements.txt"]).current_dir(directory))
            }
            // One directory for all: what they have in common is built once.
            Self::Rust => cmd::run(
                name,
                workspace::cargo()
                    .current_dir(directory)
                    .args(["build", "--target-dir"])
                    .arg(rust_directory())
                    .env("CARGO_PROFILE_DEV_DEBUG", "false"),
            ),
        }
    }

    /// How a built client is run.
    fn argv(self, name: &str, directory: &Path) -> anyhow::Result<Vec<String>> {
        // A pod's PATH need not have what ours has.
        let program = |program: &str| {
            cmd::find_in_path(program).with_context(|| format!("there is no {program} in PATH"))
        };
        let file = |path: &str| directory.join(path);
        let argv: Vec<PathBuf> = match self {
            Self::Go => vec![file("client")],
            Self::Java => {
                let classes = format!("{0}/target/classes:{0}/target/dependency/*", directory.display());
                // A pod has little memory, and the clients are short-lived.
                let options = ["-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx128m", "-cp"];
                let mut argv = vec![program("java")?];
                argv.extend(options.map(PathBuf::from));
                argv.extend([classes, "Main".to_owned()].map(PathBuf::from));
                argv
            }
            Self::Node => vec![program("node")?, file("main.js")],
            Self::Python => vec![file("venv/bin/python"), file("main.py")],
            Self::Ruby => vec![program("ruby")?, file("main.rb")],
            Self::Rust => vec![rust_directory().join("debug").join(name)],
            Self::Shell => vec![program("sh")?, file("main.sh")],
        };
        Ok(argv.iter().map(|word| word.display().to_string()).collect())
    }
}

fn rust_directory() -> PathBuf {
    workspace::target_directory().join("clients/rust")
}

/// Everything that decides what a build comes to.
fn made_from(sources: &BTreeMap<PathBuf, String>) -> String {
    let parts = sources.iter().map(|(path, text)| format!("=== {}\n{text}", path.display()));
    parts.collect::<Vec<_>>().join("\n")
}

fn read_files(root: &Path, below: &Path, files: &mut BTreeMap<PathBuf, String>) -> anyhow::Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            read_files(root, &path, files)?;
        } else {
            files.insert(path, fs::read_to_string(entry.path())?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::catalog::CLIENTS;

    #[test]
    fn every_client_has_a_program_and_a_manifest() {
        for client in CLIENTS {
            let sources = client.sources().unwrap();
            let files: &[&str] = match client.language {
                Language::Go => &["main.go", "go.mod"],
                Language::Java => &["src/main/java/Main.java", "pom.xml"],
                Language::Node => &["main.js", "package.json"],
                Language::Python => &["main.py", "requirements.txt"],
                Language::Ruby => &["main.rb"],
                Language::Rust => &["src/main.rs", "Cargo.toml"],
                Language::Shell => &["main.sh"],
            };
            for file in files {
                assert!(sources.contains_key(Path::new(file)), "{}: {file}", client.name);
            }
        }
    }

    #[test]
    fn every_program_belongs_to_a_client() {
        let of_clients: Vec<_> = CLIENTS.iter().map(|client| client.name).collect();
        for entry in fs::read_dir(workspace::root().join(PROGRAMS)).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                let name = entry.file_name().into_string().unwrap();
                assert!(of_clients.contains(&name.as_str()), "{name}");
            }
        }
    }

    #[test]
    fn a_client_is_built_again_when_its_sdk_or_the_program_it_shares_changes() {
        let before = BTreeMap::from([(PathBuf::from("main.py"), "a".to_owned())]);
        for after in [
            BTreeMap::from([(PathBuf::from("main.py"), "b".to_owned())]),
            BTreeMap::from([(PathBuf::from("main.rb"), "a".to_owned())]),
            BTreeMap::from([(PathBuf::from("main.py"), "a".to_owned()), (PathBuf::from("x"), String::new())]),
        ] {
            assert_ne!(made_from(&before), made_from(&after));
        }
        assert_eq!(made_from(&before), made_from(&before.clone()));
    }
}
