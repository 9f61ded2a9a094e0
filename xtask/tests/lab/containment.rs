//! What leaves a pod other than by connect, and what pods in audit ask the real IMDS for.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use lab::{EnvKind, NODE_ROLE, agent_process::ADMIN};
use serde_json::Value;
use tokio::time::sleep;

use crate::{
    lab_node::{self, IMDS, Node, ROLES},
    policy::effective,
};

/// In which the agent has measured its node's IMDS.
const SOON: Duration = Duration::from_secs(20);
/// Makes an address of a documentation range another name of IMDS, in the network that it is loaded in.
const TRANSLATE: &str = "add table ip way_round
add chain ip way_round output { type nat hook output priority -100; }
add rule ip way_round output ip daddr 198.51.100.1 dnat to 169.254.169.254";

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_translates_addresses_is_stopped_by_filter_and_fence() -> anyhow::Result<()> {
    for (filter, reason) in [("auto", "egress_dropped"), ("off", "fence_dropped")] {
        let node = Node::with_flags(&["--imds", "intercept", "--egress-filter", filter]).await?;
        let pod = node.pod("translator")?;
        effective(&node, &pod, "Intercept", "Default").await?;
        let rules = node.lab.exec(&pod, EnvKind::None, &["nft", TRANSLATE])?.status().await?;
        assert!(rules.success(), "nft: {rules}");
        let reads = node.lab.imds.requests().len();

        let translated = ROLES.replace("169.254.169.254", "198.51.100.1");
        let answer = node.curl(&pod, &["--connect-timeout", "2", &translated]).await?;
        assert_eq!(answer.status, 0, "egress filter {filter}: {answer:?}");
        assert_eq!(node.lab.imds.requests().len(), reads, "egress filter {filter}");
        // The first packet may come before it is known whose netdev it comes in by: curl's next is told with the name.
        let is_it = |line: &Value| line["reason"] == reason && line["pod.name"] == "shop/translator";
        let line = said(&node, is_it).await?;
        assert_eq!(line["address"], "169.254.169.254:80");
        assert!(counted(&node, reason).await? > 0);
        // Both leave the pod's own connections alone.
        node.assert_own_role(&pod, &node.imds_v2(&pod, IMDS, &[]).await?);
        node.down().await?;
    }
    Ok(())
}

/// As on EC2: the answer with a session token, and nothing but it, has a hop limit.
#[tokio::test(flavor = "multi_thread")]
async fn imds_is_beyond_the_node_and_as_far_from_pods_as_the_labs_switches_say() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "audit"]).await?;
    let pod = node.pod("reader")?;
    effective(&node, &pod, "Audit", "Default").await?;
    let token = ["-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 60", "--max-time", "2"];
    let (v4, v6) = ("http://169.254.169.254/latest/api/token", "http://[fd00:ec2::254]/latest/api/token");
    let ways = [[&token[..], &[v4]].concat(), [&token[..], &[v6]].concat(), vec![ROLES]];
    // Once it is known whose netdev it comes in by.
    node.session(&pod, IMDS, &[]).await?;
    for (hops, required, from_pod, from_node) in [
        (2, false, [200, 200, 200], [200, 200, 200]),
        (1, false, [0, 0, 200], [200, 200, 200]),
        (1, true, [0, 0, 401], [200, 200, 401]),
    ] {
        node.lab.imds.set_hop_limit(hops);
        node.lab.imds.v2_required(required);
        for (way, (from_pod, from_node)) in ways.iter().zip(from_pod.into_iter().zip(from_node)) {
            let case = format!("{way:?}, hop limit {hops}, token required: {required}");
            assert_eq!(node.curl(&pod, way).await?.status, from_pod, "from a pod: {case}");
            assert_eq!(node.curl_on_node(way).await?.status, from_node, "from the node: {case}");
        }
    }
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_says_what_aws_itself_leaves_open() -> anyhow::Result<()> {
    for (hops, required, said) in [
        (2, false, [r#""answers_v1":true"#, r#""tokens_travel":true"#, "--instance-id i-0123456789abcdef0"]),
        (2, true, [r#""answers_v1":false"#, r#""tokens_travel":true"#, "--http-put-response-hop-limit 1"]),
        (1, false, [r#""answers_v1":true"#, r#""tokens_travel":false"#, "--http-tokens required"]),
        (1, true, ["AWS itself keeps pods", "tokens are required", "travel one hop"]),
    ] {
        let lab = lab_node::lab()?;
        lab.imds.set_hop_limit(hops);
        lab.imds.v2_required(required);
        let agent = lab.start_agent(&lab_node::agent(&["--imds", "intercept"])?).await?;
        let is_said = |line: &str| said.iter().all(|words| line.contains(words));
        let begun = Instant::now();
        while !agent.log_text()?.lines().any(is_said) {
            assert!(begun.elapsed() < SOON, "{hops}, {required}: {}", agent.log_tail());
            sleep(Duration::from_millis(20)).await;
        }
        assert!(agent.stop().await?.success());
        lab.down()?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_pods_in_audit_ask_for_is_in_the_log_and_in_the_metrics() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "audit", "--audit-paths", "on"]).await?;
    let credentials = format!("{ROLES}{NODE_ROLE}");
    for (name, url, asked, counter) in [
        ("taker", credentials, "credentials", "audited_credentials"),
        ("starter", format!("{IMDS}/latest/user-data"), "user-data", "audited_user_data"),
        ("reader", format!("{IMDS}/latest/meta-data/instance-id"), "other", "audited_other"),
    ] {
        let pod = node.pod(name)?;
        effective(&node, &pod, "Audit", "Default").await?;
        let token = node.session(&pod, IMDS, &[]).await?;
        assert_eq!(counted(&node, counter).await?, 0, "{name} has asked for a token only");
        let answer = node.curl(&pod, &["-H", &token, &url]).await?;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(counted(&node, counter).await?, 1);
        let line = said(&node, |line| line["pod.uid"] == pod.uid.as_str() && line.get("requested").is_some())
            .await?;
        assert_eq!((&line["target"], &line["requested"]), (&"audit".into(), &asked.into()), "{line}");
        assert_eq!(line["pod.name"], format!("shop/{name}"));
    }
    node.down().await
}

/// The first line of the agent's log that is this one.
async fn said(node: &Node, is_it: impl Fn(&Value) -> bool) -> anyhow::Result<Value> {
    for _ in 0..100 {
        let log = fs::read_to_string(&node.agent.log)?;
        let mut lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if let Some(line) = lines.find(&is_it) {
            return Ok(line);
        }
        sleep(Duration::from_millis(10)).await;
    }
    anyhow::bail!("the agent does not say it:\n{}", node.agent.log_tail())
}

/// How often the kernel has counted this.
async fn counted(node: &Node, counter: &str) -> anyhow::Result<u64> {
    let metrics = node.lab.node.get(ADMIN, "/metrics").await?.body;
    let label = format!("event=\"{counter}\"");
    let line = metrics.lines().find(|line| line.contains(&label)).context("no such counter")?;
    Ok(line.rsplit(' ').next().context("a metric without a number")?.parse()?)
}
