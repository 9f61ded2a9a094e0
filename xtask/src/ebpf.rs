//! `cargo xtask build-ebpf`: the kernel programs, and the agent with them inside.
//!
//! Owns how both are built and where; never what they do. The toolchain is found or set up by `toolchain`.

mod toolchain;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use agent_common::abi::program;
use anyhow::{Context as _, anyhow, bail};
use aya::{EbpfLoader, programs::Program};

use self::toolchain::Toolchain;
use crate::{cmd, report};

/// The target of the programs. Little-endian, as every node of EKS.
const TARGET: &str = "bpfel-unknown-none";
/// What `agent/build.rs` reads.
const OBJECT_VARIABLE: &str = "PODGATE_EBPF_OBJECT";

/// The compiled programs.
#[derive(Debug)]
pub(crate) struct Object {
    /// The ELF file.
    pub(crate) path: PathBuf,
}

/// Builds the programs and shows what came out.
pub(crate) fn command() -> anyhow::Result<()> {
    let object = build_object()?;
    let bytes = fs::read(&object.path).with_context(|| format!("cannot read {}", object.path.display()))?;
    let is_root = nix::unistd::geteuid().is_root();
    let mut table = report::table(&["program", "instructions in the object", "instructions verified"]);
    let verified =
        if is_root { verified(&bytes)? } else { vec!["only root can ask the kernel".to_owned(); 4] };
    for ((name, count), verified) in instructions(&bytes)?.into_iter().zip(verified) {
        table.add_row([name.to_owned(), count.to_string(), verified]);
    }
    println!("{table}");
    println!("{}: {} KiB with debug information", object.path.display(), bytes.len() / 1024);
    Ok(())
}

/// Builds the programs. Quick when nothing has changed.
pub(crate) fn build_object() -> anyhow::Result<Object> {
    let toolchain = toolchain::ready()?;
    let linker = toolchain::linker(&toolchain)?;
    let target_directory = target_directory().join("ebpf");
    cmd::run("eBPF programs", &mut build_command(&toolchain, &linker, &target_directory))?;
    let path = target_directory.join(TARGET).join("ebpf/podgate-ebpf");
    if !path.is_file() {
        bail!("BUG: cargo succeeded, but there is no {}", path.display());
    }
    Ok(Object { path })
}

/// Builds the agent with the object inside; the path of the `podgate` binary.
pub(crate) fn build_agent(object: &Object, release: bool) -> anyhow::Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--package", "agent", "--bin", "podgate"]).env(OBJECT_VARIABLE, &object.path);
    let profile = if release { "release" } else { "debug" };
    if release {
        command.arg("--release");
    }
    cmd::run(&format!("podgate ({profile})"), &mut command)?;
    Ok(target_directory().join(profile).join("podgate"))
}

/// Builds the programs and the agent that people run.
pub(crate) fn build_release_agent() -> anyhow::Result<PathBuf> {
    build_agent(&build_object()?, true)
}

/// The cargo that runs this command, working on the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// The workspace.
pub(crate) fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Where cargo and this command put what they make.
pub(crate) fn target_directory() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |directory| root().join(directory))
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
fn instructions(object: &[u8]) -> anyhow::Result<Vec<(&'static str, usize)>> {
    let object = aya_obj::Object::parse(object).context("the object cannot be read")?;
    let count =
        |name| Some(object.functions.get(&object.programs.get(name)?.function_key())?.instructions.len());
    let find = |name| Ok((name, count(name).ok_or_else(|| anyhow!("the object has no program {name}"))?));
    program::ALL.into_iter().map(find).collect()
}

/// How many instructions the kernel's verifier went through for each program. Loads them, attaches nothing.
fn verified(object: &[u8]) -> anyhow::Result<Vec<String>> {
    let mut ebpf = EbpfLoader::new().load(object).context("the kernel does not take the object's maps")?;
    let mut verify = |name| -> anyhow::Result<String> {
        let program = ebpf.program_mut(name).ok_or_else(|| anyhow!("the object has no program {name}"))?;
        let loaded = match program {
            Program::CgroupSockAddr(program) => program.load().and_then(|()| program.info()),
            Program::SockOps(program) => program.load().and_then(|()| program.info()),
            _ => bail!("the program {name} is of an unknown type"),
        };
        let info = loaded.with_context(|| format!("the kernel does not take the program {name}"))?;
        let count = info.verified_instruction_count();
        Ok(count.map_or_else(|| "this kernel does not say".to_owned(), |count| count.to_string()))
    };
    program::ALL.into_iter().map(&mut verify).collect()
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
