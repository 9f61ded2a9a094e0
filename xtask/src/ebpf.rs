//! The kernel programs, and the agent with them inside.
//!
//! Owns how both are built and where; never what they do. The toolchain is found or set up by `toolchain`.

mod budget;
mod toolchain;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use agent_common::abi::{global, program};
use anyhow::{Context as _, anyhow, bail};
use aya::{EbpfLoader, programs::Program};

use self::{budget::Budget, toolchain::Toolchain};
pub(crate) use self::{budget::Counts, toolchain::missing as missing_tools};
use crate::{
    cmd,
    workspace::{cargo, root, target_directory},
};

/// The target of the programs. Little-endian, as every node of EKS.
const TARGET: &str = "bpfel-unknown-none";
/// What `agent/build.rs` reads.
pub(crate) const OBJECT_VARIABLE: &str = "PODGATE_EBPF_OBJECT";
/// Cargo chooses the features of dependencies by the packages that are selected. With this crate among them, the agent of
/// simulated nodes shares its dependencies with this crate and with all tests; `xtask/Cargo.toml` has the other half.
const SELECTION: [&str; 4] = ["--package", "agent", "--package", "xtask"];
/// The programs' budget of instructions, in the workspace.
pub(crate) const BUDGET: &str = ".ci/ebpf-budget.toml";
/// Where the kubepods cgroup usually is: one below the root of the hierarchy.
const KUBEPODS_LEVEL: u32 = 1;

/// The compiled programs.
#[derive(Debug)]
pub(crate) struct Object {
    /// The ELF file.
    pub(crate) path: PathBuf,
}

/// Compares what the running kernel's verifier goes through with a budget.
pub(crate) fn check_budget(object: &[u8], budget: &str) -> anyhow::Result<()> {
    Budget::parse(budget)?.check(&kernel_series()?, &verified(object)?)
}

/// The same with the workspace's budget.
pub(crate) fn check_workspace_budget_of(object: &[u8]) -> anyhow::Result<()> {
    check_budget(object, &read_budget()?)
}

/// The same with the workspace's programs and budget.
pub(crate) fn check_workspace_budget() -> anyhow::Result<()> {
    check_workspace_budget_of(&build_object()?.read()?)
}

