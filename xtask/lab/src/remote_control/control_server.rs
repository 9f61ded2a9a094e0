//! Carrying out commands, one after the other.
//!
//! Owns the socket, the agent's process and the switches of a lab that is up. Never decides when the lab goes down.

use std::{
    convert::Infallible,
    fs,
    os::unix::fs::{DirBuilderExt as _, PermissionsExt as _},
    path::PathBuf,
    process::ExitStatus,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    time::timeout,
};

use super::{AgentTool, NewAgent, NewPod, Reply, Request, Status, directory, socket};
use crate::{
    agent_process::{ADMIN, AgentProcess, AgentSpec},
    pod::{EnvKind, PodSpec},
    process_id::Process,
    simulation::Lab,
    switches::Switchboard,
};

/// How long a client may take to send its command: others wait meanwhile.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest name: that of a label in Kubernetes.
const MAX_NAME: usize = 63;
const NO_AGENT: &str =
    "this lab was started without an agent: `cargo xtask lab agent start --build` builds one";

/// Takes commands for a lab.
#[derive(Debug)]
pub struct ControlServer<'a> {
    lab: &'a Lab,
    listener: UnixListener,
    switchboard: Switchboard,
    agent: Option<AgentProcess>,
    /// What the agent is started with where a command does not say.
    binary: Option<PathBuf>,
    flags: Vec<String>,
}

// === impl ControlServer ===

impl<'a> ControlServer<'a> {
    /// Opens the lab's socket. Commands wait until [`ControlServer::run`]. `flags` are the agent's, until a command
    /// gives others.
    pub fn bind(lab: &'a Lab, flags: &[&str]) -> anyhow::Result<Self> {
        let directory = directory(&lab.node.place.directory);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
        let path = socket(&lab.node.place.directory);
        let listener =
            UnixListener::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        Ok(Self { lab, listener, switchboard: Switchboard::default(), agent: None, binary: None, flags })
    }

    /// Starts the agent and waits until it serves; returns its process ID.
    pub async fn start_agent(&mut self, agent: NewAgent) -> anyhow::Result<u32> {
        self.reap().await?;
        ensure!(self.agent.is_none(), "the agent is running already: `cargo xtask lab agent restart`");
        self.binary = agent.binary.or(self.binary.take());
        let binary = self.binary.clone().context(NO_AGENT)?;
        let args = merge(&self.flags, agent.flags.unwrap_or_default());
        let spec = AgentSpec { args, ..AgentSpec::new(binary, &[]) };
        let agent = self.lab.start_agent(&spec).await?;
        // Flags that the agent refuses do not stay.
        self.flags = spec.args;
        let pid = agent.process().pid;
        self.agent = Some(agent);
        Ok(pid)
    }

    /// Stops the agent, if one runs.
    pub async fn stop_agent(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        match self.agent.take() {
            Some(agent) => Ok(Some(agent.stop().await?)),
            None => Ok(None),
        }
    }

    /// Carries out commands until dropped.
    pub async fn run(&mut self) -> anyhow::Result<Infallible> {
        loop {
            let (stream, _) = self.listener.accept().await.context("cannot accept a command")?;
            // A client that went away has seen to itself.
            let _ = self.answer(stream).await;
        }
    }

    async fn answer(&mut self, stream: UnixStream) -> anyhow::Result<()> {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        timeout(REQUEST_TIMEOUT, stream.read_line(&mut line)).await??;
        let reply = match serde_json::from_str(&line) {
            Ok(request) => match self.carry_out(request).await {
                Ok(value) => Reply::Ok(value),
                Err(error) => Reply::Error(format!("{error:#}")),
            },
            Err(error) => Reply::Error(format!("not a command of this lab's build: {error}")),
        };
        let mut line = serde_json::to_string(&reply)?;
        line.push('\n');
        Ok(stream.write_all(line.as_bytes()).await?)
    }

    async fn carry_out(&mut self, request: Request) -> anyhow::Result<Value> {
        let lab = self.lab;
        match request {
            Request::Status => return Ok(serde_json::to_value(self.status())?),
            Request::FaultOn { name, setting } => {
                return Ok(serde_json::to_value(self.switchboard.turn_on(lab, &name, setting)?)?);
            }
            Request::FaultOff { name: Some(name) } => self.switchboard.turn_off(lab, &name)?,
            Request::FaultOff { name: None } => self.switchboard.turn_all_off(lab)?,
            Request::AddPod(pod) => return add_pod(lab, pod),
            Request::RemovePod { pod } => remove_pod(lab, &pod)?,
            Request::Associate { namespace, service_account, role } => {
                check_names([("namespace", &namespace), ("service account", &service_account)])?;
                lab.associate(&namespace, &service_account, &role)?;
            }
            Request::Dissociate { namespace, service_account } => {
                lab.dissociate(&namespace, &service_account)?;
            }
            Request::AnnotateNamespace { namespace, annotations } => {
                ensure!(lab.cluster.has_namespace(&namespace), "there is no namespace {namespace}");
                for (key, value) in annotations {
                    lab.cluster.annotate_namespace(&namespace, &key, value.as_deref());
                }
            }
            Request::AnnotatePod { pod, annotations } => {
                let pod = lab.pod(&pod)?;
                for (key, value) in annotations {
                    lab.cluster.annotate_pod(&pod.namespace, &pod.name, &key, value.as_deref());
                }
            }
            Request::StartAgent(agent) => return Ok(json!(self.start_agent(agent).await?)),
            Request::RestartAgent(agent) => {
                self.reap().await?;
                self.stop_agent().await?;
                return Ok(json!(self.start_agent(agent).await?));
            }
            Request::StopAgent => {
                self.reap().await?;
                let status = self.stop_agent().await?.context("the agent is not running")?;
                return Ok(json!(status.to_string()));
            }
            Request::KillAgent => {
                self.reap().await?;
                let mut agent = self.agent.take().context("the agent is not running")?;
                return Ok(json!(agent.kill().await?.to_string()));
            }
            Request::Metrics => return self.metrics().await,
            Request::AgentTool => return self.agent_tool(),
        }
        Ok(Value::Null)
    }

