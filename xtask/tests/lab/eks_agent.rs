//! The EKS Pod Identity Agent on the same node: it comes, goes and crashes, and so does podgate alongside it.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use futures::TryStreamExt as _;
use lab::{
    EksAgent, EnvKind, Pod, PodSpec,
    eks_agent_process::{ACCESS_KEY_ID, DAEMON_SET, pod_spec},
};
use rtnetlink::packet_route::address::AddressAttribute;
use tokio::time::sleep;

use crate::{
    lab_node::{self, IMDS, Node, POD_IDENTITY},
    load::Load,
};

/// More than the programs wait for a heartbeat.
const STALE: Duration = Duration::from_millis(2300);
/// Pods appear, listeners close, and what is under way ends, in far less.
const SOON: Duration = Duration::from_secs(10);
/// A kubelet waits ten times as long before it starts a container again.
const RESTART: Duration = Duration::from_secs(1);
const POD_IDENTITY_ADDRESSES: [&str; 2] = ["169.254.170.23", "fd00:ec2::23"];
const FLAGS: [&str; 6] = ["--imds", "intercept", "--drain-secs", "1", "--log-filter", "access=off,info"];
const ASK_WITH_TOKEN: &str = r#"curl -gs -m 5 -H "Authorization: $(cat $AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE)" $AWS_CONTAINER_CREDENTIALS_FULL_URI"#;

/// Starts it in its pod, again and again as the kubelet does; how often it was tried.
async fn start(node: &Node, pod: &Pod) -> anyhow::Result<(EksAgent, usize)> {
    let deadline = Instant::now() + SOON;
    let mut attempts = 1;
    loop {
        match node.lab.start_eks_agent(pod).await {
            Ok(agent) => return Ok((agent, attempts)),
            Err(error) => assert!(Instant::now() < deadline, "{error:#}\n{}", node.agent.log_tail()),
        }
        attempts += 1;
        sleep(RESTART).await;
    }
}

/// The addresses of podgate's netdev.
fn netdev_addresses(node: &Node) -> anyhow::Result<BTreeSet<IpAddr>> {
    node.lab.node.netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            let links = handle.link().get().match_name("podgate0".to_owned()).execute();
            let index = links.try_collect::<Vec<_>>().await?.remove(0).header.index;
            let messages = handle.address().get().set_link_index_filter(index).execute();
            let messages: Vec<_> = messages.try_collect().await?;
            let attributes = messages.into_iter().flat_map(|message| message.attributes);
            Ok(attributes
                .filter_map(|attribute| match attribute {
                    AddressAttribute::Address(address) => Some(address),
                    _ => None,
                })
                .collect())
        })
    })
}

/// Whether podgate's netdev has EKS Pod Identity's addresses: both or neither.
fn has_pod_identity(node: &Node) -> anyhow::Result<bool> {
    let addresses = netdev_addresses(node)?;
    let has = POD_IDENTITY_ADDRESSES.map(|address| address.parse().is_ok_and(|a| addresses.contains(&a)));
    anyhow::ensure!(has[0] == has[1] || has[1], "{addresses:?}");
    Ok(has[0] && has[1])
}

