//! The `podgate-undefended` binary: podgate for the suite of attacks, in which defenses can be switched off. It is in no
//! image and no package.

use std::process::ExitCode;

use agent::cli::Cli;
use clap::Parser as _;

fn main() -> ExitCode {
    Cli::parse().run()
}
