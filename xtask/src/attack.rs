//! `cargo xtask attack`: attacks on podgate, each of them shown to work where podgate's defense is missing.
//!
//! Owns what is asked for and what is built. Every attack is run against podgate and against a build of it in which
//! the defense is switched off, on simulated nodes that attacks share as the plan says. What an attack is, its module
//! knows; whether it got something, the simulated AWS side.

mod arrivals;
mod attacker;
mod credentials;
mod fetches;
mod lifetime;
mod list;
mod modes;
mod network;
mod packets;
mod plan;
mod pods;
mod requests;
mod row;
mod scene;
mod session;
mod sockets;
mod translation;

use std::{fmt, net::IpAddr, path::PathBuf, pin::Pin, process::ExitCode, time::Duration};

use agent_common::{
    defense::Defense,
    net::{IMDS_V4, IMDS_V6, POD_IDENTITY_V4},
};
use anyhow::{Context as _, bail};
use clap::Args;
use lab::cgroupfs::CgroupDriver;
use tokio::signal::unix::{SignalKind, signal};

pub(crate) use self::attacker::{SUBCOMMAND, run as act};
use self::{
    modes::Scope,
    row::Row,
    scene::{Outcome, Scene},
};
use crate::{
    clients, ebpf, privilege,
    setup::{Build, Plan},
    vm,
};

/// EKS Pod Identity, and its only path.
const POD_IDENTITY: std::net::SocketAddr = scene::http(IpAddr::V4(POD_IDENTITY_V4));
const PROGRAM: &str = "/v1/credentials";
/// Podgate's own pair, which the agent has besides.
const OWN: std::net::SocketAddr = scene::http(IpAddr::V4(std::net::Ipv4Addr::new(169, 254, 175, 1)));
/// The metadata service, and its list of roles.
const IMDS: std::net::SocketAddr = scene::http(IpAddr::V4(IMDS_V4));
const IMDS6: std::net::SocketAddr = scene::http(IpAddr::V6(IMDS_V6));
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";

/// What to attack with what.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Run attacks only whose name contains this.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Run them in a virtual machine with this kernel; several run side by side.
    #[arg(long, value_enum, value_name = "KERNEL")]
    vm: Vec<vm::Kernel>,
    /// Try everything in every mode, on emulated machines too.
    #[arg(long)]
    all: bool,
    /// Print the rows as JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// The two builds, in an emulated machine: podgate, and the one of it in which defenses can be switched off.
    #[arg(long, num_args = 2, hide = true)]
    agents: Option<Vec<PathBuf>>,
}

/// What a control does without.
#[derive(Clone, Copy, Debug)]
enum Without {
    /// A defense, which only a build for this suite can switch off.
    Defense(Defense),
    /// What this setting of the agent takes away: the flag and its value, in which the attacker's namespace is `evil`.
    Flags(&'static str, &'static str),
    /// What this annotation of the attacker's namespace takes away, as its administrator may set it: the key and its value.
    Annotation(&'static str, &'static str),
}

/// An attack.
struct Attack {
    name: &'static str,
    tried: &'static str,
    /// What the control does without: all of it together, and only then does the attack work.
    without: &'static [Without],
    lab: LabKind,
    pods: InAudit,
    driver: CgroupDriver,
    run: for<'a> fn(&'a Scene) -> Running<'a>,
}

/// What the pods of an attack are in a cluster whose mode is `audit`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InAudit {
    /// In `audit` like all others: the attack is after another pod's identity.
    Audit,
    /// In `intercept`, by their namespaces, next to a pod in `audit`: the attack is about IMDS.
    Intercept,
}

/// Which lab an attack is tried in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LabKind {
    /// One for many attacks: this one leaves it as it was.
    Shared,
    /// One of its own: it wears the agent out or puts another in its place, or what its control does without is looked at
    /// only when an agent starts.
    Own,
    /// The same, with nothing else on the machine meanwhile: it is about how long others must wait.
    Quiet,
    /// One of its own, in which it starts the agent itself.
    Bare,
}

/// An attack that runs.
type Running<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Outcome>> + Send + 'a>>;

/// The two builds of podgate.
struct Builds {
    podgate: PathBuf,
    undefended: PathBuf,
}

/// Builds both agents, runs the attacks, prints the table. Fails unless every attack is withstood.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let attacks = list::select(arguments.only.as_deref().unwrap_or_default())?;
    if arguments.agents.is_none() {
        announce(&arguments.vm)?;
    }
    let rows =
        if arguments.vm.is_empty() { run_here(arguments, &attacks)? } else { run_in_machines(arguments)? };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        row::print(&rows);
    }
    let is_withstood = rows.iter().all(Row::is_withstood);
    Ok(if is_withstood { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The names of all attacks.
#[cfg(test)]
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    list::ATTACKS.iter().map(|attack| attack.name)
}

/// Says what will be installed and built, and installs the packages.
fn announce(kernels: &[vm::Kernel]) -> anyhow::Result<()> {
    if kernels.is_empty() {
        privilege::require_root("the attacks")?;
    }
    let runs = Duration::from_secs(if kernels.is_empty() { 300 } else { 900 });
    Plan::new("The attacks run on simulated nodes, with podgate's defenses and without.", runs)
        .needs(ebpf::missing_tools()?)
        .needs(clients::missing_packet_filter())
        .needs(if kernels.is_empty() { Vec::new() } else { vm::missing(kernels) })
        .builds([Build::KernelPrograms, Build::Agent, Build::UndefendedAgent])
        .begin()
}

fn run_in_machines(arguments: &Arguments) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (kernel, printed) in
        vm::attack(&arguments.vm, arguments.only.as_deref().unwrap_or_default(), arguments.all)?
    {
        let printed: Vec<Row> = serde_json::from_str(&printed)
            .context("BUG: the virtual machine has printed other rows than ours")?;
        rows.extend(printed.into_iter().map(|row| row.on(kernel.series())));
    }
    Ok(rows)
}

fn run_here(arguments: &Arguments, attacks: &[&'static Attack]) -> anyhow::Result<Vec<Row>> {
    privilege::require_root("the attacks")?;
    let builds = match arguments.agents.as_deref() {
        Some([podgate, undefended]) => Builds { podgate: podgate.clone(), undefended: undefended.clone() },
        _ => Builds { podgate: ebpf::build_agent()?, undefended: ebpf::build_undefended_agent()? },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let scope = match (arguments.all, arguments.agents.is_some()) {
        (true, _) => Scope::All,
        (false, true) => Scope::Hardest,
        (false, false) => Scope::Modes,
    };
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            rows = session::run_all(attacks, &builds, scope) => Ok(rows),
            _ = tokio::signal::ctrl_c() => bail!("interrupted; the simulated nodes are gone"),
            _ = terminate.recv() => bail!("terminated; the simulated nodes are gone"),
        }
    })
}

// === impl Without ===

impl fmt::Display for Without {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Defense(defense) => f.write_str(defense.label()),
            Self::Flags(flag, value) => write!(f, "{flag} {value}"),
            Self::Annotation(key, value) => write!(f, "{key}: {value}"),
        }
    }
}

/// A request as clients write it; `headers` are whole lines.
fn request(method: &str, host: IpAddr, path: &str, headers: &str) -> String {
    let host = attacker::host(host);
    format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{headers}Connection: close\r\n\r\n")
}

fn get(host: IpAddr, path: &str, headers: &str) -> String {
    request("GET", host, path, headers)
}
