//! The toolchain of the kernel programs: a rustc with a `core` for BPF, and a linker that reads what it writes.
//!
//! Owns finding and installing both; never changes what is already on the machine. Packages come by apt-get on Debian
//! and its relatives; what rustup and cargo install goes below `target/tools`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use super::TARGET;
use crate::{
    apt,
    cmd::{self, Missing},
    setup::{Need, Source},
    workspace::{cargo_install, tools},
};

/// Version of bpf-linker.
const LINKER_VERSION: &str = "0.13.0";
/// The LLVM versions that this bpf-linker can be built for.
const LINKER_LLVM: [u32; 3] = [21, 22, 23];
/// Where cargo installs it.
const LINKER: &str = "bin/bpf-linker";
/// The name of the step that installs a compiler with rustup.
const NIGHTLY_STEP: &str = "Rust nightly with rust-src";
/// Debian's packages of a current Rust and of its `core` for BPF.
const RUST_PACKAGES: [&str; 3] = ["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf"];

/// A compiler for the kernel programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Toolchain {
    pub(super) rustc: PathBuf,
    /// The cargo that belongs to it.
    pub(super) cargo: PathBuf,
    /// Major version of its LLVM.
    pub(super) llvm: u32,
    /// It has only the source of `core`.
    pub(super) builds_core: bool,
}

/// The toolchain; installed first if there is none.
pub(super) fn ready() -> anyhow::Result<Toolchain> {
    if let Some(toolchain) = find() {
        return Ok(toolchain);
    }
    install()?;
    find().ok_or_else(|| Missing(instructions()).into())
}

/// What `ready` and `linker` would install.
pub(crate) fn missing() -> anyhow::Result<Vec<Need>> {
    let mut needs = Vec::new();
    let toolchain = find();
    if toolchain.is_none() {
        if apt::is_usable() && apt::knows(RUST_PACKAGES[0]) {
            let purpose = "the kernel programs (Rust with `core` for BPF)";
            needs.extend(RUST_PACKAGES.map(|package| Need::apt(package, purpose)));
        } else if has_rustup() {
            needs.push(Need {
                name: NIGHTLY_STEP.to_owned(),
                source: Source::Rustup,
                purpose: "the kernel programs".to_owned(),
                seconds: 60,
                mib: 700,
            });
        } else {
            return Err(Missing(instructions()).into());
        }
    }
    if toolchain.as_ref().and_then(|toolchain| built_linker(toolchain.llvm)).is_none() {
        let llvm = toolchain.map(|toolchain| toolchain.llvm).or_else(llvm_of_packages);
        if let Some(version) = llvm.filter(|version| find_llvm(*version).is_none()) {
            needs.push(Need::apt(format!("llvm-{version}-dev"), "building bpf-linker"));
        }
        needs.push(Need {
            name: llvm.map_or_else(|| format!("bpf-linker {LINKER_VERSION}"), linker_step),
            source: Source::Cargo,
            purpose: "linking the kernel programs".to_owned(),
            seconds: 60,
            mib: 300,
        });
    }
    Ok(needs)
}

/// The linker for this toolchain; built first if there is none.
pub(super) fn linker(toolchain: &Toolchain) -> anyhow::Result<PathBuf> {
    if let Some(linker) = built_linker(toolchain.llvm) {
        return Ok(linker);
    }
    let llvm = llvm_prefix(toolchain.llvm)?;
    cmd::run(
        &linker_step(toolchain.llvm),
        cargo_install("bpf-linker", LINKER_VERSION)
            .args(["--force", "--no-default-features", "--features", &format!("llvm-{}", toolchain.llvm)])
            .env("LLVM_PREFIX", llvm),
    )?;
    Ok(tools().join(LINKER))
}

/// The linker, if it is there and fits.
fn built_linker(llvm: u32) -> Option<PathBuf> {
    let root = tools();
    let record = fs::read_to_string(root.join(".crates2.json")).unwrap_or_default();
    let linker = root.join(LINKER);
    (linker.is_file() && is_built_for(&record, llvm)).then_some(linker)
}

fn linker_step(llvm: u32) -> String {
    format!("bpf-linker {LINKER_VERSION} for LLVM {llvm}")
}

/// The LLVM of the compiler that the packages would bring.
fn llvm_of_packages() -> Option<u32> {
    llvm_among(&apt::dependencies(RUST_PACKAGES[0]).ok()?)
}

fn llvm_among(dependencies: &str) -> Option<u32> {
    let mut packages = dependencies.split_whitespace();
    packages.find_map(|package| package.strip_prefix("libllvm")?.parse().ok())
}

/// Where compilers may be: the system's, and rustup's.
fn candidates() -> Vec<PathBuf> {
    let mut rustcs = vec![PathBuf::from("/usr/bin/rustc")];
    rustcs.extend(
        subdirectories(Path::new("/usr/lib"))
            .filter(|directory| {
                directory.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"rust"))
            })
            .map(|directory| directory.join("bin/rustc")),
    );
    for home in [rustup_home(), own_rustup_home()] {
        rustcs.extend(subdirectories(&home.join("toolchains")).map(|directory| directory.join("bin/rustc")));
    }
    rustcs.retain(|rustc| rustc.is_file());
    rustcs
}

