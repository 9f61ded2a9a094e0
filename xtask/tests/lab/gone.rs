//! When a pod is gone: nothing of it is left within a second of its cgroup, in the kernel, in the agent and at its ports.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use lab::Pod;
use serde_json::Value;
use tokio::time::sleep;

use crate::lab_node::{self, IMDS, Node, POD_IDENTITY};

/// From the end of the cgroup to that of everything else.
const SOON: Duration = Duration::from_secs(1);
/// Maps with an entry for each pod, by the id of its cgroup.
const BY_POD: [&str; 2] = ["POLICIES", "POD_TICKETS"];

/// The ids of the pods' cgroups in a map.
async fn pods_in(node: &Node, map: &str) -> anyhow::Result<Vec<u64>> {
    let bpffs = node.lab.node.place.bpffs().display().to_string();
    let arguments = ["maps", "--bpffs", &bpffs, "--json", "dump", map];
    let dump = lab_node::text(node.lab.agent_tool(&lab_node::agent_binary()?, &arguments)?).await?;
    let entries: Vec<Value> = serde_json::from_str(&dump).with_context(|| dump.clone())?;
    let id = |entry: &Value| entry["formatted"]["key"].as_u64();
    entries.iter().map(|entry| id(entry).with_context(|| entry.to_string())).collect()
}

/// In which maps the pod is.
async fn maps_with(node: &Node, cgroup: u64) -> anyhow::Result<Vec<&'static str>> {
    let mut found = Vec::new();
    for map in BY_POD {
        if pods_in(node, map).await?.contains(&cgroup) {
            found.push(map);
        }
    }
    Ok(found)
}

/// Waits until it is so, and tells how long it took.
async fn until(what: &str, is_so: impl AsyncFn() -> anyhow::Result<bool>) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    while !is_so().await? {
        anyhow::ensure!(begun.elapsed() < SOON, "{what} is still there after {SOON:?}");
        sleep(Duration::from_millis(5)).await;
    }
    Ok(begun.elapsed())
}

fn cgroup_id(pod: &Pod) -> anyhow::Result<u64> {
    Ok(std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&pod.cgroup)?))
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_a_pod_is_left_a_second_after_its_cgroup() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.lab.add_pod(&lab_node::spec("brief").with_token())?;
    let stays = node.lab.add_pod(&lab_node::spec("lasting").with_token())?;
    for pod in [&pod, &stays] {
        node.assert_own_role(pod, &node.imds_v2(pod, IMDS, &[]).await?);
    }
    let audience = "pods.eks.amazonaws.com";
    let token = node.lab.cluster.mint_pod_token(&pod.namespace, &pod.name, &[audience], SOON * 600);
    let header = format!("Authorization: {token}");
    let by_token = async || node.curl_on_node(&["-H", &header, POD_IDENTITY]).await;
    by_token().await?.access_key_id().context("the token opens what is kept")?;
    let cgroup = cgroup_id(&pod)?;
    assert_eq!(maps_with(&node, cgroup).await?, BY_POD);

    node.lab.complete_pod(&pod)?;
    let kernel = until("the kernel's state", async || Ok(maps_with(&node, cgroup).await?.is_empty())).await?;
    let is_refused = async || {
        let answer = by_token().await?;
        Ok((400..600).contains(&answer.status) && answer.body.contains("the pod is gone"))
    };
    let agent = until("what was kept in the agent", is_refused).await?;
    println!(
        "after the end of the cgroup: nothing in the kernel after {kernel:?}, in the agent after {agent:?}"
    );

    // What the API server still says of the pod brings nothing back.
    let calls = node.lab.eks_auth.calls();
    node.lab.cluster.annotate_pod(&pod.namespace, &pod.name, "podgate.dev/imds", Some("intercept"));
    sleep(Duration::from_millis(500)).await;
    assert_eq!(node.lab.eks_auth.calls(), calls, "fetched for a pod that is gone");
    assert_eq!(maps_with(&node, cgroup).await?, [""; 0]);
    assert!(is_refused().await?, "its token opens nothing");
    assert_eq!(node.lab.eks_auth.calls(), calls, "nor does anybody ask with it");
    node.lab.delete_pod(&pod)?;

    assert_eq!(maps_with(&node, cgroup_id(&stays)?).await?, BY_POD, "the others' is there");
    node.assert_own_role(&stays, &node.imds_v2(&stays, IMDS, &[]).await?);
    assert_eq!(node.lab.eks_auth.calls(), calls);
    node.down().await
}
