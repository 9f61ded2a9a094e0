//! The agent is replaced, and killed, again and again under a steady load: how often, and what became of the requests, is
//! printed.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use agent_common::abi::{ABI_VERSION, PIN_DIRECTORY, SHARED_DIRECTORY};
use anyhow::Context as _;
use lab::{AgentSpec, Pod};
use serde_json::Value;
use tokio::time::sleep;

use crate::{
    lab_node::{self, Node, POD_IDENTITY},
    load::Load,
};

const UPGRADES: usize = 100;
/// To another ABI and back, ten times each.
const ABI_UPGRADES: usize = 20;
/// What the agent of another ABI says that it is.
const CRASHES: usize = 50;
/// Successors that die at once.
const LOST: usize = 5;
/// Requests that an agent has accepted and not answered, at most: one takes milliseconds, and one comes every ten.
const ACCEPTED: usize = 2;
/// Between two changes.
const RETRY_DELAY: Duration = Duration::from_millis(100);
/// What a request may take while agents are killed under it.
const LONGEST: f64 = 1000.0;
/// What the kernel takes to send a SYN again that came at the very moment when its listener was closed.
const SYN_AGAIN: f64 = 1000.0;

#[tokio::test(flavor = "multi_thread")]
async fn upgrades_under_load_lose_no_request() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let pod = node.pod("busy")?;
    let flags = ["--imds", "intercept"];
    // Of the same ABI, but built for attacks: its programs are others, although they do the same.
    let other = AgentSpec::new(lab_node::undefended_binary()?, &flags);
    let generations = [
        (node.lab.add_agent_pod("podgate-other")?, other),
        (node.lab.agent_pod.clone(), lab_node::agent(&flags)?),
    ];
    let load = Load::of_imds(&node, &pod).await?;
    let mut tags = BTreeSet::new();
    for (pod, spec) in generations.iter().cycle().take(UPGRADES) {
        let successor = node.lab.start_agent_in(pod, spec).await?;
        let predecessor = std::mem::replace(&mut node.agent, successor);
        assert!(predecessor.stop().await?.success());
        let pins = names(&node.lab.node.place.bpffs().join(PIN_DIRECTORY))?;
        assert_eq!(pins, [SHARED_DIRECTORY.to_owned(), format!("v{ABI_VERSION}")]);
        tags.insert(program_tag(&node).await?);
    }
    assert_eq!(tags.len(), 2, "two kinds of programs: {tags:?}");
    let requests = load.end().await?;
    let failed = requests.failed();
    println!(
        "{UPGRADES} upgrades: {} requests, {} failed, longest pause {:.0} ms",
        requests.count(),
        failed.len(),
        requests.longest()
    );
    assert!(failed.is_empty(), "{failed:?}");
    requests.assert_own(&node, &pod);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_to_another_abi_refuses_at_most_one_moment() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let pod = node.pod("busy")?;
    let flags = ["--imds", "intercept"];
    let other = AgentSpec::new(lab_node::undefended_binary()?, &flags).of_next_abi();
    let generations = [
        (node.lab.add_agent_pod("podgate-other")?, other, AgentSpec::NEXT_ABI),
        (node.lab.agent_pod.clone(), lab_node::agent(&flags)?, ABI_VERSION),
    ];
    let load = Load::of_imds(&node, &pod).await?;
    for (pod, spec, abi) in generations.iter().cycle().take(ABI_UPGRADES) {
        let successor = node.lab.start_agent_in(pod, spec).await?;
        let predecessor = std::mem::replace(&mut node.agent, successor);
        assert!(predecessor.stop().await?.success());
        let pins = names(&node.lab.node.place.bpffs().join(PIN_DIRECTORY))?;
        assert_eq!(pins, [SHARED_DIRECTORY.to_owned(), format!("v{abi}")], "two generations would fight");
    }
    let requests = load.end().await?;
    let failed = requests.failed();
    println!(
        "{ABI_UPGRADES} upgrades to another ABI: {} requests, {} failed, longest pause {:.0} ms",
        requests.count(),
        failed.len(),
        requests.longest()
    );
    // Between the moment when its programs are another's and the moment when its listener is, a connection's ticket is in
    // the one's map and its connection at the other: it is anonymous, and refused.
    assert!(failed.iter().all(|(_, _, outcome)| outcome.starts_with("status 403")), "{failed:?}");
    assert!(failed.len() <= ABI_UPGRADES / 4, "{failed:?}");
    requests.assert_own(&node, &pod);
    node.down().await
}

