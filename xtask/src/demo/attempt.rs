//! One attempt of a real client to get credentials, from a pod or from the node.
//!
//! Owns what a client does and what it answers. The verdict is `case`'s, from what the servers recorded.

use std::{process::Stdio, time::Duration};

use anyhow::{Context as _, bail};
use lab::{EnvKind, Lab, Pod};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, Command},
    time::timeout,
};

use crate::clients::Boto3;

pub(super) const IMDS: &str = "http://169.254.169.254";
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
const POD_IDENTITY: &str = "http://169.254.170.23/v1/credentials";
/// Longer than any client here waits by itself.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Where a client runs.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source<'a> {
    /// In a pod's container.
    Pod(&'a Pod),
    /// On the node, outside any pod.
    Node,
}

/// Its result.
#[derive(Debug, Default)]
pub(super) struct Attempt {
    /// The access key that the client ended up with.
    pub(super) access_key_id: Option<String>,
    /// HTTP status of the last answer, where the client shows it; 0 for none.
    pub(super) status: Option<u16>,
    /// Body of the last answer, or the client's error.
    pub(super) message: String,
    /// As the client itself measured it.
    pub(super) milliseconds: f64,
    /// The client's version, where it tells.
    pub(super) version: Option<String>,
}

#[derive(Deserialize)]
struct Boto3Line {
    version: String,
    access_key_id: Option<String>,
    error: Option<String>,
    milliseconds: f64,
}

#[derive(Deserialize)]
struct Credentials {
    #[serde(rename = "AccessKeyId")]
    access_key_id: String,
}

// === impl Attempt ===

impl Attempt {
    /// Counts one of curl's answers; its body may be credentials.
    fn add(&mut self, answer: Answer) {
        self.milliseconds += answer.milliseconds;
        self.status = Some(answer.status);
        self.access_key_id =
            serde_json::from_str::<Credentials>(&answer.body).ok().map(|found| found.access_key_id);
        self.message = answer.body;
    }

    fn succeeded(&self) -> bool {
        self.status == Some(200)
    }
}

struct Answer {
    status: u16,
    body: String,
    milliseconds: f64,
}

/// curl speaking IMDSv1: the role's name, then its credentials.
pub(super) async fn imds_v1(lab: &Lab, source: Source<'_>) -> anyhow::Result<Attempt> {
    imds(lab, source, &[]).await
}

/// curl speaking IMDSv2: a token first. `options` are added to each call.
pub(super) async fn imds_v2(lab: &Lab, source: Source<'_>, options: &[&str]) -> anyhow::Result<Attempt> {
    let mut token = vec!["-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 21600"];
    token.extend(options);
    let url = format!("{IMDS}/latest/api/token");
    let answer = curl(lab, source, &token, &url).await?;
    if answer.status != 200 {
        let mut attempt = Attempt::default();
        attempt.add(answer);
        return Ok(attempt);
    }
    let header = format!("X-aws-ec2-metadata-token: {}", answer.body);
    let mut options = options.to_vec();
    options.extend(["-H", &header]);
    let mut attempt = imds(lab, source, &options).await?;
    attempt.milliseconds += answer.milliseconds;
    Ok(attempt)
}

/// curl at the Pod Identity endpoint, without a token.
pub(super) async fn pod_identity(lab: &Lab, source: Source<'_>) -> anyhow::Result<Attempt> {
    let mut attempt = Attempt::default();
    attempt.add(curl(lab, source, &[], POD_IDENTITY).await?);
    Ok(attempt)
}

/// boto3's default chain.
pub(super) async fn boto3(
    lab: &Lab,
    pod: &Pod,
    environment: EnvKind,
    client: &Boto3,
) -> anyhow::Result<Attempt> {
    let output = finish(lab.exec(pod, environment, &client.command())?).await?;
    boto3_line(&output)
}

/// boto3's default chain in several pods, started at the same instant.
pub(super) async fn boto3_at_once(lab: &Lab, pods: &[&Pod], client: &Boto3) -> anyhow::Result<Vec<Attempt>> {
    let mut command = client.command();
    command.push("wait".to_owned());
    let mut waiting = Vec::new();
    for pod in pods {
        let mut child = lab
            .exec(pod, EnvKind::None, &command)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()?;
        let stdout = child.stdout.take().context("BUG: the client's output is not a pipe")?;
        let mut lines = BufReader::new(stdout).lines();
        let first =
            timeout(CLIENT_TIMEOUT, lines.next_line()).await.context("a client hangs at its start")??;
        if first.as_deref() != Some("ready") {
            bail!("a client in {} did not start: {first:?}", pod.full_name());
        }
        waiting.push((child, lines));
    }
    for (child, _) in &mut waiting {
        go(child).await?;
    }
    let mut attempts = Vec::new();
    for (_child, mut lines) in waiting {
        let line = timeout(CLIENT_TIMEOUT, lines.next_line()).await.context("a client hangs")??;
        attempts.push(boto3_line(&line.context("a client exited without an answer")?)?);
    }
    Ok(attempts)
}

async fn go(child: &mut Child) -> anyhow::Result<()> {
    let stdin = child.stdin.as_mut().context("BUG: the client's input is not a pipe")?;
    Ok(stdin.write_all(b"\n").await?)
}

async fn imds(lab: &Lab, source: Source<'_>, options: &[&str]) -> anyhow::Result<Attempt> {
    let mut attempt = Attempt::default();
    attempt.add(curl(lab, source, options, &format!("{IMDS}{ROLES}")).await?);
    if attempt.succeeded() {
        let role = attempt.message.clone();
        attempt.add(curl(lab, source, options, &format!("{IMDS}{ROLES}{role}")).await?);
    }
    Ok(attempt)
}

async fn curl(lab: &Lab, source: Source<'_>, options: &[&str], url: &str) -> anyhow::Result<Answer> {
    let mut command = vec!["curl", "--silent", "--max-time", "10"];
    command.extend(["--write-out", "\n%{http_code} %{time_total} %{errormsg}"]);
    command.extend(options);
    command.push(url);
    let command = match source {
        Source::Pod(pod) => lab.exec(pod, EnvKind::None, &command)?,
        Source::Node => lab.on_node(&command)?,
    };
    let output = finish(command).await?;
    let (body, numbers) = output.rsplit_once('\n').context("curl did not write its numbers")?;
    let (status, rest) = numbers.split_once(' ').context("curl did not write its numbers")?;
    let (seconds, error) = rest.split_once(' ').context("curl did not write its numbers")?;
    Ok(Answer {
        status: status.parse()?,
        body: if error.is_empty() { body } else { error }.to_owned(),
        milliseconds: seconds.parse::<f64>()? * 1000.0,
    })
}

/// Runs a client until it exits, with any status; its standard error is the demo's.
async fn finish(mut command: Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = timeout(CLIENT_TIMEOUT, output).await.context("a client hangs")??;
    String::from_utf8(output.stdout).context("a client's output is not text")
}

fn boto3_line(line: &str) -> anyhow::Result<Attempt> {
    let line: Boto3Line = serde_json::from_str(line).with_context(|| format!("boto3 printed {line:?}"))?;
    Ok(Attempt {
        access_key_id: line.access_key_id,
        status: None,
        message: line.error.unwrap_or_default(),
        milliseconds: line.milliseconds,
        version: Some(line.version),
    })
}
