//! The `podgate` binary: parses the command line, and leaves the rest to the library.

use std::process::ExitCode;

use agent::cli::Cli;
use clap::Parser as _;

fn main() -> ExitCode {
    Cli::parse().run()
}
