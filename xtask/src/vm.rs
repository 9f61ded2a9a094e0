//! The kernel tests and the attacks on other kernels: Debian's cloud kernels in QEMU, without an installed system.
//!
//! Owns the virtual machine: its kernel, its initramfs, its command line. What happens inside is `guest`'s; who runs
//! it, watches it and counts the tests is the caller.

mod guest;
mod image;
mod libraries;

use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead as _, BufReader},
    panic::resume_unwind,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, bail};
use clap::ValueEnum;

pub(crate) use self::guest::{GuestArguments, SUCCESS, run as run_guest};
use self::image::Image;
use crate::{
    apt, bpftool, clients, cmd,
    ebpf::{self, Counts},
    initramfs::Initramfs,
    setup::{Need, Source},
    workspace,
};

/// The program that emulates the machine, and its package.
const QEMU: &str = "qemu-system-x86_64";
const QEMU_PACKAGE: &str = "qemu-system-x86";
/// This program's hidden command that is the machine's first process.
const INIT_COMMAND: &str = "vm-init";

/// How long a machine may take that runs no tests, in seconds.
const MEASURE_SECONDS: &str = "60";
/// How long all attacks may take on an emulated machine, in seconds: each once, and in every mode.
const ATTACK_SECONDS: &str = "1800";
const ATTACK_ALL_SECONDS: &str = "10800";
/// The system's authorities, without which the agent does not call AWS.
const AUTHORITIES: &str = "etc/ssl/certs/ca-certificates.crt";
/// What of Debian's kernels simulated nodes need, each after what it needs itself: netdevs, filters on them, and the
/// translation of addresses.
const MODULES: [&str; 21] = [
    "drivers/net/veth",
    "drivers/net/dummy",
    "drivers/net/macvlan",
    "drivers/net/ipvlan/ipvlan",
    "net/llc/llc",
    "net/802/stp",
    "net/bridge/bridge",
    "net/sched/sch_ingress",
    "net/sched/cls_bpf",
    "lib/libcrc32c",
    "net/ipv4/netfilter/nf_defrag_ipv4",
    "net/ipv6/netfilter/nf_defrag_ipv6",
    "net/netfilter/nf_conntrack",
    "net/netfilter/nf_nat",
    "net/netfilter/nfnetlink",
    "net/netfilter/nf_tables",
    "net/netfilter/nft_nat",
    "net/netfilter/nft_chain_nat",
    "net/netfilter/nft_masq",
    "net/netfilter/ipvs/ip_vs",
    "net/netfilter/ipvs/ip_vs_rr",
];

/// A kernel to test on: Amazon Linux 2023 has both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernel {
    /// The oldest that podgate supports.
    #[value(name = "6.1")]
    V6_1,
    /// The next with long-term support that Amazon Linux has.
    #[value(name = "6.12")]
    V6_12,
}

/// A file of the machine: where it is there, and where it is here.
type File = (PathBuf, PathBuf);

// === impl Kernel ===

impl Kernel {
    /// Every kernel.
    pub(crate) const ALL: [Self; 2] = [Self::V6_1, Self::V6_12];

    /// Its series, as people call it.
    pub(crate) fn series(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }

    /// Debian's package that always depends on the newest image.
    fn package(self) -> &'static str {
        match self {
            Self::V6_1 => "linux-image-cloud-amd64",
            Self::V6_12 => "linux-image-6.12-cloud-amd64",
        }
    }
}

/// Gets everything that the machine needs; the command that boots it, runs the kernel tests and powers it off. Its
/// console is the command's standard output, and has the line [`SUCCESS`] if all is well.
pub(crate) fn prepare_tests(kernel: Kernel) -> anyhow::Result<Command> {
    let image = image(kernel)?;
    boot(kernel, &image, test_files()?, "")
}

/// Asks the kernel's verifier how many instructions it goes through for each program.
pub(crate) fn measure(kernel: Kernel) -> anyhow::Result<Counts> {
    let qemu = boot(kernel, &image(kernel)?, test_files()?, guest::MEASURE)?;
    eprintln!("  kernel {} …", kernel.series());
    let mut limited = Command::new("timeout");
    let console = cmd::ask(limited.arg(MEASURE_SECONDS).arg(qemu.get_program()).args(qemu.get_args()))?;
    if !console.lines().any(|line| line.trim_end() == SUCCESS) {
        bail!("the virtual machine with kernel {} did not measure anything:\n{console}", kernel.series());
    }
    Ok(guest::measured(&console))
}