    fn status(&self) -> Status {
        let running = self.agent.as_ref().map(AgentProcess::process).filter(Process::is_running);
        Status {
            switches: self.switchboard.list(),
            agent: running.map(|process| process.pid),
            agent_flags: self.flags.clone(),
        }
    }

    /// Collects an agent that has exited by itself.
    async fn reap(&mut self) -> anyhow::Result<()> {
        if let Some(agent) = &mut self.agent
            && !agent.process().is_running()
        {
            agent.wait().await?;
            self.agent = None;
        }
        Ok(())
    }

    async fn metrics(&self) -> anyhow::Result<Value> {
        let answer = self.lab.node.get(ADMIN, "/metrics").await;
        let answer =
            answer.context("the agent does not answer; `cargo xtask lab status` shows whether it runs")?;
        ensure!(answer.status == 200, "the agent answers {}: {}", answer.status, answer.body);
        Ok(json!(answer.body))
    }

    fn agent_tool(&self) -> anyhow::Result<Value> {
        let binary = self.binary.clone().context(NO_AGENT)?;
        Ok(serde_json::to_value(AgentTool { entry: self.lab.agent_tool_entry(), binary })?)
    }
}

fn add_pod(lab: &Lab, pod: NewPod) -> anyhow::Result<Value> {
    let service_account = pod.service_account.unwrap_or_else(|| pod.name.clone());
    check_names([("namespace", &pod.namespace), ("pod", &pod.name), ("service account", &service_account)])?;
    let full_name = format!("{}/{}", pod.namespace, pod.name);
    ensure!(lab.pod(&full_name).is_err(), "there is a pod {full_name} already");
    let added = lab.add_pod(&PodSpec {
        service_account,
        role: pod.role,
        annotations: pod.annotations,
        environment: pod.environment,
        token_volume: pod.environment == EnvKind::Webhook,
        host_network: pod.host_network,
        ..PodSpec::new(&pod.namespace, &pod.name)
    })?;
    Ok(serde_json::to_value(added)?)
}

fn remove_pod(lab: &Lab, name: &str) -> anyhow::Result<()> {
    let pod = lab.pod(name)?;
    ensure!(
        pod.uid != lab.agent_pod.uid,
        "{name} is the agent's own pod: `cargo xtask lab agent stop` stops the agent"
    );
    lab.delete_pod(&pod)
}

/// The flags that were given, and of the others those that they do not replace. A flag's value is the next word, or
/// follows an equals sign.
fn merge(before: &[String], given: Vec<String>) -> Vec<String> {
    let flag = |word: &str| word.split('=').next().unwrap_or_default().to_owned();
    let replaced: Vec<String> =
        given.iter().filter(|word| word.starts_with("--")).map(|word| flag(word)).collect();
    let mut keep = true;
    let mut merged = Vec::new();
    for word in before {
        if word.starts_with("--") {
            keep = !replaced.contains(&flag(word));
        }
        if keep {
            merged.push(word.clone());
        }
    }
    merged.extend(given);
    merged
}

/// Names as Kubernetes takes them; they become parts of paths.
fn check_names<const N: usize>(names: [(&str, &str); N]) -> anyhow::Result<()> {
    for (kind, name) in names {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let good = (1..=MAX_NAME).contains(&name.len())
            && name.bytes().all(inner)
            && !name.starts_with('-')
            && !name.ends_with('-');
        ensure!(good, "a {kind}'s name is up to {MAX_NAME} of a-z, 0-9 and, inside, -; not {name:?}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_flags_replace_earlier_ones_of_the_same_name_only() {
        let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let before = words("--imds intercept --log-format text --prefetch=off");
        for (given, expected) in [
            ("", "--imds intercept --log-format text --prefetch=off"),
            ("--imds deny", "--log-format text --prefetch=off --imds deny"),
            ("--imds=deny --prefetch auto", "--log-format text --imds=deny --prefetch auto"),
        ] {
            assert_eq!(merge(&before, words(given)), words(expected), "{given}");
        }
    }

    #[test]
    fn names_are_those_that_kubernetes_takes() {
        check_names([("pod", "app-1"), ("pod", "a")]).unwrap();
        for bad in ["", "-a", "a-", "A", "a/b", "..", "a b"] {
            assert!(check_names([("pod", bad)]).is_err(), "{bad}");
        }
    }
}