/// Makes what the verifiers of this kernel and of `others`, by their series, say the budget.
pub(crate) fn bless_budget(object: &[u8], others: &[(&'static str, Counts)]) -> anyhow::Result<()> {
    let mut budget = Budget::parse(&read_budget()?)?;
    budget.bless(&kernel_series()?, verified(object)?);
    for (series, counts) in others {
        budget.bless(series, counts.clone());
    }
    fs::write(root().join(BUDGET), budget.to_toml()).with_context(|| format!("cannot write {BUDGET}"))?;
    println!("{BUDGET} is what the verifiers say now.");
    Ok(())
}

// === impl Object ===

impl Object {
    /// Its bytes.
    pub(crate) fn read(&self) -> anyhow::Result<Vec<u8>> {
        fs::read(&self.path).with_context(|| format!("cannot read {}", self.path.display()))
    }
}

/// Builds the programs. Quick when nothing has changed.
pub(crate) fn build_object() -> anyhow::Result<Object> {
    build_object_with(&[], "ebpf")
}

/// Builds the programs in which defenses can be switched off.
pub(crate) fn build_undefended_object() -> anyhow::Result<Object> {
    build_object_with(&["--features", "undefended"], "ebpf-undefended")
}

fn build_object_with(arguments: &[&str], directory: &str) -> anyhow::Result<Object> {
    let toolchain = toolchain::ready()?;
    let linker = toolchain::linker(&toolchain)?;
    let target_directory = target_directory().join(directory);
    let mut build = build_command(&toolchain, &linker, &target_directory);
    cmd::run(&format!("eBPF programs ({directory})"), build.args(arguments))?;
    let path = target_directory.join(TARGET).join("ebpf/podgate-ebpf");
    if !path.is_file() {
        bail!("BUG: cargo succeeded, but there is no {}", path.display());
    }
    Ok(Object { path })
}

/// Builds the programs and the agent of simulated nodes; the path of the `podgate` binary.
pub(crate) fn build_agent() -> anyhow::Result<PathBuf> {
    build_binary("podgate", &[], &build_object()?)
}

/// The same with defenses that can be switched off, those of the programs included.
pub(crate) fn build_undefended_agent() -> anyhow::Result<PathBuf> {
    build_binary("podgate-undefended", &["--features", "undefended"], &build_undefended_object()?)
}

/// Builds the agent as it is in an image.
pub(crate) fn build_release_agent() -> anyhow::Result<PathBuf> {
    let object = build_object()?;
    let mut command = cargo();
    command.args(["build", "--release", "--package", "agent", "--bin", "podgate"]);
    cmd::run("podgate (release)", command.env(OBJECT_VARIABLE, &object.path))?;
    Ok(target_directory().join("release/podgate"))
}

fn build_binary(name: &str, features: &[&str], object: &Object) -> anyhow::Result<PathBuf> {
    let mut command = cargo();
    command.arg("build").args(SELECTION).args(features).args(["--bin", name]);
    cmd::run(name, command.env(OBJECT_VARIABLE, &object.path))?;
    Ok(target_directory().join("debug").join(name))
}

/// The build of the programs, independent of the cargo that runs this command.
fn build_command(toolchain: &Toolchain, linker: &Path, target_directory: &Path) -> Command {
    let mut command = Command::new(&toolchain.cargo);
    command.current_dir(root());
    // What rustup and cargo leave in the environment is about another toolchain.
    for variable in
        ["RUSTUP_TOOLCHAIN", "CARGO", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER"]
    {
        command.env_remove(variable);
    }
    command
        .env("RUSTC", &toolchain.rustc)
        // A variable of its own, so that the build script learns which linker it is.
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker)
        // Type information: for bpftool, and for the maps.
        .env("RUSTFLAGS", "-C debuginfo=2 -C link-arg=--btf")
        // aya-ebpf needs BPF assembly, which is unstable.
        .env("RUSTC_BOOTSTRAP", "1")
        .args(["build", "--package", "agent-ebpf", "--bin", "podgate-ebpf", "--profile", "ebpf"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(target_directory);
    if toolchain.builds_core {
        command.arg("-Zbuild-std=core");
    }
    command
}

/// The programs and their sizes, in the order in which they are attached.
pub(crate) fn instructions(object: &[u8]) -> anyhow::Result<Vec<(&'static str, usize)>> {
    let object = aya_obj::Object::parse(object).context("the object cannot be read")?;
    let count =
        |name| Some(object.functions.get(&object.programs.get(name)?.function_key())?.instructions.len());
    let find = |name| Ok((name, count(name).ok_or_else(|| anyhow!("the object has no program {name}"))?));
    program::ALL.into_iter().map(find).collect()
}

/// How many instructions the kernel's verifier went through for each program. Loads them, attaches nothing.
pub(crate) fn verified(object: &[u8]) -> anyhow::Result<Counts> {
    // The verifier knows the globals' values: they must be like those of a real node.
    let mut ebpf = EbpfLoader::new()
        .override_global(global::KUBEPODS_LEVEL, &KUBEPODS_LEVEL, true)
        // The debugging log is off.
        .override_global(global::LOG_LEVEL, &0_u8, true)
        .load(object)
        .context("the kernel does not take the object's maps")?;
    let mut verify = |name| -> anyhow::Result<_> {
        let program = ebpf.program_mut(name).ok_or_else(|| anyhow!("the object has no program {name}"))?;
        let loaded = match program {
            Program::CgroupSockAddr(program) => program.load().and_then(|()| program.info()),
            Program::SockOps(program) => program.load().and_then(|()| program.info()),
            Program::CgroupSkb(program) => program.load().and_then(|()| program.info()),
            Program::SkLookup(program) => program.load().and_then(|()| program.info()),
            Program::SchedClassifier(program) => program.load().and_then(|()| program.info()),
            _ => bail!("the program {name} is of an unknown type"),
        };
        let info = loaded.with_context(|| format!("the kernel does not take the program {name}"))?;
        // Since Linux 5.16.
        let count = info.verified_instruction_count().context("the kernel does not count instructions")?;
        Ok((name.to_owned(), count))
    };
    program::ALL.into_iter().map(&mut verify).collect()
}

/// The running kernel's major and minor version.
fn kernel_series() -> anyhow::Result<String> {
    let version = procfs::sys::kernel::Version::current().context("cannot read the kernel's version")?;
    Ok(format!("{}.{}", version.major, version.minor))
}

fn read_budget() -> anyhow::Result<String> {
    fs::read_to_string(root().join(BUDGET)).with_context(|| format!("cannot read {BUDGET}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_does_not_inherit_the_calling_toolchain() {
        let toolchain =
            Toolchain { rustc: "/x/rustc".into(), cargo: "/x/cargo".into(), llvm: 22, builds_core: false };
        let command = build_command(&toolchain, Path::new("/l"), Path::new("/t"));
        assert_eq!(command.get_program(), "/x/cargo");
        let set = |name: &str, value| command.get_envs().any(|variable| variable == (name.as_ref(), value));
        assert!(set("RUSTC", Some("/x/rustc".as_ref())));
        for variable in ["RUSTUP_TOOLCHAIN", "CARGO", "CARGO_ENCODED_RUSTFLAGS"] {
            assert!(set(variable, None), "{variable}");
        }
        assert!(!command.get_args().any(|argument| argument == "-Zbuild-std=core"));

        let command =
            build_command(&Toolchain { builds_core: true, ..toolchain }, Path::new("/l"), Path::new("/t"));
        assert!(command.get_args().any(|argument| argument == "-Zbuild-std=core"));
    }

    #[test]
    fn something_that_is_no_object_is_an_error() {
        assert!(instructions(b"not ELF").is_err());
    }
}
