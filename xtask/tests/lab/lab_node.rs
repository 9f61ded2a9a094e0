//! What the tests have in common: a node with the agent on it, and clients in its pods.

use std::{
    path::PathBuf,
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use lab::{AgentProcess, AgentSpec, EnvKind, Lab, LabSpec, NODE_ACCESS_KEY_ID, Pod, PodSpec};
use serde_json::Value;
use tokio::{
    process::Command,
    time::{sleep, timeout},
};

/// xtask itself, with which labs enter their pods.
pub(crate) const HELPER: &str = env!("CARGO_BIN_EXE_xtask");
pub(crate) const IMDS: &str = "http://169.254.169.254";
pub(crate) const ROLES: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";
pub(crate) const POD_IDENTITY: &str = "http://169.254.170.23/v1/credentials";
/// Longer than anything here may take.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(40);
/// Long enough for listeners to be there, or there again.
const LISTENING: Duration = Duration::from_secs(5);

/// A node with the agent on it.
pub(crate) struct Node {
    pub(crate) lab: Lab,
    pub(crate) agent: AgentProcess,
}

/// What a client in a pod got.
#[derive(Debug)]
pub(crate) struct Answer {
    /// HTTP status; 0 when there was no answer.
    pub(crate) status: u16,
    pub(crate) body: String,
    pub(crate) milliseconds: f64,
}

// === impl Node ===

impl Node {
    /// A node whose agent intercepts calls to the metadata service.
    pub(crate) async fn intercepting() -> anyhow::Result<Self> {
        Self::with_flags(&["--imds", "intercept"]).await
    }

    /// A node whose agent has these flags.
    pub(crate) async fn with_flags(flags: &[&str]) -> anyhow::Result<Self> {
        let lab = lab()?;
        let agent = lab.start_agent(&agent(flags)?).await?;
        Ok(Self { lab, agent })
    }

    /// Takes everything down; the agent must end well.
    pub(crate) async fn down(self) -> anyhow::Result<()> {
        let Self { lab, agent } = self;
        let status = agent.stop().await?;
        assert!(status.success(), "{status}");
        lab.down()
    }

    /// A plain pod in the namespace `shop` whose service account has the role `NAME-role`.
    pub(crate) fn pod(&self, name: &str) -> anyhow::Result<Pod> {
        self.lab.add_pod(&spec(name))
    }

    /// curl in a pod.
    pub(crate) async fn curl(&self, pod: &Pod, arguments: &[&str]) -> anyhow::Result<Answer> {
        answer(self.lab.exec(pod, EnvKind::None, &curl(arguments))?).await
    }

    /// curl in a pod, but through another pod's network.
    pub(crate) async fn curl_through(
        &self,
        pod: &Pod,
        network_of: &Pod,
        arguments: &[&str],
    ) -> anyhow::Result<Answer> {
        answer(self.lab.exec_through(pod, network_of, &curl(arguments))?).await
    }

    /// curl on the node, outside any pod.
    pub(crate) async fn curl_on_node(&self, arguments: &[&str]) -> anyhow::Result<Answer> {
        answer(self.lab.on_node(&curl(arguments))?).await
    }

    /// The port at which podgate listens in a pod's own network, once the pod's connections go there.
    pub(crate) async fn listener_port(&self, pod: &Pod) -> anyhow::Result<u16> {
        let question = format!("/whois/{}", pod.sandbox.pid);
        let begun = Instant::now();
        while begun.elapsed() < LISTENING {
            let answer: Value = serde_json::from_str(&self.lab.node.ask_agent(&question).await?.body)?;
            if let Some(port) = answer["listener_port"].as_u64() {
                return Ok(port.try_into()?);
            }
            sleep(Duration::from_millis(10)).await;
        }
        bail!("nothing listens in the network of {}", pod.full_name())
    }

    /// A shell's script in a pod, which must succeed.
    pub(crate) async fn shell(&self, pod: &Pod, script: &str) -> anyhow::Result<()> {
        let status = self.lab.exec(pod, EnvKind::None, &["sh", "-ec", script])?.status().await?;
        ensure!(status.success(), "{script}: {status}");
        Ok(())
    }

    /// How many veths end on the node: one for each pod's network, and the uplink.
    pub(crate) async fn veths(&self) -> anyhow::Result<usize> {
        let listed = text(self.lab.on_node(&["ip", "-o", "link", "show", "type", "veth"])?).await?;
        Ok(listed.lines().count())
    }

    /// A Python program in a pod; what it prints.
    pub(crate) async fn python(&self, pod: &Pod, program: &str) -> anyhow::Result<String> {
        text(self.lab.exec(pod, EnvKind::None, &["python3", "-c", program])?).await
    }

    /// The session token and then the role's credentials, as every SDK with IMDSv2 asks for them. `options` are
    /// curl's, for each request; `host` is the URL's.
    pub(crate) async fn imds_v2(&self, pod: &Pod, host: &str, options: &[&str]) -> anyhow::Result<Answer> {
        let header = self.session(pod, host, options).await?;
        let roles = format!("{host}/latest/meta-data/iam/security-credentials/");
        let mut ask = vec!["-H", header.as_str()];
        ask.extend(options);
        let role = self.curl(pod, &[&ask[..], &[roles.as_str()]].concat()).await?;
        assert_eq!(role.status, 200, "{role:?}");
        let role = format!("{roles}{}", role.body);
        self.curl(pod, &[&ask[..], &[role.as_str()]].concat()).await
    }

    /// The header of a new IMDSv2 session.
    pub(crate) async fn session(&self, pod: &Pod, host: &str, options: &[&str]) -> anyhow::Result<String> {
        let url = format!("{host}/latest/api/token");
        let mut ask = vec!["-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 21600", &url];
        ask.extend(options);
        let token = self.curl(pod, &ask).await?;
        assert_eq!(token.status, 200, "{token:?}");
        Ok(format!("X-aws-ec2-metadata-token: {}", token.body))
    }

    /// The answer must hold credentials that EKS Auth handed out for this pod and for its role.
    pub(crate) fn assert_own_role(&self, pod: &Pod, answer: &Answer) {
        assert_eq!(answer.status, 200, "{answer:?}\n{}", self.agent.log_tail());
        let key = answer.access_key_id().unwrap_or_default();
        let issued = self.lab.eks_auth.issued(&key);
        let issued = issued.unwrap_or_else(|| panic!("EKS Auth never handed out {key:?}"));
        assert_eq!(issued.pod_uid, pod.uid);
        assert_eq!(
            (&issued.namespace, &issued.service_account, Some(&issued.role_name)),
            (&pod.namespace, &pod.service_account, pod.role.as_ref())
        );
    }
}

// === impl Answer ===

impl Answer {
    /// The credentials in the body, if there are any.
    pub(crate) fn access_key_id(&self) -> Option<String> {
        let body: Value = serde_json::from_str(&self.body).ok()?;
        Some(body["AccessKeyId"].as_str()?.to_owned())
    }

    /// A refusal with this status, without credentials, that says all of `words`.
    pub(crate) fn assert_refused(&self, status: u16, words: &[&str]) {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.access_key_id(), None, "{self:?}");
        assert!(!self.body.contains(NODE_ACCESS_KEY_ID), "{self:?}");
        for word in words {
            assert!(self.body.contains(word), "{word}: {self:?}");
        }
    }
}