/// Runs the attacks whose names contain `only` in virtual machines side by side, each of which has one of this machine's
/// processors and shows its progress; the rows of each as JSON.
pub(crate) fn attack(kernels: &[Kernel], only: &str, all: bool) -> anyhow::Result<Vec<(Kernel, String)>> {
    let files = attack_files()?;
    let machines =
        kernels.iter().map(|&kernel| Ok((kernel, prepare_attacks(kernel, files.clone(), only, all)?)));
    let machines: Vec<_> = machines.collect::<anyhow::Result<_>>()?;
    thread::scope(|scope| {
        let start = |(kernel, machine)| scope.spawn(move || Ok((kernel, watch_attacks(kernel, machine)?)));
        let running: Vec<_> = machines.into_iter().map(start).collect();
        let ended =
            |run: thread::ScopedJoinHandle<'_, _>| run.join().unwrap_or_else(|panic| resume_unwind(panic));
        running.into_iter().map(ended).collect()
    })
}

fn prepare_attacks(kernel: Kernel, files: Vec<File>, only: &str, all: bool) -> anyhow::Result<Command> {
    let image = image(kernel)?;
    let (everything, seconds) = if all { (guest::ALL, ATTACK_ALL_SECONDS) } else { ("", ATTACK_SECONDS) };
    let qemu = boot(kernel, &image, files, &format!("{}={only} {everything}", guest::ATTACK))?;
    let mut limited = Command::new("timeout");
    limited.arg(seconds).arg(qemu.get_program()).args(qemu.get_args());
    limited.stdin(Stdio::null()).stdout(Stdio::piped());
    Ok(limited)
}

fn watch_attacks(kernel: Kernel, mut machine: Command) -> anyhow::Result<String> {
    let mut machine = machine.spawn().context("cannot start the virtual machine")?;
    let console = machine.stdout.take().context("BUG: the console is not a pipe")?;
    let mut rows = None;
    for line in BufReader::new(console).lines() {
        let line = line.context("cannot read the console")?;
        match line.trim_end().strip_prefix(guest::ATTACKED) {
            Some(found) => rows = Some(found.to_owned()),
            None => eprintln!("{:<5} {line}", kernel.series()),
        }
    }
    machine.wait()?;
    rows.with_context(|| {
        format!("the virtual machine with kernel {} did not finish the attacks", kernel.series())
    })
}

/// What these machines need and this one has not.
pub(crate) fn missing(kernels: &[Kernel]) -> Vec<Need> {
    let directory = workspace::target_directory().join("vm");
    let mut needs = Vec::new();
    if !cmd::is_in_path(QEMU) {
        needs.push(Need::apt(QEMU_PACKAGE, "the virtual machines"));
    }
    let images = kernels.iter().filter(|kernel| !image::is_unpacked(kernel.package(), &directory));
    needs.extend(images.map(|kernel| Need {
        name: format!("kernel {}", kernel.series()),
        source: Source::AptDownload,
        purpose: "the virtual machines".to_owned(),
        seconds: 20,
        mib: 200,
    }));
    needs
}

/// Gets the kernel, and what emulates a machine for it.
fn image(kernel: Kernel) -> anyhow::Result<Image> {
    if env::consts::ARCH != "x86_64" {
        bail!(
            "the virtual machine's kernels and tests are for x86-64, and this machine is {}",
            env::consts::ARCH
        );
    }
    let directory = workspace::target_directory().join("vm");
    fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    if !cmd::is_in_path(QEMU) {
        if !apt::is_usable() {
            let missing = format!("{QEMU} is not installed: it is in Debian's package {QEMU_PACKAGE}");
            return Err(cmd::Missing(missing).into());
        }
        apt::install("the virtual machine", &[QEMU_PACKAGE])?;
    }
    image::get(kernel.package(), &directory)
}

/// The kernel tests, and what they need.
fn test_files() -> anyhow::Result<Vec<File>> {
    let object = ebpf::build_object()?.path;
    let own = [
        (guest::INIT, env::current_exe()?),
        (guest::TESTS, build_tests(&object)?),
        (guest::OBJECT, object),
        (guest::BUDGET, workspace::root().join(ebpf::BUDGET)),
    ];
    let mut files: Vec<File> = own.map(|(name, path)| (name.into(), path)).into();
    files.push(in_place(bpftool::path()?));
    files.push(in_place(clients::packet_filter()?));
    Ok(files)
}

