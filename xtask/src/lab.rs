//! `cargo xtask lab`: simulated nodes that stay up.
//!
//! Owns the command line. The lab itself is the crate `lab`; a running one is told what to do over its socket.

mod agent_commands;
mod lab_status;
mod lifecycle;
mod object_commands;

use std::path::PathBuf;

use anyhow::ensure;
use clap::{Args, Subcommand, ValueEnum, value_parser};
use lab::{EnvKind, enter, simulated_network::Routing, state::State};

pub(crate) use self::lifecycle::serve;
use self::{
    agent_commands::AgentCommand,
    object_commands::{Association, Fault, NamespaceCommand, PodCommand},
};

/// Namespace of the lab's pods where none is given.
const NAMESPACE: &str = "shop";
/// Each pod is a process, a network namespace and two interfaces.
const MAX_PODS: i64 = 250;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a simulated node with the agent on it, and leave it running.
    Up(UpArguments),
    /// Show the labs of this machine, their pods and what is broken on purpose.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Stop a lab and remove all it has on the machine; what dead labs left behind is removed too.
    Down {
        /// Name of the lab.
        #[arg(long, default_value = "dev", conflicts_with = "all")]
        name: String,
        /// Stop every lab that `lab up` started.
        #[arg(long)]
        all: bool,
    },
    /// Run a command in a pod: its cgroup, its network, its token, a clean environment.
    Exec {
        #[command(flatten)]
        lab: LabName,
        /// Credential environment of the command; the pod's own where it is not given.
        #[arg(long, value_enum)]
        env: Option<EnvKind>,
        /// The pod, as NAME or NAMESPACE/NAME.
        pod: String,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Ask for credentials in a pod the way an SDK would there, and print the answer.
    Credentials {
        #[command(flatten)]
        lab: LabName,
        /// Credential environment; the pod's own where it is not given. With `none` SDKs ask the metadata service.
        #[arg(long, value_enum)]
        env: Option<EnvKind>,
        /// The pod, as NAME or NAMESPACE/NAME.
        pod: String,
    },
    /// Break a simulated service on purpose, or repair it: `lab fault list` shows every switch.
    Fault(Fault),
    /// Add, change and remove pods.
    #[command(subcommand)]
    Pod(PodCommand),
    /// Give a service account a role: a pod identity association.
    Associate {
        #[command(flatten)]
        of: Association,
        /// Name of the role.
        role: String,
    },
    /// Take a service account's role away. Credentials that were issued stay valid, as on AWS.
    Dissociate(Association),
    /// Change namespaces.
    #[command(subcommand)]
    Namespace(NamespaceCommand),
    /// Start, stop, kill and restart the agent.
    #[command(subcommand)]
    Agent(AgentCommand),
    /// Run another command of the agent's binary where the agent runs, such as `whois --pid PID` or `maps list`.
    Podgate {
        #[command(flatten)]
        lab: LabName,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Print the agent's log.
    Logs {
        #[command(flatten)]
        lab: LabName,
        /// Go on until the lab is down, with the logs of later agents too.
        #[arg(long, short)]
        follow: bool,
    },
    /// Print what the agent's metrics endpoint serves.
    Metrics {
        #[command(flatten)]
        lab: LabName,
    },
}

/// Which lab.
#[derive(Clone, Debug, Args)]
pub(crate) struct LabName {
    /// Name of the lab.
    #[arg(long, default_value = "dev", value_name = "LAB")]
    name: String,
}

#[derive(Clone, Debug, Args)]
pub(crate) struct UpArguments {
    /// Name of the lab; several can be up at once.
    #[arg(long, default_value = "dev")]
    name: String,
    /// How many pods to start, each with a service account and a role of its own; `lab pod add` adds more.
    #[arg(long, default_value_t = 2, value_parser = value_parser!(u16).range(0..=MAX_PODS))]
    pods: u16,
    /// Start the node and its servers only.
    #[arg(long)]
    no_agent: bool,
    /// What pods' calls to the metadata service get.
    #[arg(long, value_enum, default_value_t)]
    imds: ImdsMode,
    /// How the node routes its pods.
    #[arg(long, value_enum, default_value_t)]
    routing: Routing,
}

/// What the background process is told.
#[derive(Clone, Debug, Args)]
pub(crate) struct ServeArguments {
    #[command(flatten)]
    up: UpArguments,
    /// The agent; without it none is started.
    #[arg(long)]
    agent: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum ImdsMode {
    Off,
    Audit,
    #[default]
    Intercept,
    Deny,
}

/// A value as its flag takes it.
fn flag(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// Runs one of the commands.
pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Up(arguments) => lifecycle::up(&arguments),
        Command::Status { json } => lab_status::run(json),
        Command::Down { name, all } => lifecycle::down(&name, all),
        Command::Exec { lab, env, pod, command } => exec(&lab.name, &pod, env, &command),
        Command::Credentials { lab, env, pod } => credentials(&lab.name, &pod, env),
        Command::Fault(fault) => object_commands::fault(&fault),
        Command::Pod(command) => object_commands::pod(command),
        Command::Associate { of, role } => object_commands::associate(&of, role),
        Command::Dissociate(of) => object_commands::dissociate(&of),
        Command::Namespace(command) => object_commands::namespace(command),
        Command::Agent(command) => agent_commands::agent(command),
        Command::Podgate { lab, command } => agent_commands::podgate(&lab.name, &command),
        Command::Logs { lab, follow } => agent_commands::logs(&lab.name, follow),
        Command::Metrics { lab } => agent_commands::metrics(&lab.name),
    }
}

/// Turns this process into a command in a pod.
fn exec(lab: &str, pod: &str, env: Option<EnvKind>, command: &[String]) -> anyhow::Result<()> {
    let state = running(lab)?;
    let pod = state.pod(pod)?;
    match enter::enter(&pod.entry(env.unwrap_or(pod.environment)), command)? {}
}

fn credentials(lab: &str, pod: &str, env: Option<EnvKind>) -> anyhow::Result<()> {
    let state = running(lab)?;
    let has_v4 = state.pod(pod)?.addresses.v4.is_some();
    let imds = if has_v4 { "http://169.254.169.254" } else { "http://[fd00:ec2::254]" };
    let command = ["sh", "-c", include_str!("lab/credentials.sh"), "credentials", imds];
    exec(lab, pod, env, &command.map(str::to_owned))
}

/// The state of a lab that is up.
fn running(name: &str) -> anyhow::Result<State> {
    let state = State::load(name)?;
    ensure!(state.is_alive(), "the lab {name} is dead: `cargo xtask lab down --name {name}`");
    Ok(state)
}
