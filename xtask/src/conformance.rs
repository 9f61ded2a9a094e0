//! `cargo xtask conformance`: real, unmodified SDKs and tools, old and new, in every situation that podgate puts them in.
//!
//! Owns the command and its result. Which clients there are, and what each can do, is the catalog's; whose role a client
//! ended up with, the simulated AWS side's.

mod build;
mod catalog;
mod cell;
mod column;
mod matrix;
mod process;
mod progress;
mod refresh;
mod scene;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Args;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use self::{
    catalog::{CLIENTS, Client},
    cell::{Cell, Verdict},
    progress::Progress,
};
use crate::{
    ebpf, privilege,
    setup::{Build, Plan},
};

/// What all clients take once they are built.
const RUNS: Duration = Duration::from_mins(3);

/// Which clients, and where to write what was found.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Run this client only; may be given several times.
    #[arg(long = "client", value_name = "NAME")]
    clients: Vec<String>,
    /// Write every cell with its details to this file, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A client that can be run.
struct Subject {
    client: &'static Client,
    command: Vec<String>,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Report {
    clients: Vec<&'static str>,
    cells: Vec<Cell>,
    /// How often pods in `intercept` read the node's role.
    leaks: u64,
}

/// Builds the clients, puts them into every situation, prints the matrix. Fails unless every cell is as it should be.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    privilege::require_root("the conformance run")?;
    let clients = select(&arguments.clients)?;
    Plan::new("SDKs and tools, old and new, run in pods of simulated nodes.", RUNS)
        .needs(ebpf::missing_tools()?)
        .needs(build::missing(&clients))
        .builds([Build::KernelPrograms, Build::Agent])
        .begin()?;
    let agent = ebpf::build_agent()?;
    let mut subjects = Vec::new();
    let mut cells = Vec::new();
    for (client, built) in clients.iter().zip(build::build(&clients)) {
        match built {
            Ok(command) => subjects.push(Subject { client, command }),
            Err(why) => cells.extend(
                client.columns().map(|column| Cell::failed(client.name, column, Verdict::NotRun, &why)),
            ),
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let found = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            found = on_the_nodes(&agent, &subjects) => found,
            _ = tokio::signal::ctrl_c() => bail!("interrupted; the simulated nodes are gone"),
            _ = terminate.recv() => bail!("terminated; the simulated nodes are gone"),
        }
    })?;
    cells.extend(found.cells);
    let report =
        Report { clients: clients.iter().map(|client| client.name).collect(), cells, leaks: found.leaks };
    if let Some(path) = &arguments.json {
        fs::write(path, serde_json::to_vec_pretty(&report)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    matrix::print(&report);
    Ok(if report.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All nodes at the same time: most of what clients do is waiting.
async fn on_the_nodes(agent: &Path, subjects: &[Subject]) -> anyhow::Result<scene::Found> {
    let all = subjects.iter().map(|subject| subject.client.columns().count()).sum();
    let progress = Progress::new(all);
    let (main, ipv6, audit, refresh) = tokio::try_join!(
        scene::main_node(agent, subjects, &progress),
        scene::ipv6_node(agent, subjects, &progress),
        scene::audit_node(agent, subjects, &progress),
        refresh::node(agent, subjects, &progress),
    )?;
    let mut found = main;
    found.add(ipv6);
    found.add(audit);
    found.add(refresh);
    Ok(found)
}

// === impl Report ===

impl Report {
    fn is_good(&self) -> bool {
        self.leaks == 0 && !self.cells.iter().any(|cell| cell.verdict.is_failure())
    }
}

/// The clients of these names, or all.
fn select(names: &[String]) -> anyhow::Result<Vec<&'static Client>> {
    if let Some(unknown) = names.iter().find(|name| !CLIENTS.iter().any(|client| client.name == **name)) {
        let known: Vec<_> = CLIENTS.iter().map(|client| client.name).collect();
        bail!("there is no client {unknown}; there are {}", known.join(", "));
    }
    let is_selected = |client: &&Client| names.is_empty() || names.iter().any(|name| name == client.name);
    Ok(CLIENTS.iter().filter(is_selected).collect())
}
