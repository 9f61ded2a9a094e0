//! Pods are served in their own networks: whatever surrounds them, whatever they do to their listeners, and never longer than
//! they live.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use lab::{EnvKind, Pod};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    time::sleep,
};

use crate::lab_node::{IMDS, Node, POD_IDENTITY};

/// In which the log has a line.
const SOON: Duration = Duration::from_secs(5);
/// How long the network of a pod may be there after its last process.
const GONE_WITHIN: Duration = Duration::from_millis(500);
/// What may surround a pod, of which none lets a connection out to the node, with what sets it up in the pod's network.
const SURROUNDINGS: [(&str, &str); 4] = [
    (
        "a policy that lets nothing out",
        "nft 'add table inet deny; add chain inet deny out { type filter hook output priority 0; policy drop; }; add rule inet \
         deny out oifname lo accept'",
    ),
    ("no route", "ip route flush table main; ip -6 route flush table main"),
    (
        "a VPN that takes the default route",
        "ip link add tun9 type veth peer name tun8; ip link set tun9 up; ip link set tun8 up; ip route add default dev tun9 table 100; ip rule add pref 50 table 100",
    ),
    (
        "a mesh that takes every connection",
        "nft 'add table ip mesh; add chain ip mesh out { type nat hook output priority -100; }; add rule ip mesh out oifname != lo \
         meta l4proto tcp redirect to :15001'",
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn whatever_surrounds_a_pod_it_is_served() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    for (number, (what, script)) in SURROUNDINGS.into_iter().enumerate() {
        let pod = node.pod(&format!("app-{number}"))?;
        node.listener_port(&pod).await?;
        node.shell(&pod, script).await?;
        // The control: nothing gets out to the node.
        let direct = node.curl(&pod, &["--connect-timeout", "1", "http://169.254.175.1"]).await?;
        assert_eq!(direct.status, 0, "{what}: {direct:?}");
        node.assert_own_role(&pod, &node.curl(&pod, &[POD_IDENTITY]).await?);
        node.assert_own_role(&pod, &node.imds_v2(&pod, IMDS, &[]).await?);
    }
    // The pods' own netdevs have the fence until they are known as such.
    let log = node.agent.log_text()?;
    assert!(
        !log.lines().any(|line| line.contains("the second fence is on") && line.contains("eni")),
        "{log}"
    );
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_shuts_its_loopback_gets_no_answer_and_the_log_says_why() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("shut")?;
    node.listener_port(&pod).await?;
    let drop_all = "nft 'add table inet shut; add chain inet shut in { type filter hook input priority 0; policy drop; }'";
    node.shell(&pod, drop_all).await?;
    let answer = node.curl(&pod, &["--connect-timeout", "0.9", POD_IDENTITY]).await?;
    assert_eq!(answer.status, 0, "{answer:?}");
    let said = |line: &str| line.contains("on its own loopback") && line.contains("shop/shut");
    let begun = Instant::now();
    while !node.agent.log_text()?.lines().any(said) {
        assert!(begun.elapsed() < SOON, "{}", node.agent.log_tail());
        sleep(Duration::from_millis(10)).await;
    }
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_its_pod_destroys_is_made_again_without_a_flood() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let (pod, other) = (node.pod("hostile")?, node.pod("other")?);
    for _ in 0..3 {
        let port = node.listener_port(&pod).await?;
        node.shell(&pod, &format!("ss -K state listening sport = :{port} >/dev/null")).await?;
        node.assert_own_role(&pod, &node.curl(&pod, &[POD_IDENTITY]).await?);
        node.assert_own_role(&other, &node.curl(&other, &[POD_IDENTITY]).await?);
        sleep(Duration::from_millis(1_200)).await;
    }
    let log = node.agent.log_text()?;
    let lines = log.lines().filter(|line| line.contains("closed by somebody else")).count();
    assert!((1..=3).contains(&lines), "{lines} lines\n{log}");
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_of_an_ended_pod_is_gone_at_once_with_its_connections() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("brief")?;
    node.listener_port(&pod).await?;
    // A connection that has begun a request, and one that is idle.
    let program = "import socket, time\nfor _ in range(2): globals()[f's{_}'] = socket.create_connection(('169.254.170.23', 80))\n\
                s1.sendall(b'GET /v1/cre')\nprint('held', flush=True)\ntime.sleep(60)";
    let mut held = node.lab.exec(&pod, EnvKind::None, &["python3", "-c", program])?;
    let mut held = held.stdout(std::process::Stdio::piped()).kill_on_drop(true).spawn()?;
    let output = held.stdout.take().context("BUG: no pipe")?;
    assert_eq!(BufReader::new(output).lines().next_line().await?.as_deref(), Some("held"));
    let before = node.veths().await?;
    node.lab.complete_pod(&pod)?;
    let begun = Instant::now();
    while node.veths().await? == before {
        assert!(begun.elapsed() < GONE_WITHIN, "the network is still there");
    }
    println!("the network was gone after {:?}", begun.elapsed());
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_pods_network_only_the_pod_or_its_token_is_served() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let (pod, proxy) = (node.pod("app")?, node.pod("proxy")?);
    let own = format!("http://127.0.0.1:{}", node.listener_port(&pod).await?);
    let (credentials, imds) = (format!("{own}/v1/credentials"), format!("{own}/latest/api/token"));
    let host = ["-H", "Host: 169.254.170.23"];
    // The pod itself, as a sidecar that connects again.
    node.assert_own_role(&pod, &node.curl(&pod, &[&host[..], &[&credentials]].concat()).await?);
    // Another pod there, as a proxy of the node's.
    let answer = node.curl_through(&proxy, &pod, &[&host[..], &[&credentials]].concat()).await?;
    answer.assert_refused(400, &[]);
    let put =
        ["-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 60", "-H", "Host: 169.254.169.254", &imds];
    assert_ne!(node.curl_through(&proxy, &pod, &put).await?.status, 200);
    let token_of = |pod: &Pod| {
        let audience = ["pods.eks.amazonaws.com"];
        let token =
            node.lab.cluster.mint_pod_token(&pod.namespace, &pod.name, &audience, Duration::from_hours(1));
        format!("Authorization: {token}")
    };
    let with =
        |token: String| [host[0].to_owned(), host[1].to_owned(), "-H".to_owned(), token, credentials.clone()];
    let theirs = with(token_of(&proxy));
    let theirs: Vec<_> = theirs.iter().map(String::as_str).collect();
    node.curl_through(&proxy, &pod, &theirs).await?.assert_refused(403, &[]);
    let own = with(token_of(&pod));
    let own: Vec<_> = own.iter().map(String::as_str).collect();
    node.assert_own_role(&pod, &node.curl_through(&proxy, &pod, &own).await?);
    node.down().await
}