/// Waits until something is so.
async fn soon(node: &Node, what: &str, is_so: impl Fn() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    while !is_so()? {
        assert!(Instant::now() < deadline, "not soon: {what}\n{}", node.agent.log_tail());
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn said(node: &Node, words: &[&str]) -> anyhow::Result<()> {
    let says = |line: &str| words.iter().all(|word| line.contains(word));
    soon(node, &words.join(" "), || Ok(node.agent.log_text()?.lines().any(says))).await
}

/// The access key that a pod with a token gets where the webhook points it at.
async fn with_token(node: &Node, pod: &Pod) -> anyhow::Result<String> {
    let body = lab_node::text(node.lab.exec(pod, EnvKind::Webhook, &["sh", "-c", ASK_WITH_TOKEN])?).await?;
    let answer = lab_node::Answer { status: 200, body, milliseconds: 0.0 };
    Ok(answer.access_key_id().unwrap_or(answer.body))
}

/// How a pod's connection attempt ends.
async fn try_connect(node: &Node, pod: &Pod, address: &str) -> anyhow::Result<String> {
    let program = format!(
        "import errno, socket\n\
         try:\n    socket.create_connection(('{address}', 80), timeout=10)\n    print('connected')\n\
         except OSError as error:\n    print(errno.errorcode[error.errno])"
    );
    node.python(pod, &program).await
}

/// A pod that is left to the EKS Pod Identity Agent.
fn left_to_eks_agent(node: &Node) -> anyhow::Result<Pod> {
    node.lab.add_pod(&lab_node::spec("unmoved").with_token().annotation("podgate.dev/pod-identity", "off"))
}

#[tokio::test(flavor = "multi_thread")]
async fn it_comes_and_goes_under_load_and_no_request_fails() -> anyhow::Result<()> {
    let node = Node::with_flags(&FLAGS).await?;
    let (busy, unmoved) = (node.pod("busy")?, left_to_eks_agent(&node)?);
    assert!(has_pod_identity(&node)?);
    let load = Load::of_pod_identity(&node, &busy).await?;
    for round in 0..3 {
        let pod = node.lab.add_pod(&pod_spec(&format!("{DAEMON_SET}-{round}")))?;
        let (mut eks_agent, attempts) = start(&node, &pod).await?;
        assert!(attempts <= 2, "{attempts} attempts to listen\n{}", node.agent.log_tail());
        soon(&node, "its addresses are its own", || Ok(!has_pod_identity(&node)?)).await?;
        node.assert_own_role(&busy, &node.curl(&busy, &[POD_IDENTITY]).await?);
        node.assert_own_role(&busy, &node.imds_v2(&busy, IMDS, &[]).await?);
        assert_eq!(with_token(&node, &unmoved).await?, ACCESS_KEY_ID);
        assert!(eks_agent.is_running()?, "its own probe reaches it");

        // While it terminates, its process may hold the addresses for longer than its pod is to be seen.
        node.lab.cluster.delete_pod(&pod.namespace, &pod.name);
        said(&node, &["cannot have EKS Pod Identity's addresses yet"]).await?;
        node.assert_own_role(&busy, &node.curl(&busy, &[POD_IDENTITY]).await?);
        assert_eq!(with_token(&node, &unmoved).await?, ACCESS_KEY_ID);
        eks_agent.kill().await?;
        node.lab.delete_pod(&pod)?;
        soon(&node, "podgate listens there", || {
            let taken = "podgate has EKS Pod Identity's addresses";
            Ok(node.agent.log_text()?.matches(taken).count() == round + 1)
        })
        .await?;
        assert!(has_pod_identity(&node)?);
        // As on a node without it: whoever is left alone meets podgate there, and gets its own.
        assert_ne!(with_token(&node, &unmoved).await?, ACCESS_KEY_ID);
    }
    let requests = load.end().await?;
    println!(
        "3 times: {} requests, {} failed, longest {:.0} ms",
        requests.count(),
        requests.failed().len(),
        requests.longest()
    );
    assert!(requests.failed().is_empty(), "{:?}", requests.failed());
    requests.assert_own(&node, &busy);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_alongside_the_eks_agent_loses_no_request() -> anyhow::Result<()> {
    let lab = lab_node::lab()?;
    let eks_agent_pod = lab.add_pod(&pod_spec("eks-pod-identity-agent-x7k2m"))?;
    let mut eks_agent = lab.start_eks_agent(&eks_agent_pod).await?;
    let spec = lab_node::agent(&FLAGS)?;
    let agent = lab.start_agent(&spec).await?;
    let mut node = Node { lab, agent };
    let busy = node.pod("busy")?;
    let pods = [node.lab.add_agent_pod("podgate-other")?, node.lab.agent_pod.clone()];
    let load = Load::of_pod_identity(&node, &busy).await?;
    for pod in pods.iter().cycle().take(6) {
        let successor = node.lab.start_agent_in(pod, &spec).await?;
        assert!(std::mem::replace(&mut node.agent, successor).stop().await?.success());
    }
    // Successors with another opinion, and one with the first again.
    for (pod, target) in pods.iter().zip(["own", "auto"]) {
        let spec = lab_node::agent(&[&FLAGS[..], &["--target", target]].concat())?;
        let successor = node.lab.start_agent_in(pod, &spec).await?;
        assert!(std::mem::replace(&mut node.agent, successor).stop().await?.success());
    }
    assert!(eks_agent.is_running()?);
    assert!(!has_pod_identity(&node)?, "they were never podgate's");
    let requests = load.end().await?;
    assert!(requests.failed().is_empty(), "{:?}", requests.failed());
    requests.assert_own(&node, &busy);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn successors_that_send_pods_elsewhere_lose_no_request_and_tidy_up() -> anyhow::Result<()> {
    let mut node = Node::with_flags(&FLAGS).await?;
    let busy = node.pod("busy")?;
    let pods = [node.lab.add_agent_pod("podgate-other")?, node.lab.agent_pod.clone()];
    let own: BTreeSet<IpAddr> = ["169.254.175.1".parse()?, "fd70:6f64:6761:7465::1".parse()?].into();
    let pod_identity: BTreeSet<IpAddr> = ["169.254.170.23".parse()?, "fd00:ec2::23".parse()?].into();
    let other: BTreeSet<IpAddr> = ["169.254.171.23".parse()?, "fd0d:6a7e::23".parse()?].into();
    let other_flags =
        ["--target", "own", "--target-v4", "169.254.171.23:80", "--target-v6", "[fd0d:6a7e::23]:80"];
    let load = Load::of_pod_identity(&node, &busy).await?;
    for (pod, (flags, addresses)) in pods.iter().cycle().zip([
        (&["--target", "own"][..], own.clone()),
        (&["--target", "pod-identity"], pod_identity.clone()),
        (&other_flags, other),
        (&["--target", "auto"], own.union(&pod_identity).copied().collect()),
    ]) {
        let successor =
            node.lab.start_agent_in(pod, &lab_node::agent(&[&FLAGS[..], flags].concat())?).await?;
        assert!(std::mem::replace(&mut node.agent, successor).stop().await?.success());
        node.assert_own_role(&busy, &node.curl(&busy, &[POD_IDENTITY]).await?);
        soon(&node, &format!("{flags:?}: {addresses:?}"), || {
            let mut found = netdev_addresses(&node)?;
            // The kernel's own.
            found.retain(|address| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()));
            Ok(found == addresses)
        })
        .await?;
    }
    let requests = load.end().await?;
    assert!(requests.failed().is_empty(), "{:?}", requests.failed());
    requests.assert_own(&node, &busy);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_it_in_another_namespace_is_a_pod_like_any_other() -> anyhow::Result<()> {
    let node = Node::with_flags(&FLAGS).await?;
    let copied = pod_spec("eks-pod-identity-agent-copy");
    let elsewhere = PodSpec { namespace: "shop".to_owned(), ..copied.clone() };
    let without_owner = PodSpec { daemon_set: None, ..copied.clone() };
    let of_another = PodSpec {
        daemon_set: Some(format!("{DAEMON_SET}-2")),
        ..PodSpec { name: format!("{DAEMON_SET}-2-copy"), ..copied }
    };
    for spec in [elsewhere, without_owner, of_another] {
        let name = format!("{}/{}", spec.namespace, spec.name);
        let pod = node.lab.add_pod(&spec)?;
        said(&node, &["a pod's policy is effective", &name]).await?;
        let refused = node.lab.start_eks_agent(&pod).await.map(|_| ()).unwrap_err().to_string();
        assert!(refused.contains("PermissionError"), "it may not listen there: {refused}");
    }
    assert!(has_pod_identity(&node)?);
    assert!(!node.agent.log_text()?.contains("the EKS Pod Identity Agent is"), "{}", node.agent.log_tail());
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn when_podgate_dies_pods_get_what_it_answers_never_the_node_role() -> anyhow::Result<()> {
    let lab = lab_node::lab()?;
    let eks_agent_pod = lab.add_pod(&pod_spec("eks-pod-identity-agent-x7k2m"))?;
    let mut eks_agent = lab.start_eks_agent(&eks_agent_pod).await?;
    let agent = lab.start_agent(&lab_node::agent(&FLAGS)?).await?;
    let mut node = Node { lab, agent };
    let (plain, injected) = (node.pod("web")?, node.lab.add_pod(&lab_node::spec("injected").with_token())?);
    said(&node, &["the EKS Pod Identity Agent answers", "\"answers\":true"]).await?;
    node.assert_own_role(&plain, &node.curl(&plain, &[POD_IDENTITY]).await?);
    assert_ne!(with_token(&node, &injected).await?, ACCESS_KEY_ID);
    let pid = eks_agent.pid().context("it runs")?.to_string();
    let whois =
        lab_node::text(node.lab.agent_tool(&lab_node::agent_binary()?, &["whois", "--pid", &pid])?).await?;
    assert!(whois.contains("it is the EKS Pod Identity Agent"), "{whois}");

    node.agent.kill().await?;
    sleep(STALE).await;
    assert_eq!(with_token(&node, &injected).await?, ACCESS_KEY_ID);
    for address in POD_IDENTITY_ADDRESSES {
        assert_eq!(try_connect(&node, &plain, address).await?, "connected", "{address}");
    }
    for address in ["169.254.169.254", "fd00:ec2::254", "169.254.170.2", "169.254.175.1"] {
        assert_eq!(try_connect(&node, &plain, address).await?, "EPERM", "{address}");
    }

    // It crashes as well, with podgate alive: podgate's pods do not notice.
    node.agent = node.lab.start_agent(&lab_node::agent(&FLAGS)?).await?;
    said(&node, &["the EKS Pod Identity Agent answers", "\"answers\":true"]).await?;
    eks_agent.kill().await?;
    node.assert_own_role(&plain, &node.curl(&plain, &[POD_IDENTITY]).await?);
    assert_ne!(with_token(&node, &injected).await?, ACCESS_KEY_ID);
    said(&node, &["the EKS Pod Identity Agent answers", "\"answers\":false"]).await?;
    // And then podgate: a connection that nobody answers is refused at once.
    node.agent.kill().await?;
    sleep(STALE).await;
    for address in POD_IDENTITY_ADDRESSES.into_iter().chain(["169.254.169.254"]) {
        assert_eq!(try_connect(&node, &plain, address).await?, "EPERM", "{address}");
    }
    // With --when-down deny whatever it answers.
    let eks_agent = node.lab.start_eks_agent(&eks_agent_pod).await?;
    let deny = [&FLAGS[..], &["--when-down", "deny"]].concat();
    node.agent = node.lab.start_agent(&lab_node::agent(&deny)?).await?;
    sleep(STALE).await;
    node.agent.kill().await?;
    sleep(STALE).await;
    assert_eq!(try_connect(&node, &plain, POD_IDENTITY_ADDRESSES[0]).await?, "EPERM");
    drop(eks_agent);
    node.lab.down()
}
