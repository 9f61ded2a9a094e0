//! A steady load from a pod, and what became of its requests.

use std::{
    collections::BTreeSet,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use lab::{EnvKind, Pod};
use tokio::{process::Child, time::sleep};

use crate::lab_node::Node;

const PROGRAM: &str = include_str!("load.py");
/// Requests a second, each on a connection of its own.
const RATE: u64 = 100;

/// A load that runs until it is told to end.
pub(crate) struct Load {
    client: Child,
    began: Instant,
}

/// What became of the requests.
pub(crate) struct Requests(Vec<(f64, f64, String)>);

// === impl Load ===

impl Load {
    /// Requests for credentials as IMDSv2 has them.
    pub(crate) async fn of_imds(node: &Node, pod: &Pod) -> anyhow::Result<Self> {
        Self::start(node, pod, &["169.254.169.254", &RATE.to_string()]).await
    }

    /// Requests for credentials at EKS Pod Identity's address, without a token.
    pub(crate) async fn of_pod_identity(node: &Node, pod: &Pod) -> anyhow::Result<Self> {
        Self::start(node, pod, &["169.254.170.23", &RATE.to_string(), "/v1/credentials"]).await
    }

    async fn start(node: &Node, pod: &Pod, arguments: &[&str]) -> anyhow::Result<Self> {
        let program = [&["python3", "-c", PROGRAM], arguments].concat();
        let mut command = node.lab.exec(pod, EnvKind::None, &program)?;
        let client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        // Its session and its first requests.
        sleep(Duration::from_secs(1)).await;
        Ok(Self { client, began: Instant::now() })
    }

    /// Ends it. The load must have been as steady as it is to be.
    pub(crate) async fn end(mut self) -> anyhow::Result<Requests> {
        drop(self.client.stdin.take());
        let due = self.began.elapsed().as_secs() * RATE;
        let output = self.client.wait_with_output().await?;
        let requests: Vec<_> = serde_json::from_slice(&output.stdout).context("the load says nothing")?;
        assert!(requests.len() as u64 >= due, "{} of {due} requests", requests.len());
        Ok(Requests(requests))
    }
}

// === impl Requests ===

impl Requests {
    /// How many there were.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// Those that got no credentials.
    pub(crate) fn failed(&self) -> Vec<&(f64, f64, String)> {
        self.0.iter().filter(|(_, _, outcome)| !outcome.starts_with("ASIA")).collect()
    }

    /// The longest time from when a request was due to its end, in milliseconds.
    pub(crate) fn longest(&self) -> f64 {
        self.0.iter().map(|(_, took, _)| *took).fold(0.0, f64::max)
    }

    /// Every set of credentials must be the pod's own.
    pub(crate) fn assert_own(&self, node: &Node, pod: &Pod) {
        let keys: BTreeSet<_> = self.0.iter().map(|(_, _, outcome)| outcome).collect();
        for key in keys.into_iter().filter(|key| key.starts_with("ASIA")) {
            let issued = node.lab.eks_auth.issued(key);
            let issued = issued.unwrap_or_else(|| panic!("EKS Auth never handed out {key:?}"));
            assert_eq!(issued.pod_uid, pod.uid);
        }
    }
}
