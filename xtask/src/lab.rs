//! `cargo xtask lab`: simulated nodes that stay up.
//!
//! Owns the command line and the process in the background that serves a lab. The lab itself is the crate `lab`.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    path::PathBuf,
    process::{self, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Subcommand, ValueEnum};
use lab::{AgentSpec, EnvKind, Lab, LabSpec, PodSpec, enter, netns::Routing, state, state::State};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, setsid},
};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use crate::{apt, cmd, ebpf, privilege, report};

/// How long a lab may take to go down.
const DOWN_TIMEOUT: Duration = Duration::from_mins(1);
const NAMESPACE: &str = "shop";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a simulated node with the agent on it, and leave it running.
    Up(UpArguments),
    /// Run a command in a pod: its cgroup, its network, its token, a clean environment.
    Exec {
        /// Name of the lab.
        #[arg(long, default_value = "dev")]
        name: String,
        /// Credential environment of the command.
        #[arg(long, value_enum, default_value_t)]
        env: Environment,
        /// The pod, as NAME or NAMESPACE/NAME.
        pod: String,
        /// The command and its arguments.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Show the labs of this machine and their pods.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Stop a lab and remove all it has on the machine; what dead labs left behind goes as well.
    Down {
        /// Name of the lab.
        #[arg(long, default_value = "dev", conflicts_with = "all")]
        name: String,
        /// Stop every lab that `lab up` started.
        #[arg(long)]
        all: bool,
    },
}

#[derive(Clone, Debug, Args)]
pub(crate) struct UpArguments {
    /// Name of the lab; several can be up at once.
    #[arg(long, default_value = "dev")]
    name: String,
    /// How many pods to start, each with a service account and a role of its own.
    #[arg(long, default_value_t = 2)]
    pods: u16,
    /// Start the node and its servers only.
    #[arg(long)]
    no_agent: bool,
    /// What pods' calls to the metadata service get.
    #[arg(long, value_enum, default_value_t)]
    imds: ImdsMode,
    /// How the node routes its pods.
    #[arg(long, value_enum, default_value_t)]
    routing: RoutingMode,
}

/// What the background process is told.
#[derive(Clone, Debug, Args)]
pub(crate) struct ServeArguments {
    #[command(flatten)]
    up: UpArguments,
    /// The agent; none is started without.
    #[arg(long)]
    agent: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(crate) enum Environment {
    /// Nothing injected.
    #[default]
    None,
    /// What the EKS webhook injects.
    Webhook,
    /// What ECS injects.
    Ecs,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum ImdsMode {
    Off,
    Audit,
    #[default]
    Intercept,
    Deny,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum RoutingMode {
    /// As the Amazon VPC CNI does.
    #[default]
    VpcCni,
    /// As the VPC CNI's strict mode of security groups for pods does.
    StrictSecurityGroups,
    /// Pods have IPv6 only.
    Ipv6Only,
    /// A network policy lets pods send to podgate's target, port 80, and nowhere else.
    DefaultDenyEgress,
    /// The node's INPUT chain drops all but podgate's target, port 80.
    DroppingInput,
}

// === impl Environment ===

impl From<Environment> for EnvKind {
    fn from(environment: Environment) -> Self {
        match environment {
            Environment::None => Self::None,
            Environment::Webhook => Self::Webhook,
            Environment::Ecs => Self::Ecs,
        }
    }
}

// === impl ImdsMode ===

impl ImdsMode {
    /// As the agent's flag takes it.
    fn as_flag(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Audit => "audit",
            Self::Intercept => "intercept",
            Self::Deny => "deny",
        }
    }
}

// === impl RoutingMode ===

impl RoutingMode {
    /// As the process in the background takes it.
    fn as_flag(self) -> &'static str {
        match self {
            Self::VpcCni => "vpc-cni",
            Self::StrictSecurityGroups => "strict-security-groups",
            Self::Ipv6Only => "ipv6-only",
            Self::DefaultDenyEgress => "default-deny-egress",
            Self::DroppingInput => "dropping-input",
        }
    }

    fn needs_nftables(self) -> bool {
        matches!(self, Self::DefaultDenyEgress | Self::DroppingInput)
    }
}

impl From<RoutingMode> for Routing {
    fn from(routing: RoutingMode) -> Self {
        match routing {
            RoutingMode::VpcCni => Self::VpcCni,
            RoutingMode::StrictSecurityGroups => Self::StrictSecurityGroups,
            RoutingMode::Ipv6Only => Self::Ipv6Only,
            RoutingMode::DefaultDenyEgress => Self::DefaultDenyEgress,
            RoutingMode::DroppingInput => Self::DroppingInput,
        }
    }
}

/// Runs one of the commands.
pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Up(arguments) => up(&arguments),
        Command::Exec { name, env, pod, command } => {
            let state = State::load(&name)?;
            ensure!(state.is_alive(), "the lab {name} is dead: `cargo xtask lab down --name {name}`");
            match enter::enter(&state.pod(&pod)?.entry(env.into()), &command)? {}
        }
        Command::Status { json } => status(json),
        Command::Down { name, all } => down(&name, all),
    }
}

