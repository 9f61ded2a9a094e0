//! What an upgrade costs EKS Auth: nothing, for credentials are handed over. And what it costs when they are not.

use std::{
    fs,
    io::{Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use lab::Pod;

use crate::lab_node::{self, IMDS, Node};

const PODS: usize = 20;
/// What an agent that starts says first, and its nonce.
const GREETING: usize = 16 + 32;

/// Pods with and without the webhook's token, all of which have asked.
async fn warm(node: &Node) -> anyhow::Result<Vec<Pod>> {
    let mut pods = Vec::new();
    for number in 0..PODS {
        let spec = lab_node::spec(&format!("warm{number}"));
        pods.push(node.lab.add_pod(&if number % 2 == 0 { spec } else { spec.with_token() })?);
    }
    assert_served(node, &pods).await?;
    Ok(pods)
}

/// The access keys.
async fn assert_served(node: &Node, pods: &[Pod]) -> anyhow::Result<Vec<String>> {
    let mut keys = Vec::new();
    for pod in pods {
        let answer = node.imds_v2(pod, IMDS, &[]).await?;
        node.assert_own_role(pod, &answer);
        keys.extend(answer.access_key_id());
    }
    Ok(keys)
}

async fn upgrade(node: &mut Node, pod: &Pod) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    let successor = node.lab.start_agent_in(pod, &lab_node::agent(&["--imds", "intercept"])?).await?;
    let took = begun.elapsed();
    assert!(std::mem::replace(&mut node.agent, successor).stop().await?.success());
    Ok(took)
}

fn socket(node: &Node) -> PathBuf {
    node.lab.node.place.handover().join("handover.sock")
}

/// What something hears that talks to an agent in another one's place.
type Talk = Box<dyn Fn(UnixStream) -> Vec<u8> + Send>;

/// Something else in the place of the socket: what it hears in the two conversations that a starting agent begins.
fn impostor(socket: PathBuf, talk: Talk) -> anyhow::Result<JoinHandle<Vec<Vec<u8>>>> {
    fs::remove_file(&socket)?;
    let listener = UnixListener::bind(socket)?;
    Ok(thread::spawn(move || listener.incoming().take(2).flatten().map(talk).collect()))
}

/// Keeps to the protocol as far as one can without the key, and answers with credentials of its own making.
fn inject(mut stream: UnixStream, forged: &[u8]) -> Vec<u8> {
    let mut heard = vec![0; GREETING];
    let _ = stream.read_exact(&mut heard).and_then(|()| stream.write_all(&[1; 32]));
    let mut proof = [0; 32];
    let _ = stream.read_exact(&mut proof);
    heard.extend(proof);
    let length = u32::try_from(forged.len()).unwrap_or_default();
    let _ = stream.write_all(&[&length.to_be_bytes()[..], forged].concat());
    let _ = stream.read_to_end(&mut heard);
    heard
}

/// Says nothing.
fn stall(mut stream: UnixStream) -> Vec<u8> {
    let mut heard = Vec::new();
    let _ = stream.read_to_end(&mut heard);
    heard
}

/// Credentials for these pods, as an agent writes them.
fn forged(pods: &[Pod]) -> Vec<u8> {
    let entry = |pod: &Pod| {
        serde_json::json!({
            "pod": pod.uid, "namespace": pod.namespace, "service_account": pod.service_account,
            "access_key_id": "ASIAFORGED", "secret_access_key": "s", "session_token": "t",
            "expiration": "2999-01-01T00:00:00Z", "obtained_at": "2026-01-01T00:00:00Z",
            "account_id": "1", "partition": "aws", "role": "r", "refresh_at": "2999-01-01T00:00:00Z", "asked": true,
        })
    };
    pods.iter().map(entry).collect::<serde_json::Value>().to_string().into_bytes()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_keeps_credentials_and_does_not_ask_eks_auth() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let other = node.lab.add_agent_pod("podgate-other")?;
    let pods = warm(&node).await?;
    let (keys, before) = (assert_served(&node, &pods).await?, node.lab.eks_auth.calls());
    let mut took = Duration::ZERO;
    for agent_pod in [&other, &node.lab.agent_pod.clone(), &other] {
        took = took.max(upgrade(&mut node, agent_pod).await?);
        assert_eq!(assert_served(&node, &pods).await?, keys);
    }
    let calls = node.lab.eks_auth.calls() - before;
    println!(
        "3 upgrades with {PODS} warm pods: {calls} calls of EKS Auth, ready after {took:?} at the latest"
    );
    assert_eq!(calls, 0);
    let metrics = node.lab.node.ask_agent("/metrics").await?.body;
    assert!(metrics.contains(&format!("podgate_credentials_inherited_total {PODS}")), "{metrics}");
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_crash_credentials_are_fetched_once_per_pod() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let pods = warm(&node).await?;
    let (keys, before) = (assert_served(&node, &pods).await?, node.lab.eks_auth.calls());
    node.agent.kill().await?;
    node.agent = node.lab.start_agent(&lab_node::agent(&["--imds", "intercept"])?).await?;
    let fetched = assert_served(&node, &pods).await?;
    let calls = node.lab.eks_auth.calls() - before;
    println!("killed with {PODS} warm pods: {calls} calls of EKS Auth");
    assert_eq!(calls, PODS as u64);
    assert!(fetched.iter().all(|key| !keys.contains(key)), "a killed agent hands nothing over");
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_handover_socket_tells_nothing_and_a_fake_one_is_ignored() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let other = node.lab.add_agent_pod("podgate-other")?;
    let pods = warm(&node).await?;
    let keys = assert_served(&node, &pods).await?;

    let mut stream = UnixStream::connect(socket(&node))?;
    stream.write_all(&[&b"podgate/hand/v1\n"[..], &[7; 32], &[0; 32]].concat())?;
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard)?;
    assert_eq!(heard.len(), 32, "a nonce, and no more");

    let forged = forged(&pods);
    let talks: [(&str, Talk, Pod); 2] = [
        ("forged", Box::new(move |stream| inject(stream, &forged)), other),
        ("silent", Box::new(stall), node.lab.agent_pod.clone()),
    ];
    for (name, talk, agent_pod) in talks {
        let (before, impostor) = (node.lab.eks_auth.calls(), impostor(socket(&node), talk)?);
        let took = upgrade(&mut node, &agent_pod).await?;
        let heard = impostor.join().map_err(|_| anyhow::anyhow!("the impostor has panicked"))?;
        // What EKS Auth has issued, for these very pods.
        let fetched = assert_served(&node, &pods).await?;
        let calls = node.lab.eks_auth.calls() - before;
        let bytes: Vec<_> = heard.iter().map(Vec::len).collect();
        println!("{name} socket: ready after {took:?}, {calls} calls of EKS Auth, heard {bytes:?} bytes");
        assert_eq!(calls, PODS as u64, "{name}: fetched again");
        assert!(took < Duration::from_secs(10), "{name}: {took:?}");
        for heard in heard.iter().map(|heard| String::from_utf8_lossy(heard)) {
            assert!(heard.len() <= 3 * (GREETING + 32) && !heard.contains("ASIA"), "{name}: {heard:?}");
        }
        assert!(fetched.iter().all(|key| !keys.contains(key)));
        let log = node.agent.log_text()?;
        assert!(log.contains("no credentials were handed over"), "{name}: {}", node.agent.log_tail());
    }
    node.down().await
}
