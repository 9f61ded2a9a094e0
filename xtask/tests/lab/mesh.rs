//! The connecting cgroup and the socket's network must belong to the same pod.

use std::{fs, process::Stdio, time::Duration};

use anyhow::Context as _;
use lab::{EnvKind, Pod};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader, Lines},
    process::{Child, ChildStdout},
    time::timeout,
};

use crate::lab_node::{self, IMDS, Node, POD_IDENTITY};

/// What a mesh does in its pods' networks: what the application connects to goes to the sidecar, which alone may send.
const REDIRECT: &str = "add table ip mesh
add chain ip mesh output { type nat hook output priority -100; }
add rule ip mesh output meta skuid != 1337 ip daddr 169.254.0.0/16 meta l4proto tcp redirect to :15001";
const REDIRECT_LOOPBACK: &str =
    "add rule ip mesh output meta skuid != 1337 ip daddr 127.0.0.1 tcp dport != 15001 redirect to :15001";
/// A connection that goes through the sidecar is there by then.
const UNSEEN: Duration = Duration::from_millis(300);
/// A sidecar: says where each connection was to go, and connects there itself. 80 is `SO_ORIGINAL_DST`.
const SIDECAR: &str = "import os, socket, struct, threading
os.setuid(1337)
listener = socket.create_server(('127.0.0.1', 15001))
print('ready', flush=True)
def copy(source, sink):
    while data := source.recv(65536): sink.sendall(data)
    sink.shutdown(socket.SHUT_WR)
while True:
    client, _ = listener.accept()
    port, address = struct.unpack('!2xH4s8x', client.getsockopt(socket.SOL_IP, 80, 16))
    address = socket.inet_ntoa(address)
    server = socket.create_connection((address, port))
    print(f'{address}:{port}', flush=True)
    for way in ((client, server), (server, client)):
        threading.Thread(target=copy, args=way, daemon=True).start()";

const SESSION: [&str; 4] = ["-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 60"];

#[tokio::test(flavor = "multi_thread")]
async fn a_node_wide_proxy_in_a_pods_network_gets_neither_role() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let proxy = node.pod("proxy")?;
    let application = node.lab.add_pod(&lab_node::spec("application").with_token())?;
    // The control: from its own network the proxy is itself.
    node.assert_own_role(&proxy, &node.curl(&proxy, &[POD_IDENTITY]).await?);
    let reads = node.lab.imds.credential_reads();

    let advice = "exclude 169.254.169.254/32";
    node.curl_through(&proxy, &application, &[POD_IDENTITY]).await?.assert_refused(403, &[advice]);
    let token = format!("{IMDS}/latest/api/token");
    let put = [&SESSION[..], &[token.as_str()]].concat();
    let session = node.curl_through(&proxy, &application, &put).await?;
    assert_eq!(session.status, 200, "{session:?}");
    let header = format!("X-aws-ec2-metadata-token: {}", session.body);
    let roles = node.curl_through(&proxy, &application, &["-H", &header, lab_node::ROLES]).await?;
    roles.assert_refused(403, &[advice]);
    assert_eq!(node.lab.imds.credential_reads(), reads);

    // The application's own token works on its way through the proxy, as with the EKS Pod Identity Agent.
    let audience = ["pods.eks.amazonaws.com"];
    let token = node.lab.cluster.mint_pod_token(
        &application.namespace,
        &application.name,
        &audience,
        Duration::from_hours(1),
    );
    let header = format!("Authorization: {token}");
    let answer = node.curl_through(&proxy, &application, &["-H", &header, POD_IDENTITY]).await?;
    node.assert_own_role(&application, &answer);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_whose_address_is_hidden_is_known_by_its_processes() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("hidden")?;
    let other = node.pod("other")?;
    // What the API server says is not where its connections come from, as behind SNAT.
    node.lab.cluster.set_pod_ips(&pod.namespace, &pod.name, &["10.9.9.9".parse()?]);
    // The watch shows it within milliseconds; a connection before that would prove the network by the old address.
    tokio::time::sleep(Duration::from_millis(300)).await;
    node.assert_own_role(&pod, &node.curl(&pod, &[POD_IDENTITY]).await?);
    node.curl_through(&pod, &other, &[POD_IDENTITY]).await?.assert_refused(403, &["network"]);
    node.down().await
}

/// A sidecar in a container of its own; killed when dropped.
struct Sidecar {
    process: Child,
    connections: Lines<BufReader<ChildStdout>>,
}

// === impl Sidecar ===

impl Sidecar {
    /// Starts it in a new container of `pod`, and sends it the pod's connections from now on.
    async fn start(node: &Node, pod: &Pod) -> anyhow::Result<Self> {
        let container = pod.cgroup.join(format!("cri-containerd-{}.scope", "5".repeat(64)));
        fs::create_dir(&container)?;
        let second = Pod { container, ..pod.clone() };
        let mut command = node.lab.exec(&second, EnvKind::None, &["python3", "-c", SIDECAR])?;
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let output = process.stdout.take().context("BUG: the sidecar's output is not a pipe")?;
        let mut sidecar = Self { process, connections: BufReader::new(output).lines() };
        assert_eq!(sidecar.next().await?, "ready");
        sidecar.redirect(node, pod, REDIRECT).await?;
        Ok(sidecar)
    }

    /// Sends it more of the pod's connections.
    async fn redirect(&self, node: &Node, pod: &Pod, rules: &str) -> anyhow::Result<()> {
        let loaded = node.lab.exec(pod, EnvKind::None, &["nft", rules])?.status().await?;
        assert!(loaded.success(), "nft: {loaded}");
        Ok(())
    }

    /// Where the next connection was to go, as the sidecar sees it.
    async fn next(&mut self) -> anyhow::Result<String> {
        let line = timeout(Duration::from_secs(10), self.connections.next_line()).await;
        line.context("the sidecar has no connection")??.context("the sidecar has ended")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sidecar_gets_the_role_of_its_own_pod() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("meshed")?;
    let mut sidecar = Sidecar::start(&node, &pod).await?;
    // The application's connection stays on the pod's loopback, of which the mesh sees nothing.
    node.assert_own_role(&pod, &node.curl(&pod, &[POD_IDENTITY]).await?);
    assert!(timeout(UNSEEN, sidecar.connections.next_line()).await.is_err(), "the sidecar has a connection");

    // A mesh that takes the loopback, too: the sidecar goes where the connection was redirected to.
    sidecar.redirect(&node, &pod, REDIRECT_LOOPBACK).await?;
    node.assert_own_role(&pod, &node.curl(&pod, &[POD_IDENTITY]).await?);
    assert!(sidecar.next().await?.starts_with("127.0.0.1:"));
    // Where it went first is lost on the way; what is asked for tells.
    node.assert_own_role(&pod, &node.imds_v2(&pod, IMDS, &[]).await?);
    for _ in 0..3 {
        assert!(sidecar.next().await?.starts_with("127.0.0.1:"));
    }
    // The control: without the sidecar nothing arrives.
    sidecar.process.kill().await?;
    assert_eq!(node.curl(&pod, &[POD_IDENTITY]).await?.status, 0);
    node.down().await
}
