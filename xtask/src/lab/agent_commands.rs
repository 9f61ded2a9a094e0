//! The agent of a running lab: its process, its log, its metrics, its binary's other commands.
//!
//! Owns the arguments, and following the log; the lab's process starts and stops the agent.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    path::PathBuf,
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use clap::{Args, Subcommand};
use lab::{
    enter,
    remote_control::{self, AgentTool, NewAgent, Request},
    state,
};

use super::{LabName, running};
use crate::{
    ebpf,
    setup::{Build, Plan},
};

/// How often a followed log is read.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(200);
/// What starting an agent takes.
const START_TAKES: Duration = Duration::from_secs(5);

#[derive(Debug, Subcommand)]
pub(crate) enum AgentCommand {
    /// Start the agent and wait until it serves.
    Start(StartArguments),
    /// Ask the agent to stop and wait for it.
    Stop {
        #[command(flatten)]
        lab: LabName,
    },
    /// Kill the agent, as the kernel does when memory is short.
    Kill {
        #[command(flatten)]
        lab: LabName,
    },
    /// Stop the agent, if it runs, and start it again.
    Restart(StartArguments),
}

#[derive(Debug, Args)]
pub(crate) struct StartArguments {
    #[command(flatten)]
    lab: LabName,
    /// Build the agent from the sources first.
    #[arg(long)]
    build: bool,
    /// Flags of `podgate run`, such as `--imds deny`. They replace earlier ones of the same name; others stay.
    #[arg(last = true)]
    flags: Vec<String>,
}

/// Starts, stops, kills or restarts.
pub(super) fn agent(command: AgentCommand) -> anyhow::Result<()> {
    match command {
        AgentCommand::Start(arguments) => start(arguments, Request::StartAgent),
        AgentCommand::Restart(arguments) => start(arguments, Request::RestartAgent),
        AgentCommand::Stop { lab } => {
            let status: String = remote_control::ask(&lab.name, &Request::StopAgent)?;
            println!("the agent has stopped ({status})");
            Ok(())
        }
        AgentCommand::Kill { lab } => {
            let status: String = remote_control::ask(&lab.name, &Request::KillAgent)?;
            println!("the agent is killed ({status})");
            Ok(())
        }
    }
}

fn start(arguments: StartArguments, request: fn(NewAgent) -> Request) -> anyhow::Result<()> {
    // Before anything is built.
    running(&arguments.lab.name)?;
    let binary = arguments.build.then(|| build(&arguments.lab.name)).transpose()?;
    let flags = (!arguments.flags.is_empty()).then_some(arguments.flags);
    let pid: u32 = remote_control::ask(&arguments.lab.name, &request(NewAgent { binary, flags }))?;
    println!("the agent serves, process {pid}");
    Ok(())
}

/// Says what will be installed and built, and builds the agent.
fn build(lab: &str) -> anyhow::Result<PathBuf> {
    Plan::new(&format!("Builds podgate and starts it in the lab {lab}."), START_TAKES)
        .needs(ebpf::missing_tools()?)
        .builds([Build::KernelPrograms, Build::Agent])
        .begin()?;
    ebpf::build_agent()
}

/// Turns this process into a command of the agent's binary.
pub(super) fn podgate(lab: &str, command: &[String]) -> anyhow::Result<()> {
    let AgentTool { entry, binary } = remote_control::ask(lab, &Request::AgentTool)?;
    let argv: Vec<_> = std::iter::once(binary.display().to_string()).chain(command.iter().cloned()).collect();
    match enter::enter(&entry, &argv)? {}
}

/// Prints the metrics.
pub(super) fn metrics(lab: &str) -> anyhow::Result<()> {
    print!("{}", remote_control::ask::<String>(lab, &Request::Metrics)?);
    Ok(())
}

/// Prints the log of the last agent, and if `follow` what comes after it.
pub(super) fn logs(lab: &str, follow: bool) -> anyhow::Result<()> {
    let state = running(lab)?;
    let mut shown: Option<(PathBuf, File)> = None;
    loop {
        let is_up = state.is_alive();
        // What the predecessor has written is read to its end first.
        if let Some((_, log)) = &mut shown {
            copy(log)?;
        }
        // A lab that goes down takes the directory with it.
        let newest = state::agent_logs(lab).unwrap_or_default().pop();
        ensure!(
            newest.is_some() || follow,
            "the lab {lab} has run no agent yet: `cargo xtask lab agent start --build`"
        );
        if let Some(path) = newest
            && shown.as_ref().is_none_or(|(earlier, _)| *earlier != path)
        {
            let mut log = File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
            copy(&mut log)?;
            shown = Some((path, log));
        }
        if !follow || !is_up {
            return Ok(());
        }
        sleep(FOLLOW_INTERVAL);
    }
}

fn copy(log: &mut File) -> anyhow::Result<()> {
    let mut text = Vec::new();
    log.read_to_end(&mut text)?;
    print!("{}", String::from_utf8_lossy(&text));
    // Where nobody reads, the next line finds out.
    let _ = std::io::stdout().flush();
    Ok(())
}
