//! `cargo xtask bench`: what the agent costs compared with a server that does nothing, and what its programs cost others.
//!
//! Owns the first comparison: both servers are asked from the same pod, over the same veth, in turns.

mod kernel;
mod load;
mod server;
mod traffic;

use std::{
    env,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand};
use lab::{AgentSpec, EnvKind, Lab, LabSpec, Pod, PodSpec, process_id::Process, simulated_network};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Child,
};

use self::{load::LoadResult, server::BARE_PORT};
pub(crate) use self::{
    load::{LoadArguments, load},
    server::{ServerArguments, serve},
    traffic::{TrafficArguments, traffic},
};
use crate::{
    cmd, ebpf, privilege, report,
    setup::{Build, Plan},
    workspace,
};

const PATH: &str = "/v1/credentials";
const AGENT_ADDRESS: &str = "169.254.170.23:80";
/// Clock ticks of `/proc/PID/stat`; the kernel's `USER_HZ`, 100 on every architecture that EKS has.
const MILLISECONDS_PER_TICK: f64 = 10.0;

/// What to measure, and how long.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Run every measurement once, without a release build: shows that the benchmark works, and no figures to rely on.
    #[arg(long, global = true)]
    short: bool,
    /// Both, if none is named.
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Command {
    /// Warm requests through the redirect, compared with a bare hyper server.
    Warm,
    /// What the kernel programs cost a connection, and what they cost unrelated connections.
    Kernel,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Extent {
    Full,
    Short,
}

/// What is measured with.
struct Binaries {
    agent: PathBuf,
    /// This program: the bare server, the load and the traffic.
    helper: PathBuf,
}

/// How requests and connections go together.
#[derive(Clone, Copy, Debug)]
enum Variant {
    KeepAlive,
    NewConnection,
}

/// One server in one variant, over all rounds.
#[derive(Debug, Default)]
struct Measured {
    requests: f64,
    seconds: f64,
    cpu_milliseconds: f64,
    p50: Vec<f64>,
    p99: Vec<f64>,
}

/// A server to ask.
struct Contender {
    name: &'static str,
    address: String,
    process: Process,
}

// === impl Variant ===

impl Variant {
    const ALL: [Self; 2] = [Self::KeepAlive, Self::NewConnection];

    fn name(self) -> &'static str {
        match self {
            Self::KeepAlive => "keep-alive",
            Self::NewConnection => "new connection",
        }
    }

    /// Enough for the clock ticks of the CPU time to be fine; and, when it is short, for each client to need a second
    /// connection, because the agent closes one after 1,000 requests.
    fn requests(self, extent: Extent) -> u32 {
        match (self, extent) {
            (Self::KeepAlive, Extent::Full) => 50_000,
            (Self::NewConnection, Extent::Full) => 10_000,
            (Self::KeepAlive, Extent::Short) => 6_000,
            (Self::NewConnection, Extent::Short) => 500,
        }
    }
}

// === impl Extent ===

impl Extent {
    /// How often each server is asked, in every variant.
    fn rounds(self) -> usize {
        match self {
            Self::Full => 5,
            Self::Short => 1,
        }
    }
}

// === impl Binaries ===

impl Binaries {
    /// For figures, all of them are release builds, as the agent is in an image.
    fn build(extent: Extent) -> anyhow::Result<Self> {
        if extent == Extent::Short {
            return Ok(Self { agent: ebpf::build_agent()?, helper: env::current_exe()? });
        }
        cmd::run(
            "release build of the bare server and the load",
            workspace::cargo().args(["build", "--release", "--package", "xtask"]),
        )?;
        Ok(Self {
            agent: ebpf::build_release_agent()?,
            helper: workspace::target_directory().join("release/xtask"),
        })
    }
}

// === impl Measured ===

impl Measured {
    fn add(&mut self, result: &LoadResult, cpu_milliseconds: f64) {
        self.requests += f64::from(result.requests);
        self.seconds += result.seconds;
        self.cpu_milliseconds += cpu_milliseconds;
        self.p50.push(result.p50_microseconds);
        self.p99.push(result.p99_microseconds);
    }

    fn requests_per_second(&self) -> f64 {
        self.requests / self.seconds
    }

    fn cpu_per_thousand(&self) -> f64 {
        self.cpu_milliseconds * 1000.0 / self.requests
    }
}

/// Says what will be installed and built, and installs the packages.
fn announce(extent: Extent) -> anyhow::Result<()> {
    let (title, seconds, agent) = match extent {
        Extent::Full => ("Measures what podgate costs.", 600, Build::ReleaseAgent),
        Extent::Short => ("Runs every measurement once.", 60, Build::Agent),
    };
    Plan::new(title, Duration::from_secs(seconds))
        .needs(ebpf::missing_tools()?)
        .builds([Build::KernelPrograms, agent])
        .begin()
}

/// Measures.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    privilege::require_root("the benchmark")?;
    let extent = if arguments.short { Extent::Short } else { Extent::Full };
    announce(extent)?;
    let binaries = Binaries::build(extent)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let measure = async {
            let commands =
                arguments.command.map_or(vec![Command::Warm, Command::Kernel], |command| vec![command]);
            for command in commands {
                match command {
                    Command::Warm => compare(&binaries, extent).await?,
                    Command::Kernel => kernel::measure(&binaries, extent).await?,
                }
            }
            Ok(())
        };
        tokio::select! {
            measured = measure => measured,
            _ = tokio::signal::ctrl_c() => bail!("interrupted; the simulated node is gone"),
        }
    })
}

