//! podgate's developer commands: `cargo xtask COMMAND`.
//!
//! Owns the command line. Each command is a module of its own.

mod apt;
mod attack;
mod bench;
mod bpftool;
mod build_ebpf;
mod check;
mod clients;
mod closed_output;
mod cmd;
mod conformance;
mod demo;
mod disk;
#[cfg(test)]
mod documents;
mod ebpf;
mod fuzz;
mod initramfs;
mod lab;
mod mutants;
mod privilege;
mod report;
mod setup;
mod test;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Something must be installed first.
const EXIT_MISSING: u8 = 2;

/// podgate's developer commands. Each says first what it will install, build and take.
#[derive(Debug, Parser)]
#[command(name = "xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build the kernel programs, setting up their toolchain if it is missing.
    BuildEbpf {
        /// Make what the verifier goes through the budget: of this kernel and those of the virtual machines.
        #[arg(long)]
        bless: bool,
    },
    /// Check formatting, lints, documentation, dependencies and the import rules.
    Check,
    /// Show real clients getting their own role on a simulated node.
    Demo {
        /// Print the rows as JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Attack podgate, and show that each attack works where podgate's defense is missing.
    Attack(attack::Arguments),
    /// Put real SDKs and tools, old and new, into every situation that podgate puts them in.
    Conformance(conformance::Arguments),
    /// Run the tests, all tiers or one, each within its time budget.
    Test {
        /// Run this tier only.
        #[arg(long, value_enum)]
        tier: Option<test::Tier>,
        /// Run the kernel tests in a virtual machine with this kernel only.
        #[arg(long, value_enum, value_name = "KERNEL", conflicts_with = "tier")]
        vm: Option<vm::Kernel>,
        /// Run the tests whose names contain one of these only; options of the test binaries are passed on, too.
        #[arg(last = true, value_name = "FILTER")]
        filters: Vec<String>,
    },
    /// Feed random inputs to every parser of external data.
    Fuzz(fuzz::Arguments),
    /// Show that the tests of the credential cache catch bugs, by applying patches to a copy of the workspace.
    Mutants(mutants::Arguments),
    /// Start, enter, break and stop simulated nodes.
    #[command(subcommand)]
    Lab(lab::Command),
    /// Measure.
    Bench(bench::Arguments),
    /// Run a command where ENTRY (JSON) says.
    #[command(name = ::lab::enter::SUBCOMMAND, hide = true)]
    LabEnter {
        entry: String,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Do nothing until killed.
    #[command(name = ::lab::enter::PAUSE_SUBCOMMAND, hide = true)]
    LabPause,
    /// Run a lab until told to stop.
    #[command(hide = true)]
    LabServe(lab::ServeArguments),
    /// Answer every request with the same bytes.
    #[command(hide = true)]
    BenchServer(bench::ServerArguments),
    /// Send requests and report how long each took.
    #[command(hide = true)]
    BenchLoad(bench::LoadArguments),
    /// Be the attacker in a pod: do what ACT (JSON) says.
    #[command(name = attack::SUBCOMMAND, hide = true)]
    Attacker { act: String },
    /// Be one end of plain TCP connections.
    #[command(hide = true)]
    BenchTraffic(bench::TrafficArguments),
    /// Be the first process of a virtual machine.
    #[command(hide = true)]
    VmInit(vm::GuestArguments),
}

fn main() -> ExitCode {
    cmd::start_clock();
    let arguments = Arguments::parse();
    closed_output::catch(|| match run(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{} {error:#}", report::failure("error:"));
            if error.is::<cmd::Missing>() { ExitCode::from(EXIT_MISSING) } else { ExitCode::FAILURE }
        }
    })
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::BuildEbpf { bless } => build_ebpf::run(bless)?,
        Command::Check => check::run()?,
        Command::Demo { json } => return demo::run(json),
        Command::Attack(arguments) => return attack::run(&arguments),
        Command::Conformance(arguments) => return conformance::run(&arguments),
        Command::Test { tier, vm, filters } => {
            return test::run(tier.or(vm.map(test::Tier::from)), &filters);
        }
        Command::Fuzz(arguments) => return fuzz::run(&arguments),
        Command::Mutants(arguments) => {
            return Ok(if mutants::run(&arguments)? { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Command::Lab(command) => lab::run(command)?,
        Command::Bench(arguments) => bench::run(&arguments)?,
        Command::LabEnter { entry, command } => {
            match ::lab::enter::enter(&serde_json::from_str(&entry)?, &command)? {}
        }
        Command::LabPause => ::lab::enter::pause(),
        Command::LabServe(arguments) => lab::serve(&arguments)?,
        Command::Attacker { act } => attack::act(&act)?,
        Command::BenchServer(arguments) => bench::serve(&arguments)?,
        Command::BenchLoad(arguments) => bench::load(&arguments)?,
        Command::BenchTraffic(arguments) => bench::traffic(&arguments)?,
        Command::VmInit(arguments) => match vm::run_guest(&arguments)? {},
    }
    Ok(ExitCode::SUCCESS)
}
