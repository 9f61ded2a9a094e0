//! `podgate probe`: the kubelet's probes, answered by this container's own agent.
//!
//! Not over TCP: the predecessor listens there until this one takes over, and would answer in its place.

use std::{path::PathBuf, process::ExitCode};

use super::{ask::ask, fail};
use crate::config::DEFAULT_SOCKET;

/// What to ask.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Whether the agent lives, or also serves pods.
    what: What,
    /// The agent's socket.
    #[arg(long, env = "PODGATE_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum What {
    Live,
    Ready,
}

/// Asks and prints.
pub(super) fn run(args: &Args) -> ExitCode {
    let path = match args.what {
        What::Live => "/livez",
        What::Ready => "/readyz",
    };
    match ask(&args.socket, path) {
        Ok(answer) => println!("{answer}"),
        Err(error) => return fail(&error),
    }
    ExitCode::SUCCESS
}