/// A lab with a name of its own.
pub(crate) fn lab() -> anyhow::Result<Lab> {
    Lab::up(LabSpec::new(&lab_name(), HELPER))
}

/// A name that no other test has.
pub(crate) fn lab_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The agent under test.
pub(crate) fn agent(flags: &[&str]) -> anyhow::Result<AgentSpec> {
    Ok(AgentSpec::new(agent_binary()?, flags))
}

/// The binary under test.
pub(crate) fn agent_binary() -> anyhow::Result<PathBuf> {
    let path =
        std::env::var_os("PODGATE_AGENT").context("PODGATE_AGENT: run `cargo xtask test --tier lab`")?;
    Ok(path.into())
}

/// The build in which defenses can be switched off; none is, and it can be of another ABI.
pub(crate) fn undefended_binary() -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PODGATE_UNDEFENDED")
        .context("PODGATE_UNDEFENDED: run `cargo xtask test --tier lab`")?;
    Ok(path.into())
}

/// A pod of the namespace `shop` whose service account has the role `NAME-role`.
pub(crate) fn spec(name: &str) -> PodSpec {
    PodSpec::new("shop", name).role(&format!("{name}-role"))
}

/// A command's standard output.
pub(crate) async fn text(mut command: Command) -> anyhow::Result<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = timeout(CLIENT_TIMEOUT, output).await.context("a client hangs")??;
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

fn curl<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    let mut command = vec!["curl", "--silent", "--globoff", "--max-time", "30"];
    command.extend(["--write-out", "\n%{http_code} %{time_total}"]);
    command.extend(arguments);
    command
}

async fn answer(command: Command) -> anyhow::Result<Answer> {
    let output = text(command).await?;
    let (body, numbers) = output.rsplit_once('\n').context("curl did not write its numbers")?;
    let (status, seconds) = numbers.split_once(' ').context("curl did not write its numbers")?;
    let milliseconds = seconds.parse::<f64>()? * 1000.0;
    Ok(Answer { status: status.parse()?, body: body.to_owned(), milliseconds })
}
