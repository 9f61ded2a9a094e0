//! A stand-in for the EKS Pod Identity Agent, as far as it meets podgate: its pod, its netdev, its listeners, its answers.
//!
//! Owns one process from start to exit. It answers with credentials that no other server issues.

use std::process::Stdio;

use anyhow::{Context as _, bail};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::pod::PodSpec;

/// The access key that it answers with.
pub const ACCESS_KEY_ID: &str = "ASIAEKSAGENT00000000";
/// The `DaemonSet` whose pods are the EKS Pod Identity Agent, and the namespace that it is in.
pub const DAEMON_SET: &str = "eks-pod-identity-agent";
/// See [`DAEMON_SET`].
pub const NAMESPACE: &str = "kube-system";

/// What runs in its pod.
const PROGRAM: &str = include_str!("eks_agent_process.py");
/// What the program prints once it listens and has reached itself.
const SERVING: &str = "serving";

/// The running process; killed when dropped.
#[derive(Debug)]
pub struct EksAgent {
    child: Child,
}

// === impl EksAgent ===

impl EksAgent {
    /// Starts it by a command that runs [`command`] in its pod, and waits until it serves. An error where it exits
    /// instead, because it cannot listen.
    pub(crate) async fn start(mut command: Command) -> anyhow::Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start the EKS Pod Identity Agent's program")?;
        let stdout = child.stdout.take().context("BUG: its output is piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).await?;
        if line.trim_end() != SERVING {
            let mut said = String::new();
            child.stderr.take().context("BUG: its errors are piped")?.read_to_string(&mut said).await?;
            bail!("the EKS Pod Identity Agent has ended ({}): {said}", child.wait().await?);
        }
        Ok(Self { child })
    }

    /// Its process, while it has not been waited for.
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// Kills the process; its pod and its netdev stay.
    pub async fn kill(&mut self) -> anyhow::Result<()> {
        self.child.kill().await.context("cannot kill the EKS Pod Identity Agent")
    }

    /// Whether it still runs. It exits when its own probe does not reach it.
    pub fn is_running(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }
}

/// The program and its arguments.
pub(crate) fn command() -> [&'static str; 4] {
    ["python3", "-c", PROGRAM, ACCESS_KEY_ID]
}

/// A pod of it, as its `DaemonSet` makes them.
pub fn pod_spec(name: &str) -> PodSpec {
    PodSpec {
        daemon_set: Some(DAEMON_SET.to_owned()),
        labels: [("app.kubernetes.io/name".to_owned(), DAEMON_SET.to_owned())].into(),
        service_account: DAEMON_SET.to_owned(),
        host_network: true,
        ..PodSpec::new(NAMESPACE, name)
    }
}
