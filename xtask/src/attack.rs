//! `cargo xtask attack`: attacks on podgate, each of them shown to work where podgate's defense is missing.
//!
//! Owns the order: every attack is run on a simulated node of its own, against the release agent and against a build in
//! which the defense is switched off. What an attack is, its module knows; whether it got something, the simulated AWS
//! side.

mod attacker;
mod credentials;
mod lifetime;
mod list;
mod network;
mod packets;
mod pods;
mod requests;
mod row;
mod scene;
mod sockets;

use std::{
    fmt,
    net::IpAddr,
    path::PathBuf,
    pin::Pin,
    process::ExitCode,
    time::{Duration, Instant},
};

use agent_common::{
    defense::Defense,
    net::{IMDS_V4, IMDS_V6, POD_IDENTITY_V4},
};
use anyhow::{Context as _, bail};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

pub(crate) use self::attacker::{SUBCOMMAND, run as act};
use self::{
    row::Row,
    scene::{Outcome, Scene},
};
use crate::{
    ebpf, privilege,
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
    /// Print the rows as JSON instead of a table.
    #[arg(long)]
    json: bool,
    /// The two builds of podgate: the release, and the one in which defenses can be switched off.
    #[arg(long, num_args = 2, hide = true)]
    agents: Option<Vec<PathBuf>>,
}

/// What a control does without.
#[derive(Clone, Copy, Debug)]
enum Without {
    /// A defense, which only a build for this suite can switch off.
    Defense(Defense),
    /// What this setting of the agent takes away: the flag and its value.
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
    /// Whether it begins before the agent is there.
    is_early: bool,
    run: for<'a> fn(&'a Scene) -> Running<'a>,
}

/// An attack that runs.
type Running<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Outcome>> + Send + 'a>>;

/// The two builds of podgate.
struct Builds {
    release: PathBuf,
    undefended: PathBuf,
}

/// Builds both agents, runs the attacks, prints the table. Fails unless every attack is withstood.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    if arguments.agents.is_none() {
        announce(&arguments.vm)?;
    }
    let rows = if arguments.vm.is_empty() { run_here(arguments)? } else { run_in_machines(arguments)? };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        row::print(&rows);
    }
    let is_withstood = rows.iter().all(Row::is_withstood);
    Ok(if is_withstood { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Says what will be installed and built, and installs the packages.
fn announce(kernels: &[vm::Kernel]) -> anyhow::Result<()> {
    if kernels.is_empty() {
        privilege::require_root("the attacks")?;
    }
    let runs = Duration::from_secs(if kernels.is_empty() { 60 } else { 900 });
    Plan::new("The attacks run on simulated nodes, with podgate's defenses and without.", runs)
        .needs(ebpf::missing_tools()?)
        .needs(if kernels.is_empty() { Vec::new() } else { vm::missing(kernels) })
        .builds([Build::KernelPrograms, Build::Agent, Build::UndefendedAgent])
        .begin()
}

fn run_in_machines(arguments: &Arguments) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (kernel, printed) in vm::attack(&arguments.vm, arguments.only.as_deref().unwrap_or_default())? {
        let printed: Vec<Row> = serde_json::from_str(&printed)
            .context("BUG: the virtual machine has printed other rows than ours")?;
        rows.extend(printed.into_iter().map(|row| row.on(kernel.series())));
    }
    Ok(rows)
}

fn run_here(arguments: &Arguments) -> anyhow::Result<Vec<Row>> {
    privilege::require_root("the attacks")?;
    let builds = match arguments.agents.as_deref() {
        Some([release, undefended]) => Builds { release: release.clone(), undefended: undefended.clone() },
        _ => Builds { release: ebpf::build_agent()?, undefended: ebpf::build_undefended_agent()? },
    };
    let only = arguments.only.as_deref().unwrap_or_default();
    let attacks: Vec<_> = list::ATTACKS.iter().filter(|attack| attack.name.contains(only)).collect();
    if attacks.is_empty() {
        let names: Vec<_> = list::ATTACKS.iter().map(|attack| attack.name).collect();
        bail!("no attack's name contains {only:?}; there are {}", names.join(", "));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            // An emulated machine is slow, and that each defense does alone is shown without it.
            rows = run_all(&attacks, &builds, arguments.agents.is_none()) => Ok(rows),
            _ = tokio::signal::ctrl_c() => bail!("interrupted; the simulated nodes are gone"),
            _ = terminate.recv() => bail!("terminated; the simulated nodes are gone"),
        }
    })
}

async fn run_all(attacks: &[&Attack], builds: &Builds, with_layers: bool) -> Vec<Row> {
    let mut rows = Vec::new();
    for attack in attacks {
        let began = Instant::now();
        // Both at once: on nodes of their own they do not see each other.
        let (defended, control) =
            tokio::join!(attack.run_on(builds, &[]), attack.run_on(builds, attack.without));
        let control = match control {
            Ok(outcome) if outcome.is_harm => Ok(outcome),
            // Once more, alone: on a slow machine the two may have been in each other's way.
            _ => attack.run_on(builds, attack.without).await,
        };
        let layers = if with_layers { attack.layers(builds).await } else { Vec::new() };
        let names = (attack.name, attack.tried);
        let seconds = began.elapsed().as_secs_f64();
        let row = Row::new(names, attack.without, &defended, &layers, &control, seconds);
        eprintln!("{}", row.line());
        rows.push(row);
    }
    rows
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

// === impl Attack ===

impl Attack {
    /// What comes of it without one of several defenses: each of them must do by itself.
    async fn layers(&self, builds: &Builds) -> Vec<anyhow::Result<Outcome>> {
        let mut outcomes = Vec::new();
        if self.without.len() > 1 {
            for without in self.without {
                outcomes.push(self.run_without(builds, &[*without], false).await);
            }
        }
        outcomes
    }

    async fn run_on(&self, builds: &Builds, without: &[Without]) -> anyhow::Result<Outcome> {
        self.run_without(builds, without, !without.is_empty()).await
    }

    async fn run_without(
        &self,
        builds: &Builds,
        without: &[Without],
        is_harm_expected: bool,
    ) -> anyhow::Result<Outcome> {
        let scene = Scene::up(builds, without)?;
        if !self.is_early {
            scene.start_agent().await?;
        }
        let outcome = (self.run)(&scene).await;
        let is_as_expected = outcome.as_ref().is_ok_and(|outcome| outcome.is_harm == is_harm_expected);
        if !is_as_expected {
            eprintln!("{}, the end of the agent's log:\n{}", self.name, scene.log_tail().await);
        }
        scene.down().await?;
        outcome
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
