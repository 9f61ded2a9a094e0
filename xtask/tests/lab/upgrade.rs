//! The agent is replaced, and killed, again and again under a steady load: how often, and what became of the requests, is
//! printed.

use std::{
    collections::BTreeSet,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use lab::{EnvKind, Pod};
use tokio::{process::Child, time::sleep};

use crate::node::{self, Node};

const LOAD: &str = include_str!("load.py");
const UPGRADES: usize = 100;
const CRASHES: usize = 50;
/// Requests a second, each on a connection of its own.
const RATE: u64 = 100;
/// Between two changes.
const PAUSE: Duration = Duration::from_millis(100);
/// What a request may take while agents are killed under it.
const LONGEST: f64 = 1000.0;

/// A load that runs until it is told to end.
struct Load {
    client: Child,
    began: Instant,
}

/// What became of the requests.
struct Requests(Vec<(f64, f64, String)>);

// === impl Load ===

impl Load {
    async fn start(node: &Node, pod: &Pod) -> anyhow::Result<Self> {
        let program = ["python3", "-c", LOAD, "169.254.169.254", &RATE.to_string()];
        let mut command = node.lab.exec(pod, EnvKind::None, &program)?;
        let client = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        // Its session and its first requests.
        sleep(Duration::from_secs(1)).await;
        Ok(Self { client, began: Instant::now() })
    }

    /// Ends it. The load must have been as steady as it is to be.
    async fn end(mut self) -> anyhow::Result<Requests> {
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
    /// Those that got no credentials.
    fn failed(&self) -> Vec<&(f64, f64, String)> {
        self.0.iter().filter(|(_, _, outcome)| !outcome.starts_with("ASIA")).collect()
    }

    /// The longest time from when a request was due to its end, in milliseconds.
    fn longest(&self) -> f64 {
        self.0.iter().map(|(_, took, _)| *took).fold(0.0, f64::max)
    }

    /// Every set of credentials must be the pod's own.
    fn assert_own(&self, node: &Node, pod: &Pod) {
        let keys: BTreeSet<_> = self.0.iter().map(|(_, _, outcome)| outcome).collect();
        for key in keys.into_iter().filter(|key| key.starts_with("ASIA")) {
            let issued = node.lab.eks_auth.issued(key);
            let issued = issued.unwrap_or_else(|| panic!("EKS Auth never handed out {key:?}"));
            assert_eq!(issued.pod_uid, pod.uid);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn upgrades_under_load_lose_no_request() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let pod = node.pod("busy")?;
    let pods = [node.lab.add_agent_pod("podgate-other")?, node.lab.agent_pod.clone()];
    let spec = node::agent(&["--imds", "intercept"])?;
    let load = Load::start(&node, &pod).await?;
    for pod in pods.iter().cycle().take(UPGRADES) {
        let successor = node.lab.start_agent_in(pod, &spec).await?;
        let former = std::mem::replace(&mut node.agent, successor);
        assert!(former.stop().await?.success());
    }
    let requests = load.end().await?;
    let failed = requests.failed();
    println!(
        "{UPGRADES} upgrades: {} requests, {} failed, longest pause {:.0} ms",
        requests.0.len(),
        failed.len(),
        requests.longest()
    );
    assert!(failed.is_empty(), "{failed:?}");
    requests.assert_own(&node, &pod);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_dies_at_once_is_succeeded_by_the_agent_before_it() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("busy")?;
    let other = node.lab.add_agent_pod("podgate-other")?;
    let spec = node::agent(&["--imds", "intercept"])?;
    let load = Load::start(&node, &pod).await?;
    let mut lost = 0;
    for _ in 0..5 {
        let mut successor = node.lab.start_agent_in(&other, &spec).await?;
        successor.kill().await?;
        sleep(Duration::from_millis(1800)).await;
        lost += 1;
    }
    let requests = load.end().await?;
    // Those that the dead one had accepted are lost with it, and nothing else.
    let failed = requests.failed();
    let reset = |outcome: &str| outcome.starts_with("error 104") || outcome.starts_with("status 0");
    println!(
        "{lost} successors killed: {} requests, {} reset, longest pause {:.0} ms",
        requests.0.len(),
        failed.len(),
        requests.longest()
    );
    assert!(failed.iter().all(|(_, _, outcome)| reset(outcome)), "{failed:?}");
    assert!(failed.len() <= 5 * lost, "{failed:?}");
    assert!(requests.longest() < LONGEST);
    requests.assert_own(&node, &pod);
    assert!(node.agent.log_text()?.contains("taking charge again"), "{}", node.agent.log_tail());
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn crashes_under_load_give_nobody_a_wrong_role_and_let_nobody_wait() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let pod = node.pod("busy")?;
    let spec = node::agent(&["--imds", "intercept"])?;
    let load = Load::start(&node, &pod).await?;
    for _ in 0..CRASHES {
        node.agent.kill().await?;
        node.agent = node.lab.start_agent(&spec).await?;
        sleep(PAUSE).await;
    }
    let requests = load.end().await?;
    let failed = requests.failed();
    println!(
        "{CRASHES} crashes: {} requests, {} refused, longest pause {:.0} ms",
        requests.0.len(),
        failed.len(),
        requests.longest()
    );
    // ECONNREFUSED, ECONNRESET and EPERM, or an end without an answer.
    let refused = ["error 111", "error 104", "error 1:", "status 0"];
    let is_refusal = |outcome: &str| refused.iter().any(|refusal| outcome.starts_with(refusal));
    let others: Vec<_> = failed.iter().filter(|(_, _, outcome)| !is_refusal(outcome)).collect();
    assert!(others.is_empty(), "{others:?}");
    assert!(requests.longest() < LONGEST);
    requests.assert_own(&node, &pod);
    node.down().await
}
