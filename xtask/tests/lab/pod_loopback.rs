//! A pod's own network as podgate finds it: what of it does not matter, what costs this pod alone a moment, and what leaves it
//! refused.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use lab::{EnvKind, Pod};
use tokio::time::sleep;

use crate::lab_node::{self, Node, POD_IDENTITY};

/// Time in which podgate finds out that its listeners in a pod do not answer, on a busy machine, too.
const SOON: Duration = Duration::from_secs(20);
/// One request at an address, from a socket bound to an interface if one is named; prints the status and from where.
const ASK: &str = "import socket, sys
address, interface = sys.argv[1:]
client = socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET)
client.settimeout(2)
if interface: client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
client.connect((address, 80))
client.sendall(b'GET /v1/credentials HTTP/1.1\\r\\nHost: 169.254.170.23\\r\\n\\r\\n')
print(client.recv(4096).split()[1].decode(), client.getsockname()[0])";
/// Every port above those that the kernel gives to anybody, at all addresses of each family; prints those that are taken.
const LISTEN_EVERYWHERE: &str = "import socket
for port in range(61000, 65536):
    for family, any in [(socket.AF_INET, '0.0.0.0'), (socket.AF_INET6, '::')]:
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((any, port))
            listener.listen()
        except OSError: print(port)
        listener.close()";

/// The status of an answer, and the address at which the pod's end of the connection was.
async fn ask(node: &Node, pod: &Pod, address: &str, interface: &str) -> anyhow::Result<String> {
    lab_node::text(node.lab.exec(pod, EnvKind::None, &["python3", "-c", ASK, address, interface])?).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_bound_to_an_interface_is_served_on_the_nodes_addresses() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("bound")?;
    node.listener_port(&pod).await?;
    let own = pod.addresses.v4.map(|address| address.to_string()).unwrap_or_default();
    assert_eq!(ask(&node, &pod, "169.254.170.23", "").await?, "200 127.0.0.1");
    assert_eq!(ask(&node, &pod, "169.254.170.23", "lo").await?, "200 127.0.0.1");
    assert_eq!(ask(&node, &pod, "169.254.170.23", "eth0").await?, format!("200 {own}"));
    assert_eq!(ask(&node, &pod, "::ffff:169.254.170.23", "eth0").await?, format!("200 ::ffff:{own}"));
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_switches_ipv6_off_is_served_as_before() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let pod = node.pod("v4-only")?;
    // As in a cluster of one family.
    let v4: Vec<IpAddr> = pod.addresses.v4.into_iter().map(Into::into).collect();
    node.lab.cluster.set_pod_ips(&pod.namespace, &pod.name, &v4);
    node.listener_port(&pod).await?;
    node.shell(&pod, "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6").await?;
    for _ in ["the agent that had listened before", "one that finds it so"] {
        assert_eq!(ask(&node, &pod, "169.254.170.23", "").await?, "200 127.0.0.1");
        assert_eq!(ask(&node, &pod, "::ffff:169.254.170.23", "").await?, "200 ::ffff:127.0.0.1");
        node.agent.kill().await?;
        node.agent = node.lab.start_agent(&lab_node::agent(&["--imds", "intercept"])?).await?;
        node.listener_port(&pod).await?;
    }
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_removes_127_0_0_1_is_served_on_the_nodes_addresses() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let (pod, other) = (node.pod("bare")?, node.pod("other")?);
    node.listener_port(&pod).await?;
    node.shell(&pod, "ip address delete 127.0.0.1/8 dev lo").await?;
    let own = pod.addresses.v4.map(|address| address.to_string()).unwrap_or_default();
    let begun = Instant::now();
    // The first ones find nothing there.
    while ask(&node, &pod, "169.254.170.23", "").await? != format!("200 {own}") {
        assert!(begun.elapsed() < SOON, "{}", node.agent.log_tail());
    }
    node.assert_own_role(&other, &node.curl(&other, &[POD_IDENTITY]).await?);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_redirects_all_of_its_loopback_is_refused_at_once() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let (pod, other) = (node.pod("diverted")?, node.pod("other")?);
    node.listener_port(&pod).await?;
    let all = "nft 'add table ip mesh; add chain ip mesh out { type nat hook output priority -100; }; add rule ip mesh out \
               meta l4proto tcp redirect to :15001'";
    node.shell(&pod, all).await?;
    let answer = node.curl(&pod, &["--connect-timeout", "1", POD_IDENTITY]).await?;
    assert!(answer.status == 0 && answer.milliseconds < 500.0, "{answer:?}");
    node.agent.kill().await?;
    node.agent = node.lab.start_agent(&lab_node::agent(&["--imds", "intercept"])?).await?;
    let said =
        |line: &str| line.contains("cannot serve a pod in its own network") && line.contains("shop/diverted");
    let begun = Instant::now();
    while !node.agent.log_text()?.lines().any(said) {
        assert!(begun.elapsed() < SOON, "{}", node.agent.log_tail());
        sleep(Duration::from_millis(10)).await;
    }
    node.assert_own_role(&other, &node.curl(&other, &[POD_IDENTITY]).await?);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn all_ports_but_the_one_that_whois_names_are_the_pods() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("greedy")?;
    let port = node.listener_port(&pod).await?;
    // One line a family.
    assert_eq!(node.python(&pod, LISTEN_EVERYWHERE).await?, format!("{port}\n{port}"));
    node.assert_own_role(&pod, &node.curl(&pod, &[POD_IDENTITY]).await?);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_is_made_again_has_listeners_of_its_own() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let spec = lab_node::spec("phoenix");
    let before = node.lab.add_pod(&spec)?;
    let with_one = node.veths().await?;
    for _ in 0..3 {
        let pod = node.lab.restart_sandbox(&before, &spec)?;
        assert_ne!(pod.addresses.v4, before.addresses.v4);
        node.listener_port(&pod).await?;
        assert_eq!(ask(&node, &pod, "169.254.170.23", "").await?, "200 127.0.0.1");
        node.assert_own_role(&pod, &node.curl(&pod, &[POD_IDENTITY]).await?);
        // Each other network is gone: this pod's, the agent has none of its own.
        let begun = Instant::now();
        while node.veths().await? != with_one {
            assert!(begun.elapsed() < SOON, "the network before is still there");
        }
    }
    node.down().await
}