/// Starts a lab in the background and returns when it is up.
fn up(arguments: &UpArguments) -> anyhow::Result<()> {
    privilege::require_root("a lab")?;
    let taken = State::list()?.into_iter().any(|lab| lab.name == arguments.name && lab.is_alive());
    ensure!(!taken, "the lab {0} is up already: `cargo xtask lab down --name {0}`", arguments.name);
    if arguments.routing.needs_nftables() && !cmd::is_in_path("nft") && apt::is_usable() {
        apt::install("the lab's packet filter", &["nftables"])?;
    }
    let mut server = process::Command::new(enter::OWN_EXECUTABLE);
    server.args(["lab-serve", "--name", &arguments.name, "--imds", arguments.imds.as_flag()]);
    server.args(["--pods", &arguments.pods.to_string(), "--routing", arguments.routing.as_flag()]);
    if !arguments.no_agent {
        server.arg("--agent").arg(ebpf::build_release_agent()?);
    }
    let log = state::log_file(&arguments.name)?;
    // PodState open: a lab that does not start takes its log with it.
    let mut log = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&log)
        .with_context(|| format!("cannot write {}", log.display()))?;
    let mut server = server
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .context("cannot start the lab's process")?;
    let mut said = String::new();
    let stdout = server.stdout.take().context("BUG: the lab's output is not a pipe")?;
    BufReader::new(stdout).read_line(&mut said)?;
    if said.trim_end() != "ready" {
        server.wait()?;
        let mut text = String::new();
        log.seek(SeekFrom::Start(0))?;
        log.read_to_string(&mut text)?;
        bail!("the lab {} did not start:\n{}", arguments.name, text.trim_end());
    }
    let state = State::load(&arguments.name)?;
    print_pods(&state);
    print_usage(&state);
    Ok(())
}

/// The process in the background. Says `ready` once and runs until SIGTERM or SIGINT.
pub(crate) fn serve(arguments: &ServeArguments) -> anyhow::Result<()> {
    setsid().context("cannot leave the terminal's session")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let spec = LabSpec {
            served: true,
            routing: arguments.up.routing.into(),
            ..LabSpec::new(&arguments.up.name, enter::OWN_EXECUTABLE)
        };
        let lab = Lab::up(spec)?;
        for number in 1..=arguments.up.pods {
            let name = format!("app-{number}");
            let spec = PodSpec::new(NAMESPACE, &name).role(&format!("{name}-role"));
            // Every second one as the EKS webhook leaves it.
            lab.add_pod(&if number % 2 == 0 { spec.with_token() } else { spec })?;
        }
        let agent = match &arguments.agent {
            Some(binary) => {
                let flags = ["--imds", arguments.up.imds.as_flag(), "--log-format", "text"];
                Some(lab.start_agent(&AgentSpec::new(binary, &flags)).await?)
            }
            None => None,
        };
        println!("ready");
        std::io::stdout().flush()?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if let Some(agent) = agent {
            agent.stop().await?;
        }
        lab.down()
    })
}

