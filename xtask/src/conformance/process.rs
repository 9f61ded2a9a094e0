//! A client that runs in a pod.
//!
//! Owns its process and the lines that it prints: one for each resolution. Whether an answer is right is decided elsewhere.

use std::{process::Stdio, time::Duration};

use anyhow::{Context as _, bail};
use lab::{EnvKind, Lab, Pod};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout},
    time::timeout,
};

/// Longer than any client here may take, started on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(1);

/// What a client prints: credentials or an error.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Answer {
    /// Of the SDK.
    pub(super) version: String,
    /// The access key that it ended up with.
    pub(super) access_key_id: Option<String>,
    /// Why there is none.
    pub(super) error: Option<String>,
    /// Until when the SDK takes it to be good.
    pub(super) expires: Option<String>,
    /// Where the SDK says that it is from.
    pub(super) source: Option<String>,
    /// How long the SDK took; starting the process is not counted.
    pub(super) ms: f64,
}

/// A client that stays until it is dropped.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

// === impl Running ===

impl Running {
    /// Starts a client, which resolves at once.
    pub(super) fn start(lab: &Lab, pod: &Pod, injected: EnvKind, command: &[&str]) -> anyhow::Result<Self> {
        let mut command = lab.exec(pod, injected, command)?;
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start the client")?;
        let stdin = child.stdin.take().context("BUG: the client's input is not a pipe")?;
        let stdout = child.stdout.take().context("BUG: the client's output is not a pipe")?;
        Ok(Self { child, stdin, lines: BufReader::new(stdout).lines() })
    }

    /// Lets it resolve again.
    pub(super) async fn again(&mut self) -> anyhow::Result<Answer> {
        self.stdin.write_all(b"\n").await.context("the client has ended")?;
        self.answer().await
    }

    /// What it prints next.
    pub(super) async fn answer(&mut self) -> anyhow::Result<Answer> {
        let line = timeout(TIMEOUT, self.line())
            .await
            .with_context(|| format!("the client still hangs after {TIMEOUT:?}"))??;
        serde_json::from_str(&line).with_context(|| format!("the client printed {line:?}"))
    }

    async fn line(&mut self) -> anyhow::Result<String> {
        while let Some(line) = self.lines.next_line().await? {
            // Some SDKs log there, too.
            if line.starts_with('{') {
                return Ok(line);
            }
        }
        let mut errors = String::new();
        let mut stderr = self.child.stderr.take().context("BUG: the client's errors are not a pipe")?;
        stderr.read_to_string(&mut errors).await?;
        bail!("the client ended without an answer: {}", errors.trim());
    }
}
