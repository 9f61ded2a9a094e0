//! `podgate maps`: what the pinned maps have in them, with the agent up or down.

use std::{
    io::{self, BufWriter, ErrorKind, Write as _},
    path::PathBuf,
    process::ExitCode,
};

use clap::Subcommand;

use crate::mapdump::{self, Error, Format};

/// What to print, and how.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    /// Where bpffs is mounted.
    #[arg(long, env = "PODGATE_BPFFS", default_value = "/sys/fs/bpf", global = true)]
    bpffs: PathBuf,
    /// Print JSON.
    #[arg(short, long, global = true)]
    json: bool,
    /// Print JSON with line breaks.
    #[arg(short, long, global = true)]
    pretty: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Print what the kernel says of every map, as `bpftool map list` does.
    List,
    /// Print what the kernel says of one map, as `bpftool map show` does.
    Show {
        /// Name of the map: TICKETS, POLICIES, …
        name: String,
    },
    /// Print every entry of a map, as `bpftool map dump` does. Live tickets and keys read `***`.
    Dump {
        /// Name of the map: TICKETS, POLICIES, …
        name: String,
    },
}

/// Reads and prints.
pub fn run(args: &Args) -> ExitCode {
    let format = match args {
        Args { pretty: true, .. } => Format::Pretty,
        Args { json: true, .. } => Format::Json,
        _ => Format::Plain,
    };
    let mut out = BufWriter::new(io::stdout().lock());
    let result = match &args.command {
        Command::List => mapdump::list(&args.bpffs, format, &mut out),
        Command::Show { name } => mapdump::show(&args.bpffs, name, format, &mut out),
        Command::Dump { name } => mapdump::dump(&args.bpffs, name, format, &mut out),
    };
    match result.and(out.flush().map_err(Error::Output)) {
        Ok(()) => ExitCode::SUCCESS,
        // `podgate maps dump TICKETS | head`
        Err(Error::Output(error)) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podgate: {error}");
            ExitCode::from(error.exit_status())
        }
    }
}
