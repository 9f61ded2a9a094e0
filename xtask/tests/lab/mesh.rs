//! The dialling cgroup and the socket's network must belong to the same pod.

use std::time::Duration;

use crate::node::{self, IMDS, Node, POD_IDENTITY};

const SESSION: [&str; 4] = ["-X", "PUT", "-H", "X-aws-ec2-metadata-token-ttl-seconds: 60"];

#[tokio::test(flavor = "multi_thread")]
async fn a_node_wide_proxy_that_dials_through_an_application_s_network_gets_neither_role()
-> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let proxy = node.pod("proxy")?;
    let application = node.lab.add_pod(&node::spec("application").with_token())?;
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
    let roles = node.curl_through(&proxy, &application, &["-H", &header, node::ROLES]).await?;
    roles.assert_refused(403, &[advice]);
    assert_eq!(node.lab.imds.credential_reads(), reads);

    // The application's own token works on its way through the proxy, as with the stock agent.
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
    // The watch shows it within milliseconds; a dial before that would prove the network by the old address.
    tokio::time::sleep(Duration::from_millis(300)).await;
    node.assert_own_role(&pod, &node.curl(&pod, &[POD_IDENTITY]).await?);
    node.curl_through(&pod, &other, &[POD_IDENTITY]).await?.assert_refused(403, &["network"]);
    node.down().await
}
