//! What leaves a pod other than by connect, and what pods in audit ask the real IMDS for.

use std::{fs, time::Duration};

use anyhow::Context as _;
use lab::{EnvKind, NODE_ROLE, agent_process::ADMIN};
use serde_json::Value;
use tokio::time::sleep;

use crate::{
    lab_node::{IMDS, Node, ROLES},
    policy::effective,
};

/// Makes an address of a documentation range another name of IMDS, in the network that it is loaded in.
const TRANSLATE: &str = "add table ip way_round
add chain ip way_round output { type nat hook output priority -100; }
add rule ip way_round output ip daddr 198.51.100.1 dnat to 169.254.169.254";

#[tokio::test(flavor = "multi_thread")]
async fn the_egress_filter_stops_a_pod_that_translates_addresses() -> anyhow::Result<()> {
    for (filter, status) in [("auto", 0), ("off", 200)] {
        let node = Node::with_flags(&["--imds", "intercept", "--egress-filter", filter]).await?;
        let pod = node.pod("translator")?;
        effective(&node, &pod, "Intercept", "Default").await?;
        let rules = node.lab.exec(&pod, EnvKind::None, &["nft", TRANSLATE])?.status().await?;
        assert!(rules.success(), "nft: {rules}");
        let reads = node.lab.imds.requests().len();

        let translated = ROLES.replace("169.254.169.254", "198.51.100.1");
        let answer = node.curl(&pod, &["--connect-timeout", "2", &translated]).await?;
        assert_eq!(answer.status, status, "egress filter {filter}: {answer:?}");
        let reached = node.lab.imds.requests().len() > reads;
        assert_eq!(
            (reached, answer.body == NODE_ROLE),
            (status == 200, status == 200),
            "egress filter {filter}"
        );
        if filter == "auto" {
            let line = said(&node, |line| line["reason"] == "egress_dropped").await?;
            assert_eq!(line["pod.name"], "shop/translator");
            assert_eq!(line["address"], "169.254.169.254:80");
            assert!(counted(&node, "egress_dropped").await? > 0);
        }
        // The egress filter leaves the pod's own connections alone.
        node.assert_own_role(&pod, &node.imds_v2(&pod, IMDS, &[]).await?);
        node.down().await?;
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
