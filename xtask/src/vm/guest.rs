//! The first process of the virtual machine: mounts what the tests need, runs them, says how they ended.
//!
//! Owns everything inside the machine and powers it off in the end. Never runs anywhere else.

use std::{
    convert::Infallible,
    fs,
    process::{self, Command, Stdio},
};

use anyhow::{Context as _, bail};
use clap::Args;
use nix::{
    mount::{MsFlags, mount},
    sys::reboot::{RebootMode, reboot},
};

use crate::{
    ebpf::{self, Counts},
    report,
};

/// The last line of the console if everything is well.
pub(crate) const SUCCESS: &str = "vm: success";

/// Directories of the initramfs.
pub(super) const DIRECTORIES: [&str; 5] = ["dev", "proc", "run", "sys", "tmp"];
/// Files of the initramfs: this program, the kernel tests, the object that they have inside, and its budget.
pub(super) const INIT: &str = "init";
pub(super) const TESTS: &str = "kernel-tests";
pub(super) const OBJECT: &str = "podgate-ebpf";
pub(super) const BUDGET: &str = "ebpf-budget.toml";
/// And for attacks: both builds of the agent.
pub(super) const PODGATE: &str = "podgate";
pub(super) const UNDEFENDED: &str = "podgate-undefended";
/// The directory of the kernel's modules, which are loaded in the order of their names.
pub(super) const MODULES: &str = "modules";

/// Where programs of this machine are in the virtual one: where they are here.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// The argument of a machine that runs no tests: [`GuestArguments::measure`].
pub(super) const MEASURE: &str = "--measure";
/// Begins the console's lines of such a machine: a program's name and its instructions follow.
const MEASURED: &str = "measured: ";

/// The argument of a machine that runs attacks: [`GuestArguments::attack`].
pub(super) const ATTACK: &str = "--attack";
/// The argument of one that runs all of them in every mode: [`GuestArguments::all`].
pub(super) const ALL: &str = "--all";
/// Begins the console's line with the rows of attacks, in JSON.
pub(super) const ATTACKED: &str = "attacked: ";
/// `MODULE_INIT_COMPRESSED_FILE` of `include/uapi/linux/module.h`: the kernel decompresses it itself, since Linux 5.17.
const COMPRESSED: i32 = 4;

/// What is mounted, in this order: type and place.
const MOUNTS: [(&str, &str); 7] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("bpf", "/sys/fs/bpf"),
    ("cgroup2", "/sys/fs/cgroup"),
];

/// What the machine is for.
#[derive(Debug, Args)]
pub(crate) struct GuestArguments {
    /// Say how many instructions the verifier goes through, and run no tests.
    #[arg(long)]
    measure: bool,
    /// Run the attacks whose names contain this, and no tests.
    #[arg(long)]
    attack: Option<String>,
    /// Run them in every mode.
    #[arg(long, requires = "attack")]
    all: bool,
}

/// Runs the machine from its start to its end.
pub(crate) fn run(arguments: &GuestArguments) -> anyhow::Result<Infallible> {
    if process::id() != 1 {
        bail!("this is the first process of a virtual machine, and nothing else: it powers the machine off");
    }
    match work(arguments) {
        Ok(()) => println!("{SUCCESS}"),
        Err(error) => println!("vm: {error:#}"),
    }
    reboot(RebootMode::RB_POWER_OFF).context("cannot power off")
}

/// What such a machine has measured, from its console.
pub(super) fn measured(console: &str) -> Counts {
    let lines = console.lines().filter_map(|line| line.trim_end().strip_prefix(MEASURED)?.split_once(' '));
    lines.filter_map(|(name, count)| Some((name.to_owned(), count.parse().ok()?))).collect()
}

fn work(arguments: &GuestArguments) -> anyhow::Result<()> {
    for (kind, place) in MOUNTS {
        mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {kind} at {place}"))?;
    }
    load_modules()?;
    if let Some(only) = &arguments.attack {
        return attack(only, arguments.all);
    }
    let read = |name: &str| fs::read(format!("/{name}")).with_context(|| format!("cannot read {name}"));
    let object = read(OBJECT)?;
    if arguments.measure {
        for (name, count) in ebpf::verified(&object)? {
            println!("{MEASURED}{name} {count}");
        }
        return Ok(());
    }
    let release =
        fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel's name")?;
    println!("{}", report::heading(format_args!("kernel {}", release.trim_end())));
    let within_budget = ebpf::check_budget(&object, &String::from_utf8(read(BUDGET)?)?);
    let mut tests = Command::new(format!("/{TESTS}"));
    let status = tests.env("PATH", PATH).status().context("cannot run the tests")?;
    if !status.success() {
        bail!("the tests ended with {status}");
    }
    within_budget
}

fn load_modules() -> anyhow::Result<()> {
    let mut modules: Vec<_> = fs::read_dir(format!("/{MODULES}"))?.collect::<Result<_, _>>()?;
    modules.sort_by_key(fs::DirEntry::file_name);
    for module in modules {
        let path = module.path();
        let flags = if path.extension().is_some_and(|suffix| suffix == "xz") { COMPRESSED } else { 0 };
        let loaded = fs::File::open(&path).map(|file| rustix::system::finit_module(file, c"", flags));
        loaded?.with_context(|| format!("cannot load {}", path.display()))?;
    }
    Ok(())
}

/// Runs attacks on both builds of the agent. That there are rows is all that counts here: the caller reads them.
fn attack(only: &str, all: bool) -> anyhow::Result<()> {
    let [podgate, undefended] = [PODGATE, UNDEFENDED].map(|name| format!("/{name}"));
    let mut attacks = Command::new(format!("/{INIT}"));
    attacks.args(["attack", "--json", "--only", only, "--agents", &podgate, &undefended]);
    if all {
        attacks.arg(ALL);
    }
    let output =
        attacks.env("PATH", PATH).stderr(Stdio::inherit()).output().context("cannot run the attacks")?;
    let rows: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("the attacks have printed no rows")?;
    println!("{ATTACKED}{rows}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_is_found_among_kernel_messages() {
        let console = "[    0.1] Linux\r\nmeasured: active 12\r\nmeasured: connect4 345\r\nvm: success\r\n";
        assert_eq!(measured(console), [("active".to_owned(), 12), ("connect4".to_owned(), 345)].into());
    }
}