async fn compare(binaries: &Binaries, extent: Extent) -> anyhow::Result<()> {
    let helper = binaries.helper.as_path();
    let lab = Lab::up(LabSpec::new(&format!("bench-{}", std::process::id()), helper))?;
    let pod = lab.add_pod(&PodSpec::new("bench", "client").role("client-role"))?;
    let agent = lab.start_agent(&AgentSpec::new(&binaries.agent, &["--imds", "intercept"])).await?;
    let body = warm_up(&lab, &pod).await?;
    let bare_address = format!("{}:{BARE_PORT}", simulated_network::node_addresses().v4);
    let bare = start_bare(&lab, helper, &bare_address, body.len()).await?;
    let contenders = [
        Contender { name: "podgate", address: AGENT_ADDRESS.to_owned(), process: agent.process() },
        Contender {
            name: "bare hyper",
            address: bare_address,
            process: Process::of(bare.id().context("the bare server has exited")?)?,
        },
    ];
    let calls = lab.eks_auth.calls();
    for variant in Variant::ALL {
        let mut measured = [Measured::default(), Measured::default()];
        for round in 1..=extent.rounds() {
            eprintln!("{}: round {round} of {}", variant.name(), extent.rounds());
            for (contender, measured) in contenders.iter().zip(&mut measured) {
                let before = cpu_milliseconds(contender.process)?;
                let result = ask(&lab, &pod, helper, contender, variant, variant.requests(extent)).await?;
                measured.add(&result, cpu_milliseconds(contender.process)? - before);
            }
        }
        print(variant, &contenders, &measured);
    }
    if lab.eks_auth.calls() != calls {
        bail!("EKS Auth was called during the measurement: these were not warm requests");
    }
    agent.stop().await?;
    lab.down()
}

/// The first request fetches the credentials; its body gives the size of the bare server's.
async fn warm_up(lab: &Lab, pod: &Pod) -> anyhow::Result<String> {
    let url = format!("http://{AGENT_ADDRESS}{PATH}");
    let output = lab.exec(pod, EnvKind::None, &["curl", "-sS", "--fail-with-body", &url])?.output().await?;
    let body = String::from_utf8(output.stdout)?;
    if !output.status.success() {
        bail!("the agent does not serve the pod: {body}");
    }
    Ok(body)
}

async fn start_bare(lab: &Lab, helper: &Path, address: &str, body_bytes: usize) -> anyhow::Result<Child> {
    let helper = helper.display().to_string();
    let size = body_bytes.to_string();
    let server = [helper.as_str(), "bench-server", "--address", address, "--body-bytes", &size];
    start_server(lab.on_node(&server)?).await
}

/// Starts a server and waits until it says that it listens.
async fn start_server(mut server: tokio::process::Command) -> anyhow::Result<Child> {
    let mut child = server.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().context("BUG: the server's output is not a pipe")?;
    let line = BufReader::new(stdout).lines().next_line().await?;
    if line.as_deref() != Some(server::READY) {
        bail!("a server of the benchmark did not start");
    }
    Ok(child)
}

async fn ask(
    lab: &Lab,
    pod: &Pod,
    helper: &Path,
    contender: &Contender,
    variant: Variant,
    requests: u32,
) -> anyhow::Result<LoadResult> {
    let helper = helper.display().to_string();
    let requests = requests.to_string();
    let mut command = vec![helper.as_str(), "bench-load", "--address", &contender.address];
    command.extend(["--path", PATH, "--requests", &requests]);
    if matches!(variant, Variant::NewConnection) {
        command.push("--new-connections");
    }
    let output = lab.exec(pod, EnvKind::None, &command)?.stderr(Stdio::inherit()).output().await?;
    serde_json::from_slice(&output.stdout).with_context(|| format!("the load on {} failed", contender.name))
}

/// CPU time that the process has used, in user and kernel mode.
fn cpu_milliseconds(process: Process) -> anyhow::Result<f64> {
    let stat = procfs::process::Process::new(process.pid.cast_signed())?.stat()?;
    #[expect(clippy::cast_precision_loss, reason = "ticks of minutes are far below 2^52")]
    let ticks = (stat.utime + stat.stime) as f64;
    Ok(ticks * MILLISECONDS_PER_TICK)
}

fn print(variant: Variant, contenders: &[Contender], measured: &[Measured]) {
    let mut table =
        report::table(&[variant.name(), "requests/s", "p50 µs", "p99 µs", "CPU ms per 1,000 requests"]);
    for (contender, measured) in contenders.iter().zip(measured) {
        table.add_row([
            contender.name.to_owned(),
            format!("{:.0}", measured.requests_per_second()),
            format!("{:.0}", median(&measured.p50)),
            format!("{:.0}", median(&measured.p99)),
            format!("{:.1}", measured.cpu_per_thousand()),
        ]);
    }
    if let [agent, bare] = measured {
        table.add_row([
            "ratio".to_owned(),
            format!("{:.2}", agent.requests_per_second() / bare.requests_per_second()),
            format!("{:.2}", median(&agent.p50) / median(&bare.p50)),
            format!("{:.2}", median(&agent.p99) / median(&bare.p99)),
            format!("{:.2}", agent.cpu_per_thousand() / bare.cpu_per_thousand()),
        ]);
    }
    println!("{table}");
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