/// The toolchain that this machine has.
fn find() -> Option<Toolchain> {
    choose(candidates().iter().filter_map(|rustc| {
        let version = cmd::ask(Command::new(rustc).arg("-vV")).ok()?;
        let sysroot = cmd::ask(Command::new(rustc).args(["--print", "sysroot"])).ok()?;
        judge(rustc, &version, Path::new(&sysroot))
    }))
}

/// The first that comes with `core` for BPF, else the first that can build it.
fn choose(usable: impl Iterator<Item = Toolchain>) -> Option<Toolchain> {
    let mut builds_core = None;
    for toolchain in usable {
        if !toolchain.builds_core {
            return Some(toolchain);
        }
        builds_core.get_or_insert(toolchain);
    }
    builds_core
}

/// What a compiler is good for, by what `-vV` says; `None` if it cannot build the programs.
fn judge(rustc: &Path, version: &str, sysroot: &Path) -> Option<Toolchain> {
    let cargo = rustc.with_file_name("cargo");
    let release = field(version, "release: ")?;
    let llvm = major(field(version, "LLVM version: ")?)?;
    if !cargo.is_file() || !is_new_enough(release) || !LINKER_LLVM.contains(&llvm) {
        return None;
    }
    let libraries = sysroot.join("lib/rustlib");
    let has_core = libraries.join(TARGET).join("lib").is_dir();
    let can_build_core = release.ends_with("-nightly") && libraries.join("src/rust/library/core").is_dir();
    (has_core || can_build_core).then(|| Toolchain {
        rustc: rustc.to_owned(),
        cargo,
        llvm,
        builds_core: !has_core,
    })
}

/// Installs a compiler, saying so first.
fn install() -> anyhow::Result<()> {
    if apt::is_usable() {
        match apt::install("a Rust compiler with `core` for BPF", &RUST_PACKAGES) {
            Ok(()) => return Ok(()),
            Err(error) if has_rustup() => eprintln!("{error:#}\ntrying rustup instead"),
            Err(error) => return Err(error),
        }
    }
    if has_rustup() {
        let home = own_rustup_home();
        eprintln!("installing with rustup, into {}: nightly with the source of `core`", home.display());
        return cmd::run(
            NIGHTLY_STEP,
            Command::new("rustup")
                .args(["toolchain", "install", "nightly", "--profile", "minimal", "--component", "rust-src"])
                .arg("--no-self-update")
                .env("RUSTUP_HOME", home)
                .env_remove("RUSTUP_TOOLCHAIN"),
        );
    }
    Err(Missing(instructions()).into())
}

/// The directory of LLVM's libraries and headers; installed first if there is none.
fn llvm_prefix(version: u32) -> anyhow::Result<PathBuf> {
    if let Some(prefix) = find_llvm(version) {
        return Ok(prefix);
    }
    let package = format!("llvm-{version}-dev");
    if apt::is_usable() {
        apt::install("LLVM, to build bpf-linker with", &[&package])?;
    }
    find_llvm(version).ok_or_else(|| {
        Missing(format!(
            "bpf-linker needs the libraries and headers of LLVM {version}. Install them, on Debian with\n    \
             sudo apt-get install --no-install-recommends {package}\n\
             elsewhere so that `llvm-config-{version}` or `llvm-config` is in PATH, and run this again"
        ))
        .into()
    })
}

fn find_llvm(version: u32) -> Option<PathBuf> {
    let programs = [
        format!("/usr/lib/llvm-{version}/bin/llvm-config"),
        format!("llvm-config-{version}"),
        "llvm-config".to_owned(),
    ];
    programs.iter().find_map(|program| {
        let found = cmd::ask(Command::new(program).arg("--version")).ok()?;
        let prefix = PathBuf::from(cmd::ask(Command::new(program).arg("--prefix")).ok()?);
        (major(&found) == Some(version) && prefix.join("include/llvm-c").is_dir()).then_some(prefix)
    })
}

/// What a person does on a machine that this command cannot set up.
fn instructions() -> String {
    let packages = RUST_PACKAGES.join(" ");
    format!(
        "building the kernel programs needs a Rust compiler for BPF, and this machine has none.\n\
         On Debian 12 or later:\n    sudo apt-get update\n    \
         sudo apt-get install --no-install-recommends {packages}\n\
         elsewhere, with rustup (https://rustup.rs):\n    \
         rustup toolchain install nightly --profile minimal --component rust-src\n\
         and run this again"
    )
}

/// Whether cargo's record says that the linker is of the right version, for this LLVM.
fn is_built_for(record: &str, llvm: u32) -> bool {
    let record: serde_json::Value = serde_json::from_str(record).unwrap_or_default();
    let package = format!("bpf-linker {LINKER_VERSION} ");
    let feature = format!("llvm-{llvm}");
    record["installs"].as_object().into_iter().flatten().any(|(name, install)| {
        name.starts_with(&package)
            && install["features"]
                .as_array()
                .is_some_and(|features| features.iter().any(|name| *name == *feature))
    })
}

