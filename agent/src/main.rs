//! The `podgate` binary: parses the command line and leaves the rest to the library.

use std::process::ExitCode;

use agent::cli::Cli;
use clap::Parser as _;

#[cfg(all(feature = "undefended", not(debug_assertions)))]
compile_error!("this binary is deployed: the feature `undefended` is for `podgate-undefended` only");

fn main() -> ExitCode {
    Cli::parse().run()
}
