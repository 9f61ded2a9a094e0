//! The agent under test: podgate's binary in its own pod, configured by its public flags only.
//!
//! Owns one process from start to exit. It is observed by its ports, its log and its exit status only.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::ExitStatus,
    time::Duration,
};

use agent_common::abi::ABI_VERSION;
use anyhow::{Context as _, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::Child,
    time::{Instant, sleep, timeout},
};

use crate::{cgroupfs, memory::MemoryLimit, pod::PodSpec, process_id::Process, simulated_node::Node};

/// Where the agent's probes and metrics are.
pub const ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9163);

/// How long the agent may take until it serves: the programs are verified meanwhile, on emulated machines too.
const READY_TIMEOUT: Duration = Duration::from_mins(1);
/// How long it may take to exit after SIGTERM: more than any drain deadline used here.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// How many lines of the log an error shows.
const LOG_TAIL: usize = 30;

/// How to run the agent.
#[derive(Clone, Debug)]
pub struct AgentSpec {
    /// The `podgate` binary.
    pub binary: PathBuf,
    /// Flags in addition to those that say where the lab's node is.
    pub args: Vec<String>,
    /// Environment variables, in addition to those.
    pub env: BTreeMap<String, String>,
}

/// A running agent; killed when dropped.
#[derive(Debug)]
pub struct AgentProcess {
    child: Child,
    process: Process,
    /// Everything it writes to its standard output and error.
    pub log: PathBuf,
    pub(crate) container: PathBuf,
}

// === impl AgentSpec ===

impl AgentSpec {
    /// `binary` with `args` and nothing else.
    pub fn new(binary: impl Into<PathBuf>, args: &[&str]) -> Self {
        Self {
            binary: binary.into(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            env: BTreeMap::new(),
        }
    }

    /// The same with pins of the next ABI, which only `podgate-undefended` can have: so that an upgrade to another ABI is
    /// tested before there is one.
    #[must_use]
    pub fn of_next_abi(mut self) -> Self {
        self.env.insert("PODGATE_ABI".to_owned(), Self::NEXT_ABI.to_string());
        self
    }

    /// The ABI of [`Self::of_next_abi`].
    pub const NEXT_ABI: u32 = ABI_VERSION + 1;
}

// === impl AgentProcess ===

impl AgentProcess {
    pub(crate) fn new(child: Child, log: PathBuf, container: PathBuf) -> anyhow::Result<Self> {
        let pid = child.id().context("BUG: the agent was waited for before it was started")?;
        Ok(Self { child, process: Process::of(pid)?, log, container })
    }

    /// The agent's process.
    pub fn process(&self) -> Process {
        self.process
    }

    /// Waits until the agent serves; an agent that exits instead is an error with the end of its log.
    pub(crate) async fn ready(&mut self, node: &Node) -> anyhow::Result<()> {
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("the agent exited before it was ready ({status}):\n{}", self.log_tail());
            }
            if node.ask_agent("/readyz").await.is_ok_and(|answer| answer.status == 200) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("the agent is not ready after {READY_TIMEOUT:?}:\n{}", self.log_tail());
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Asks the agent to stop (SIGTERM) and waits for its exit.
    pub async fn stop(mut self) -> anyhow::Result<ExitStatus> {
        self.terminate()?;
        self.wait().await
    }

    /// Asks the agent to stop (SIGTERM) and returns at once.
    pub fn terminate(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGTERM)
    }

    /// Kills the agent (SIGKILL) and waits for its exit.
    pub async fn kill(&mut self) -> anyhow::Result<ExitStatus> {
        self.signal(Signal::SIGKILL)?;
        self.wait().await
    }

    /// Suspends the agent (SIGSTOP).
    pub fn suspend(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Resumes the agent (SIGCONT).
    pub fn resume(&self) -> anyhow::Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Limits the agent's memory: the kernel kills it when it needs more than `bytes`.
    pub fn limit_memory(&self, bytes: u64) -> anyhow::Result<MemoryLimit> {
        MemoryLimit::set(&self.container, self.process.pid, bytes)
    }

    /// Waits for the agent to exit by itself, or after [`AgentProcess::terminate`].
    pub async fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        let status = timeout(STOP_TIMEOUT, self.child.wait()).await.with_context(|| {
            format!("the agent still runs {STOP_TIMEOUT:?} after it was asked to stop:\n{}", self.log_tail())
        })??;
        cgroupfs::remove(&self.container)?;
        Ok(status)
    }

    /// The log so far.
    pub fn log_text(&self) -> anyhow::Result<String> {
        fs::read_to_string(&self.log).with_context(|| format!("cannot read {}", self.log.display()))
    }

    /// The end of the log, or why it cannot be read.
    pub fn log_tail(&self) -> String {
        match self.log_text() {
            Ok(text) => {
                let lines: Vec<&str> = text.lines().collect();
                lines[lines.len().saturating_sub(LOG_TAIL)..].join("\n")
            }
            Err(error) => format!("{error:#}"),
        }
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        // The number is still ours: the child has not been waited for.
        kill(Pid::from_raw(self.process.pid.cast_signed()), signal)
            .with_context(|| format!("cannot send {signal} to the agent"))
    }
}

/// A pod of the agent, as its `DaemonSet` makes it.
pub(crate) fn pod_spec(name: &str) -> PodSpec {
    PodSpec { service_account: "podgate".to_owned(), host_network: true, ..PodSpec::new("kube-system", name) }
}