/// What the kernel makes of the instructions of the program that runs on pods' connect.
async fn program_tag(node: &Node) -> anyhow::Result<String> {
    let bpftool = async |arguments: &[&str]| -> anyhow::Result<Value> {
        let text = lab_node::text(node.lab.on_node(&[&["bpftool", "--json"], arguments].concat())?).await?;
        serde_json::from_str(&text).with_context(|| text.clone())
    };
    let pin = node.lab.node.place.bpffs().join(format!("{PIN_DIRECTORY}/v{ABI_VERSION}/links/connect4"));
    let link = bpftool(&["link", "show", "pinned", &pin.display().to_string()]).await?;
    let program = bpftool(&["prog", "show", "id", &link["prog_id"].to_string()]).await?;
    Ok(program["tag"].as_str().with_context(|| program.to_string())?.to_owned())
}

fn names(directory: &Path) -> anyhow::Result<Vec<String>> {
    let entries = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
    let mut names: Vec<_> =
        entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    Ok(names)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_dies_at_once_is_succeeded_by_the_agent_before_it() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("busy")?;
    let other = node.lab.add_agent_pod("podgate-other")?;
    let spec = lab_node::agent(&["--imds", "intercept"])?;
    let load = Load::of_imds(&node, &pod).await?;
    for _ in 0..LOST {
        let mut successor = node.lab.start_agent_in(&other, &spec).await?;
        successor.kill().await?;
        sleep(Duration::from_millis(1800)).await;
    }
    let requests = load.end().await?;
    // Those that the dead one had accepted are lost with it, and nothing else.
    let failed = requests.failed();
    let reset = |outcome: &str| outcome.starts_with("error 104") || outcome.starts_with("status 0");
    println!(
        "{LOST} successors killed: {} requests, {} reset, longest pause {:.0} ms",
        requests.count(),
        failed.len(),
        requests.longest()
    );
    assert!(failed.iter().all(|(_, _, outcome)| reset(outcome)), "{failed:?}");
    assert!(failed.len() <= LOST * ACCEPTED, "{failed:?}");
    assert!(requests.longest() < LONGEST + SYN_AGAIN);
    requests.assert_own(&node, &pod);
    assert!(node.agent.log_text()?.contains("becoming active again"), "{}", node.agent.log_tail());
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn crashes_under_load_give_nobody_a_wrong_role_and_let_nobody_wait() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let pod = node.pod("busy")?;
    let spec = lab_node::agent(&["--imds", "intercept"])?;
    let load = Load::of_imds(&node, &pod).await?;
    for _ in 0..CRASHES {
        node.agent.kill().await?;
        node.agent = node.lab.start_agent(&spec).await?;
        sleep(RETRY_DELAY).await;
    }
    let requests = load.end().await?;
    let failed = requests.failed();
    println!(
        "{CRASHES} crashes: {} requests, {} refused, longest pause {:.0} ms",
        requests.count(),
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

#[tokio::test(flavor = "multi_thread")]
async fn with_250_pods_a_start_and_a_takeover_listen_in_all_of_their_networks() -> anyhow::Result<()> {
    const PODS: usize = 250;
    let lab = lab_node::lab()?;
    let pods: anyhow::Result<Vec<_>> =
        (0..PODS).map(|number| lab.add_pod(&lab_node::spec(&format!("app-{number}")))).collect();
    let pods = pods?;
    let spec = lab_node::agent(&["--imds", "intercept"])?;
    let begun = Instant::now();
    let agent = lab.start_agent(&spec).await?;
    let mut node = Node { lab, agent };
    all_listen(&node, &pods, "start", begun).await?;

    let other = node.lab.add_agent_pod("podgate-other")?;
    let begun = Instant::now();
    let successor = node.lab.start_agent_in(&other, &spec).await?;
    let predecessor = std::mem::replace(&mut node.agent, successor);
    assert!(predecessor.stop().await?.success());
    // With the predecessor its listeners have gone.
    all_listen(&node, &pods, "takeover", begun).await?;
    node.down().await
}

/// Every pod must have listeners, and some are asked for their roles.
async fn all_listen(node: &Node, pods: &[Pod], what: &str, begun: Instant) -> anyhow::Result<()> {
    let ready = begun.elapsed();
    let first = node.curl(&pods[0], &[POD_IDENTITY]).await?;
    println!(
        "{what} with {} pods: ready after {ready:?}, first answer after {:?}",
        pods.len(),
        begun.elapsed()
    );
    node.assert_own_role(&pods[0], &first);
    let log = node.agent.log_text()?;
    let listening = log.lines().find(|line| line.contains("listening in the networks of the pods"));
    println!("{}", listening.context("the agent does not say that it listens in pods' networks")?);
    for pod in pods {
        node.listener_port(pod).await?;
    }
    for pod in pods.iter().step_by(25) {
        node.assert_own_role(pod, &node.curl(pod, &[POD_IDENTITY]).await?);
    }
    Ok(())
}
