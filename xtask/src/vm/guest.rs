//! The first process of the virtual machine: mounts what the tests need, runs them, says how they ended.
//!
//! Owns everything inside the machine and powers it off in the end. Never runs anywhere else.

use std::{
    convert::Infallible,
    fs,
    process::{self, Command},
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

/// Where programs of this machine are in the virtual one: where they are here.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// The argument of a machine that runs no tests: [`GuestArguments::measure`].
pub(super) const MEASURE: &str = "--measure";
/// Begins the console's lines of such a machine: a program's name and its instructions follow.
const MEASURED: &str = "measured: ";

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_is_found_among_the_kernel_s_messages() {
        let console = "[    0.1] Linux\r\nmeasured: active 12\r\nmeasured: connect4 345\r\nvm: success\r\n";
        assert_eq!(measured(console), [("active".to_owned(), 12), ("connect4".to_owned(), 345)].into());
    }
}
