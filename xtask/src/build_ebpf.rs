//! `cargo xtask build-ebpf`: builds the kernel programs and shows their sizes.
//!
//! Owns the command. How the programs are built and counted is `ebpf`'s.

use std::time::Duration;

use crate::{
    bpftool,
    ebpf::{self, Counts},
    privilege, report,
    setup::{Build, Plan},
    vm,
};

/// Builds the programs. With `bless`, what the kernels' verifiers say becomes the budget.
pub(crate) fn run(bless: bool) -> anyhow::Result<()> {
    if bless {
        privilege::require_root("asking the kernel's verifier")?;
    }
    let mut plan = Plan::new("The kernel programs.", Duration::from_secs(if bless { 300 } else { 5 }))
        .needs(ebpf::missing_tools()?)
        .builds([Build::KernelPrograms]);
    if bless {
        plan = plan.needs(vm::missing(&vm::Kernel::ALL)).needs(bpftool::missing()).builds([Build::VmTests]);
    }
    plan.begin()?;
    let object = ebpf::build_object()?;
    let bytes = object.read()?;
    let mut table = report::table(&["program", "instructions in the object"]);
    for (name, count) in ebpf::instructions(&bytes)? {
        table.add_row([name.to_owned(), count.to_string()]);
    }
    println!("{table}");
    println!("{}: {} KiB with debug information", object.path.display(), bytes.len() / 1024);
    if bless {
        return ebpf::bless_budget(&bytes, &counts_in_machines()?);
    }
    if privilege::is_root() {
        return ebpf::check_workspace_budget_of(&bytes);
    }
    println!("Only root can ask the kernel's verifier how many instructions it goes through.");
    Ok(())
}

/// What the verifiers of the virtual machines' kernels say.
fn counts_in_machines() -> anyhow::Result<Vec<(&'static str, Counts)>> {
    vm::Kernel::ALL.into_iter().map(|kernel| Ok((kernel.series(), vm::measure(kernel)?))).collect()
}
