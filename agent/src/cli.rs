//! The command line: what can be asked, and how the answer reads.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod ask;
pub mod detach;
pub mod maps;
mod probe;
pub mod run;
pub mod whois;

use crate::config::Flags;

/// Gives every pod of an EKS node the AWS credentials of its own service account.
#[derive(Debug, Parser)]
#[command(name = "podgate", arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this node.
    Run(Box<Flags>),
    /// Remove everything that podgate has made on this node: programs, maps, addresses, rules and the network interface.
    Detach(detach::Args),
    /// Ask this container's agent whether it lives or serves, as the kubelet does. 0 for yes.
    Probe(probe::Args),
    /// Tell which identity a process would get, and why.
    Whois(whois::Args),
    /// Print what the programs' pinned maps have in them.
    Maps(maps::Args),
    /// Print the version.
    Version,
}

// === impl Cli ===

impl Cli {
    /// Carries the command out. 0 for success, 1 for failure, 2 for what must be put right first.
    pub fn run(self) -> ExitCode {
        match self.command {
            Command::Run(flags) => run::run(&flags),
            Command::Detach(args) => detach::run(&args),
            Command::Probe(args) => probe::run(&args),
            Command::Whois(args) => whois::run(&args),
            Command::Maps(args) => maps::run(&args),
            Command::Version => {
                let abi = agent_common::abi::ABI_VERSION;
                println!("podgate {} (kernel interface v{abi})", env!("CARGO_PKG_VERSION"));
                #[cfg(feature = "undefended")]
                println!("{}", crate::undefended::warning());
                ExitCode::SUCCESS
            }
        }
    }
}

fn fail(error: &str) -> ExitCode {
    eprintln!("podgate: {error}");
    ExitCode::FAILURE
}
