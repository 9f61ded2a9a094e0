//! Every way in which a node may route its pods, and the pods' way to podgate in each.

use std::time::Duration;

use lab::{EnvKind, Lab, LabSpec, Pod, simulated_network::Routing};
use tokio::time::{Instant, sleep};

use crate::lab_node::{self, HELPER, IMDS, Node, POD_IDENTITY};

const IMDS_V6: &str = "http://[fd00:ec2::254]";
const POD_IDENTITY_V6: &str = "http://[fd00:ec2::23]/v1/credentials";
/// A port of the node's own at which nobody listens: a connection is refused at once, unless it is lost on the way.
const CONNECT_TO_THE_NODE: &str = "import socket, errno
for address in ['10.10.0.10', 'fd10::10']:
    try: socket.create_connection((address, 9), 0.3)
    except TimeoutError: print('lost')
    except OSError as error: print(errno.errorcode[error.errno])";
/// In which the log has a line.
const SOON: Duration = Duration::from_secs(5);
/// Endpoints of the metadata service and of Pod Identity, IPv4 and IPv6.
const BOTH: [(&str, &str); 2] = [(IMDS, POD_IDENTITY), (IMDS_V6, POD_IDENTITY_V6)];

/// A node that routes its pods like that, with an agent that intercepts.
async fn routed(routing: Routing) -> anyhow::Result<Node> {
    let lab = Lab::up(LabSpec { routing, ..LabSpec::new(&lab_node::lab_name(), HELPER) })?;
    let agent = lab.start_agent(&lab_node::agent(&["--imds", "intercept"])?).await?;
    Ok(Node { lab, agent })
}

/// By the metadata service and by Pod Identity, the pod must get its own role.
async fn assert_served(node: &Node, pod: &Pod, endpoints: &[(&str, &str)]) -> anyhow::Result<()> {
    for (imds, pod_identity) in endpoints {
        node.assert_own_role(pod, &node.imds_v2(pod, imds, &[]).await?);
        node.assert_own_role(pod, &node.curl(pod, &[pod_identity]).await?);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn routed_as_by_the_vpc_cni_a_pod_gets_its_own_role() -> anyhow::Result<()> {
    let node = routed(Routing::VpcCni).await?;
    let pod = node.pod("plain")?;
    assert_eq!(node.python(&pod, CONNECT_TO_THE_NODE).await?, "ECONNREFUSED\nECONNREFUSED");
    assert_served(&node, &pod, &BOTH).await?;
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_strict_security_groups_gets_its_own_role() -> anyhow::Result<()> {
    let node = routed(Routing::StrictSecurityGroups).await?;
    let pod = node.pod("guarded")?;
    // The security groups are effective: the node itself is not to be reached past the VPC.
    assert_eq!(node.python(&pod, CONNECT_TO_THE_NODE).await?, "lost\nlost");
    node.listener_port(&pod).await?;
    assert_served(&node, &pod, &BOTH).await?;
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_ipv6_alone_gets_its_own_role() -> anyhow::Result<()> {
    let node = routed(Routing::Ipv6Only).await?;
    let pod = node.pod("modern")?;
    // Also at the IPv4 addresses, which SDKs ask by default: the loopback needs no route.
    assert_served(&node, &pod, &[(IMDS_V6, POD_IDENTITY_V6), (IMDS, POD_IDENTITY)]).await?;

    let injected = node.lab.add_pod(&lab_node::spec("injected").with_token())?;
    let ask = r#"curl -gs -w '\n%{http_code}' -H "Authorization: $(cat $AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE)" $AWS_CONTAINER_CREDENTIALS_FULL_URI"#;
    let output = lab_node::text(node.lab.exec(&injected, EnvKind::Webhook, &["sh", "-c", ask])?).await?;
    let (body, status) = output.rsplit_once('\n').unwrap_or_default();
    let answer = lab_node::Answer { status: status.parse()?, body: body.to_owned(), milliseconds: 0.0 };
    node.assert_own_role(&injected, &answer);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_lets_pods_reach_nothing_needs_no_exception() -> anyhow::Result<()> {
    let node = routed(Routing::DefaultDenyEgress).await?;
    let pod = node.pod("confined")?;
    node.listener_port(&pod).await?;
    assert_eq!(node.python(&pod, CONNECT_TO_THE_NODE).await?, "lost\nlost");
    assert_served(&node, &pod, &BOTH).await?;
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_chain_that_drops_everything_needs_no_exception() -> anyhow::Result<()> {
    let node = routed(Routing::DroppingInput).await?;
    let pod = node.pod("guest")?;
    node.listener_port(&pod).await?;
    assert_eq!(node.python(&pod, CONNECT_TO_THE_NODE).await?, "lost\nlost");
    assert_served(&node, &pod, &BOTH).await?;
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_connection_is_logged_with_the_pod_and_a_remedy() -> anyhow::Result<()> {
    let target = ["--target", "own"];
    let lab =
        Lab::up(LabSpec { routing: Routing::DroppingInput, ..LabSpec::new(&lab_node::lab_name(), HELPER) })?;
    let pod = lab.add_pod(&lab_node::spec("shut-out"))?;
    let closed = lab.exec(&pod, EnvKind::None, &["ip", "link", "set", "lo", "down"])?.status().await?;
    assert!(closed.success(), "ip: {closed}");
    let flags = [&["--imds", "intercept"][..], &target].concat();
    let agent = lab.start_agent(&lab_node::agent(&flags)?).await?;
    let node = Node { lab, agent };
    // The control: in its own network a pod is served all the same.
    let open = node.pod("open")?;
    node.listener_port(&open).await?;
    node.assert_own_role(&open, &node.curl(&open, &[POD_IDENTITY]).await?);
    let answer = node.curl(&pod, &["--connect-timeout", "1", POD_IDENTITY]).await?;
    assert_eq!(answer.status, 0, "{answer:?}");

    let said = |line: &str| {
        ["WARN", "nothing answered", "shop/shut-out", "curl", "allow 169.254.175.1 port 80"]
            .iter()
            .all(|words| line.contains(words))
    };
    let deadline = Instant::now() + SOON;
    while !node.agent.log_text()?.lines().any(said) {
        assert!(Instant::now() < deadline, "{}", node.agent.log_tail());
        sleep(Duration::from_millis(10)).await;
    }
    node.down().await
}
