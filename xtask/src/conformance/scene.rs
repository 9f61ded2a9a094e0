//! The simulated nodes that the clients are put on, and what happens there.
//!
//! Owns the order of the situations, and whose an access key is by the records of the simulated AWS side.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, ensure};
use futures::{StreamExt as _, stream};
use lab::{
    AgentProcess, AgentSpec, EnvKind, Lab, LabSpec, NODE_ACCESS_KEY_ID, Pod, PodSpec, enter,
    simulated_network::Routing,
};

use super::{
    Subject,
    cell::{Cell, Owner, Verdict},
    column::{Column, PodKind},
    process::{Answer, Running},
    progress::Progress,
};

/// How many clients resolve at the same time.
const AT_ONCE: usize = 4;
/// Pods are kept from the node's role.
const FLAGS: [&str; 4] = ["--imds", "intercept", "--token-delegate", "kube-system/csi-driver"];
const DRIVER: (&str, &str) = ("kube-system", "csi-driver");
/// The namespace's annotation, and its value where only Pod Identity is podgate's.
const AUDIT: (&str, &str, &str) = ("audited", "podgate.dev/imds", "audit");

const POD_IDENTITY: &str = "http://169.254.170.23/v1/credentials";
const POD_IDENTITY_V6: &str = "http://[fd00:ec2::23]/v1/credentials";

/// A simulated node with pods for every client.
pub(super) struct Scene<'a> {
    pub(super) lab: Lab,
    subjects: &'a [Subject],
    progress: &'a Progress,
    pods: BTreeMap<(&'static str, PodKind), Pod>,
    /// One that may present the tokens of others.
    driver: Pod,
}

/// What has been found on a node.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) cells: Vec<Cell>,
    /// How often a pod in `intercept` has read the node's role.
    pub(super) leaks: u64,
}

/// The node on which nearly everything happens.
pub(super) async fn main_node(
    binary: &Path,
    subjects: &[Subject],
    progress: &Progress,
) -> anyhow::Result<Found> {
    let scene = Scene::up("main", Routing::VpcCni, subjects, &PodKind::MAIN, progress)?;
    scene.lab.cluster.annotate_namespace(AUDIT.0, AUDIT.1, Some(AUDIT.2));
    let agent = scene.start_agent(binary).await?;
    let mut found = scene
        .ask(&[
            Column::ImdsV2,
            Column::ImdsV1,
            Column::Webhook,
            Column::NoToken,
            Column::Ecs,
            Column::Delegate,
            Column::UnassociatedImds,
            Column::UnassociatedWebhook,
        ])
        .await;
    let (upgraded, mut agent) = scene.upgrade(agent, binary).await?;
    found.cells.extend(upgraded);
    agent.kill().await?;
    found.add(scene.ask(&[Column::KilledImds, Column::KilledWebhook]).await);
    found.cells.extend(scene.ask(&[Column::AuditImds, Column::AuditWebhook]).await.cells);
    scene.down()?;
    Ok(found)
}

/// A node whose pods have IPv6 only.
pub(super) async fn ipv6_node(
    binary: &Path,
    subjects: &[Subject],
    progress: &Progress,
) -> anyhow::Result<Found> {
    let scene = Scene::up("v6", Routing::Ipv6Only, subjects, &[PodKind::V1, PodKind::Injected], progress)?;
    let agent = scene.start_agent(binary).await?;
    let found = scene.ask(&[Column::Imds6, Column::PodIdentity6]).await;
    agent.stop().await?;
    scene.down()?;
    Ok(found)
}

/// A node in `audit`, whose pods somebody has pointed at podgate by hand.
pub(super) async fn audit_node(
    binary: &Path,
    subjects: &[Subject],
    progress: &Progress,
) -> anyhow::Result<Found> {
    let scene = Scene::up("audit", Routing::VpcCni, subjects, &[PodKind::ByHand], progress)?;
    let agent = scene.start_agent_with(binary, &["--imds", "audit"]).await?;
    let found = scene.ask(&[Column::ByHand]).await;
    agent.stop().await?;
    scene.down()?;
    Ok(found)
}

// === impl Found ===

impl Found {
    pub(super) fn add(&mut self, other: Self) {
        self.cells.extend(other.cells);
        self.leaks += other.leaks;
    }
}

// === impl Scene ===

impl<'a> Scene<'a> {
    /// A node with these pods for each client, and no agent yet.
    pub(super) fn up(
        name: &str,
        routing: Routing,
        subjects: &'a [Subject],
        kinds: &[PodKind],
        progress: &'a Progress,
    ) -> anyhow::Result<Self> {
        let name = format!("conform-{name}-{}", std::process::id());
        let lab = Lab::up(LabSpec { routing, ..LabSpec::new(&name, enter::OWN_EXECUTABLE) })?;
        let mut pods = BTreeMap::new();
        for subject in subjects {
            for kind in kinds {
                let name = subject.client.name;
                pods.insert((name, *kind), lab.add_pod(&kind.spec(name))?);
            }
        }
        let driver = lab.add_pod(&PodSpec::new(DRIVER.0, DRIVER.1))?;
        Ok(Self { lab, subjects, progress, pods, driver })
    }

    /// Starts the agent and lets it read the node's role, which it signs with: whoever reads it later is a pod.
    pub(super) async fn start_agent(&self, binary: &Path) -> anyhow::Result<AgentProcess> {
        self.start_agent_with(binary, &FLAGS).await
    }

    async fn start_agent_with(&self, binary: &Path, flags: &[&str]) -> anyhow::Result<AgentProcess> {
        let agent = self.lab.start_agent(&AgentSpec::new(binary, flags)).await?;
        self.sign_once().await?;
        Ok(agent)
    }