/// Whether the workspace can be built with this release, such as `1.96.0` or `1.97.0-nightly`.
fn is_new_enough(release: &str) -> bool {
    let minor = |version: &str| {
        let mut parts = version.split('.').map(|part| part.parse::<u32>().ok());
        Some((parts.next()??, parts.next()??))
    };
    minor(release) >= minor(env!("CARGO_PKG_RUST_VERSION"))
}

fn field<'a>(version: &'a str, name: &str) -> Option<&'a str> {
    version.lines().find_map(|line| line.strip_prefix(name))
}

fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

fn has_rustup() -> bool {
    cmd::is_in_path("rustup")
}

/// Toolchains of podgate's own: the user's nightly is not updated for it.
fn own_rustup_home() -> PathBuf {
    tools().join("rustup")
}

fn rustup_home() -> PathBuf {
    env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(env::home_dir()?.join(".rustup")))
        .unwrap_or_default()
}

fn subdirectories(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CORE: &str = "bpfel-unknown-none/lib";
    const SOURCE: &str = "src/rust/library/core";

    /// A toolchain that says it is `release`, with `library` in its sysroot.
    fn judged(root: &Path, release: &str, llvm: &str, library: &str) -> Option<Toolchain> {
        let sysroot = root.join(release).join(llvm);
        fs::create_dir_all(sysroot.join("lib/rustlib").join(library)).unwrap();
        fs::create_dir_all(sysroot.join("bin")).unwrap();
        fs::write(sysroot.join("bin/cargo"), "").unwrap();
        let version = format!("rustc {release}\nrelease: {release}\nLLVM version: {llvm}");
        judge(&sysroot.join("bin/rustc"), &version, &sysroot)
    }

    #[test]
    fn a_compiler_is_judged_by_its_age_its_llvm_and_its_core() {
        let root = tempfile::tempdir().unwrap();
        for (release, llvm, library, expected) in [
            ("1.96.0", "22.1.8", CORE, Some((22, false))),
            ("1.95.0", "21.1.0", CORE, Some((21, false))),
            ("1.98.0-nightly", "23.1.0", SOURCE, Some((23, true))),
            ("1.96.1", "22.1.8", "x86_64-unknown-linux-gnu/lib", None),
            // Only a nightly builds `core`.
            ("1.96.2", "22.1.8", SOURCE, None),
            // Too old for the workspace, too new for the linker.
            ("1.94.0", "21.1.0", CORE, None),
            ("1.99.0", "24.1.0", CORE, None),
        ] {
            let toolchain = judged(root.path(), release, llvm, library);
            assert_eq!(toolchain.map(|found| (found.llvm, found.builds_core)), expected, "{release}");
        }
    }

    #[test]
    fn a_compiler_without_its_cargo_is_not_used() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("lib/rustlib").join(CORE)).unwrap();
        let version = "release: 1.96.0\nLLVM version: 22.1.8";
        assert_eq!(judge(&root.path().join("bin/rustc"), version, root.path()), None);
    }

    #[test]
    fn a_compiler_with_core_for_bpf_comes_before_a_nightly() {
        let root = tempfile::tempdir().unwrap();
        let debian = judged(root.path(), "1.96.0", "22.1.8", CORE);
        let nightly = judged(root.path(), "1.98.0-nightly", "23.1.0", SOURCE);
        assert_eq!(choose([nightly.clone(), debian.clone()].into_iter().flatten()), debian);
        assert_eq!(choose([nightly.clone()].into_iter().flatten()), nightly);
        assert_eq!(choose([].into_iter()), None);
    }

    #[test]
    fn the_llvm_of_a_compiler_is_found_among_its_dependencies() {
        let dependencies = "rustc-web\n  Depends: libc6\nlibstd-rust-web-1.96\n  Depends: libllvm22\n";
        assert_eq!(llvm_among(dependencies), Some(22));
        assert_eq!(llvm_among("rustc-web\n  Depends: libc6"), None);
    }

    #[test]
    fn a_linker_counts_only_for_its_llvm_and_version() {
        let record = |version, feature| {
            format!(r#"{{"installs":{{"bpf-linker {version} (registry+x)":{{"features":["{feature}"]}}}}}}"#)
        };
        assert!(is_built_for(&record(LINKER_VERSION, "llvm-22"), 22));
        assert!(!is_built_for(&record(LINKER_VERSION, "llvm-23"), 22));
        assert!(!is_built_for(&record("0.12.0", "llvm-22"), 22));
        assert!(!is_built_for("", 22));
    }

    #[test]
    fn releases_are_compared_as_numbers() {
        for (release, expected) in [
            ("1.95.0", true),
            ("1.100.0", true),
            ("2.0.0", true),
            ("1.97.0-nightly", true),
            ("1.9.0", false),
            ("?", false),
        ] {
            assert_eq!(is_new_enough(release), expected, "{release}");
        }
    }
}