fn status(as_json: bool) -> anyhow::Result<()> {
    let labs = State::list()?;
    if as_json {
        let labs: Vec<_> = labs.iter().map(|lab| json!({"alive": lab.is_alive(), "lab": lab})).collect();
        println!("{}", serde_json::to_string_pretty(&labs)?);
        return Ok(());
    }
    if labs.is_empty() {
        println!("no lab is up: `cargo xtask lab up` starts one");
    }
    for lab in labs {
        if lab.is_alive() {
            println!("{} {}, process {}", report::success("●"), lab.name, lab.owner.pid);
            print_pods(&lab);
        } else {
            println!("{} {}, dead: `cargo xtask lab down` removes it", report::failure("●"), lab.name);
        }
    }
    Ok(())
}

fn down(name: &str, all: bool) -> anyhow::Result<()> {
    privilege::require_root("removing a lab")?;
    let labs = State::list()?;
    let named = labs.iter().any(|lab| lab.name == name);
    for lab in labs {
        if !lab.is_alive() {
            state::clean(&lab.name)?;
            println!("{} was dead; removed what it had left", lab.name);
        } else if lab.name == name || (all && lab.served) {
            stop(&lab)?;
            println!("{} is down", lab.name);
        }
    }
    if !all && !named {
        println!("there is no lab {name}");
    }
    Ok(())
}

/// Asks the lab's process to take the lab down, and waits for it.
fn stop(lab: &State) -> anyhow::Result<()> {
    let pid = lab.owner.pid;
    ensure!(
        lab.served,
        "the lab {} belongs to a test or demo that runs as process {pid}: stop that",
        lab.name
    );
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM)
        .with_context(|| format!("cannot stop the lab {}, process {pid}", lab.name))?;
    let deadline = Instant::now() + DOWN_TIMEOUT;
    while lab.is_alive() {
        ensure!(
            Instant::now() < deadline,
            "the lab {} still runs as process {pid} after {DOWN_TIMEOUT:?}; its log is {}",
            lab.name,
            state::log_file(&lab.name)?.display()
        );
        sleep(Duration::from_millis(20));
    }
    // Nothing is left, unless the process could not remove it.
    state::clean(&lab.name)
}

fn print_pods(lab: &State) {
    let mut table = report::table(&["pod", "service account", "role", "addresses", "token volume"]);
    for pod in &lab.pods {
        table.add_row([
            pod.full_name(),
            format!("{}/{}", pod.namespace, pod.service_account),
            pod.role.clone().unwrap_or_else(|| "-".to_owned()),
            if pod.host_network {
                "host network".to_owned()
            } else {
                let addresses: Vec<_> = pod.addresses.list().iter().map(ToString::to_string).collect();
                addresses.join(", ")
            },
            if pod.token_volume.is_some() { "yes" } else { "no" }.to_owned(),
        ]);
    }
    println!("{table}");
    match lab.agent {
        Some(agent) if agent.is_running() => println!("agent: process {}", agent.pid),
        _ => println!("agent: not running"),
    }
}

fn print_usage(lab: &State) {
    let name = if lab.name == "dev" { String::new() } else { format!(" --name {}", lab.name) };
    let has_v4 = lab.pods.iter().any(|pod| pod.addresses.v4.is_some());
    let host = if has_v4 { "169.254.170.23" } else { "[fd00:ec2::23]" };
    println!(
        "\n\
         cargo xtask lab exec{name} app-1 -- curl -gs http://{host}/v1/credentials\n\
         cargo xtask lab exec{name} app-1 -- bash\n\
         cargo xtask lab exec{name} --env webhook app-2 -- env\n\
         cargo xtask lab status\n\
         cargo xtask lab down{name}"
    );
    if lab.agent.is_some() {
        println!("\nthe agent's log: {}", state::directory(&lab.name).join("agent-1.log").display());
    }
}