    pub(super) fn down(self) -> anyhow::Result<()> {
        self.lab.down().context("the simulated node could not be removed")
    }

    pub(super) fn pod(&self, subject: &Subject, column: Column) -> anyhow::Result<&Pod> {
        self.pods.get(&(subject.client.name, column.pod())).context("BUG: this node has no such pod")
    }

    /// Whose an access key is, if there is one.
    pub(super) fn owner(&self, pod: &Pod, access_key_id: Option<&str>) -> Option<Owner> {
        let key = access_key_id?;
        Some(match self.lab.eks_auth.issued(key) {
            _ if key == NODE_ACCESS_KEY_ID => Owner::Node,
            Some(issued) if issued.pod_uid == pod.uid => Owner::Pod,
            Some(issued) => Owner::Other(format!("{}/{}", issued.namespace, issued.service_account)),
            None => Owner::Other(format!("nobody: {key} was never issued")),
        })
    }

    /// Puts every client into these situations.
    async fn ask(&self, columns: &[Column]) -> Found {
        let reads = self.lab.imds.credential_reads();
        let all =
            columns.iter().flat_map(|column| self.subjects.iter().map(|subject| self.once(subject, *column)));
        let cells = stream::iter(all).buffer_unordered(AT_ONCE).collect().await;
        Found { cells, leaks: self.lab.imds.credential_reads() - reads }
    }

    async fn once(&self, subject: &Subject, column: Column) -> Cell {
        let answer = async { self.start(subject, column, &[])?.answer().await };
        self.judge(subject, column, &answer.await)
    }

    /// Starts a client, which resolves at once.
    pub(super) fn start(
        &self,
        subject: &Subject,
        column: Column,
        arguments: &[&str],
    ) -> anyhow::Result<Running> {
        let pod = self.pod(subject, column)?;
        let (injected, variables) = column.environment();
        let mut command = vec!["env"];
        command.extend(variables);
        let (place, token) = match column {
            Column::Delegate => (&self.driver, Some(token_of(pod)?)),
            _ => (pod, None),
        };
        command.extend(token.as_deref());
        command.extend(subject.command.iter().map(String::as_str));
        command.extend(arguments);
        Running::start(&self.lab, place, injected, &command)
    }

    /// The cell of a client that was asked.
    pub(super) fn judge(&self, subject: &Subject, column: Column, answer: &anyhow::Result<Answer>) -> Cell {
        let name = subject.client.name;
        let key = answer.as_ref().ok().and_then(|answer| answer.access_key_id.as_deref());
        let cell = match self.pod(subject, column) {
            Ok(pod) => {
                let owner = self.owner(pod, key);
                Cell::new(subject.client, column, answer, owner.as_ref(), &pod.service_account)
            }
            Err(error) => Cell::failed(name, column, Verdict::Wrong, &format!("{error:#}")),
        };
        self.progress.done(cell)
    }

    /// Lets every client resolve, then puts another agent in the place of the one that answered, and lets the same
    /// processes resolve anew.
    async fn upgrade(&self, agent: AgentProcess, binary: &Path) -> anyhow::Result<(Vec<Cell>, AgentProcess)> {
        let column = Column::Restart;
        let first = stream::iter(self.subjects.iter().map(async |subject| {
            let client = async {
                let mut client = self.start(subject, column, &[])?;
                let answer = client.answer().await?;
                let key = answer.access_key_id.as_deref();
                ensure!(
                    self.owner(self.pod(subject, column)?, key) == Some(Owner::Pod),
                    "was not served in the first place: {}",
                    answer.error.unwrap_or_default()
                );
                Ok(client)
            };
            (subject, client.await)
        }));
        let begun: Vec<_> = first.buffer_unordered(AT_ONCE).collect().await;
        let pod = self.lab.add_agent_pod("podgate-next")?;
        let next = self.lab.start_agent_in(&pod, &AgentSpec::new(binary, &FLAGS)).await?;
        let status = agent.stop().await?;
        ensure!(status.success(), "the agent that was replaced did not stop cleanly: {status}");
        let second = stream::iter(begun.into_iter().map(async |(subject, client)| {
            let answer = match client {
                Ok(mut client) => client.again().await,
                Err(error) => Err(error),
            };
            self.judge(subject, column, &answer)
        }));
        Ok((second.buffer_unordered(AT_ONCE).collect().await, next))
    }

    async fn sign_once(&self) -> anyhow::Result<()> {
        let mut spec = PodSpec::new("shop", "first").role("signing-role");
        // It is intercepted in every mode.
        spec.credentials_uri = Some(POD_IDENTITY.to_owned());
        let pod = self.lab.add_pod(&spec)?;
        let url = if pod.addresses.v4.is_some() { POD_IDENTITY } else { POD_IDENTITY_V6 };
        let ask = [
            "curl",
            "--silent",
            "--show-error",
            "--globoff",
            "--retry",
            "5",
            "--fail",
            "--max-time",
            "10",
            url,
        ];
        let output = self.lab.exec(&pod, EnvKind::None, &ask)?.output().await?;
        ensure!(
            output.status.success(),
            "the agent serves nobody: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }
}

/// The token that the kubelet gives a driver for a pod, as SDKs take it from their environment.
fn token_of(pod: &Pod) -> anyhow::Result<String> {
    let volume = pod.token_volume.as_ref().context("BUG: the pod has no token")?;
    let token = fs::read_to_string(volume.join("eks-pod-identity-token"))?;
    Ok(format!("AWS_CONTAINER_AUTHORIZATION_TOKEN={token}"))
}