/// Both builds of the agent, this program, and what loads rules into packet filters.
fn attack_files() -> anyhow::Result<Vec<File>> {
    let files = [
        (guest::INIT, env::current_exe()?),
        (guest::PODGATE, ebpf::build_agent()?),
        (guest::UNDEFENDED, ebpf::build_undefended_agent()?),
        (AUTHORITIES, Path::new("/").join(AUTHORITIES)),
    ];
    let mut files: Vec<File> = files.map(|(name, path)| (name.into(), path)).into();
    files.push(in_place(clients::packet_filter()?));
    Ok(files)
}

/// Builds the kernel tests as they run on this machine, too; the path of the program.
fn build_tests(object: &Path) -> anyhow::Result<PathBuf> {
    let build = || {
        let mut build = workspace::cargo();
        build
            .args([
                "test",
                "--no-run",
                "--package",
                "agent",
                "--features",
                "kernel-tests",
                "--test",
                "kernel",
            ])
            .env(ebpf::OBJECT_VARIABLE, object);
        build
    };
    cmd::run("kernel tests", &mut build())?;
    // Nothing is left to do but to say where everything is.
    let messages = cmd::ask(build().args(["--quiet", "--message-format", "json"]))?;
    executable(&messages, "kernel")
}

/// A file that is in the machine where it is here.
fn in_place(path: PathBuf) -> File {
    (path.strip_prefix("/").unwrap_or(&path).to_owned(), path)
}

/// The program of the target `name` in cargo's messages.
fn executable(messages: &str, name: &str) -> anyhow::Result<PathBuf> {
    let mut executables = messages.lines().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let executable = message["executable"].as_str()?;
        (message["target"]["name"] == name).then(|| executable.into())
    });
    executables.next_back().with_context(|| format!("BUG: cargo has built no {name}"))
}

fn pack(files: &[File]) -> anyhow::Result<Vec<u8>> {
    let parents = files.iter().flat_map(|(name, _)| name.ancestors().skip(1));
    // Sorted: each after the one it is in.
    let directories: BTreeSet<_> = parents.chain(guest::DIRECTORIES.map(Path::new)).collect();
    let mut initramfs = Initramfs::default();
    for directory in directories.into_iter().filter(|directory| *directory != Path::new("")) {
        initramfs.directory(&directory.to_string_lossy())?;
    }
    for (name, path) in files {
        let content = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        initramfs.file(&name.to_string_lossy(), &content)?;
    }
    initramfs.finish()
}

/// A kernel that gets stuck or finds itself broken panics; a panic is a reboot, and a reboot ends QEMU. What the kernel
/// does not know, it gives to the first process: `NAME=VALUE` as environment, and what comes after `--` as arguments.
fn boot(kernel: Kernel, image: &Image, mut files: Vec<File>, arguments: &str) -> anyhow::Result<Command> {
    let programs: Vec<_> = files.iter().map(|(_, path)| path.as_path()).collect();
    let libraries = libraries::of(&programs)?;
    files.extend(libraries.into_iter().map(in_place));
    for (place, module) in MODULES.into_iter().enumerate() {
        let file = image.module(module)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        // They are loaded in the order of their names.
        files.push((Path::new(guest::MODULES).join(format!("{place:02}-{name}")), file));
    }
    let initramfs = workspace::target_directory().join(format!("vm/{}.cpio", kernel.series()));
    fs::write(&initramfs, pack(&files)?).with_context(|| format!("cannot write {}", initramfs.display()))?;
    let mut qemu = Command::new(QEMU);
    let append = format!(
        "console=ttyS0 quiet oops=panic softlockup_panic=1 hung_task_panic=1 panic=-1 rdinit=/{} \
         NO_COLOR=1 -- {INIT_COMMAND} {arguments}",
        guest::INIT
    );
    qemu.args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"])
        // Emulated: hardware virtualisation within virtual machines is not to be relied on.
        .args(["-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", "2048"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &append]);
    Ok(qemu)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_program_of_that_name_is_taken() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"kernel"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"xtask"},"executable":"/target/xtask"}
{"reason":"compiler-artifact","target":{"name":"kernel"},"executable":"/target/kernel-0123"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "kernel").unwrap(), Path::new("/target/kernel-0123"));
        assert!(executable(messages, "podgate").is_err());
    }
}
