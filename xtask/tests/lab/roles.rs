//! Every way to ask, and what each pod gets.

use lab::{
    EnvKind, Lab, LabSpec, NODE_ACCESS_KEY_ID, NODE_ROLE, PodSpec,
    cgroupfs::{CgroupDriver, Qos},
};

use crate::{
    lab_node::{self, HELPER, IMDS, Node, POD_IDENTITY, ROLES},
    policy::effective,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_only_knows_imdsv2_gets_the_role_of_its_pod() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("orders")?;
    let answer = node.imds_v2(&pod, IMDS, &[]).await?;
    node.assert_own_role(&pod, &answer);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn imdsv1_is_served_only_where_it_is_allowed_and_the_refusal_says_how() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let allowed = node.lab.add_pod(&lab_node::spec("reports").annotation("podgate.dev/imds-v1", "allow"))?;
    let role = node.curl(&allowed, &[ROLES]).await?;
    assert_eq!(role.status, 200, "{role:?}");
    let answer = node.curl(&allowed, &[&format!("{ROLES}{}", role.body)]).await?;
    node.assert_own_role(&allowed, &answer);

    let refused = node.pod("invoices")?;
    node.curl(&refused, &[ROLES]).await?.assert_refused(401, &["podgate.dev/imds-v1"]);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_webhooks_environment_and_token_file_work_as_with_the_eks_agent() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.lab.add_pod(&lab_node::spec("payments").with_token())?;
    // What the SDKs do, in the words of a shell.
    let ask = r#"curl -s -w '\n%{http_code}' -H "Authorization: $(cat $AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE)" $AWS_CONTAINER_CREDENTIALS_FULL_URI"#;
    for _ in 0..2 {
        let output = lab_node::text(node.lab.exec(&pod, EnvKind::Webhook, &["sh", "-c", ask])?).await?;
        let (body, status) = output.rsplit_once('\n').unwrap_or_default();
        let answer = lab_node::Answer { status: status.parse()?, body: body.to_owned(), milliseconds: 0.0 };
        node.assert_own_role(&pod, &answer);
        // The second round is with the token that the kubelet has put in its place.
        node.lab.rotate_token(&pod)?;
    }
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_without_a_token_is_known_by_its_cgroup_alone() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("search")?;
    for url in [POD_IDENTITY, "http://[fd00:ec2::23]/v1/credentials", "http://169.254.170.2/v1/credentials"] {
        let answer = node.curl(&pod, &[url]).await?;
        node.assert_own_role(&pod, &answer);
    }
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_and_dual_stack_sockets_are_redirected_as_well() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("catalog")?;
    let mapped = "169.254.169.254:80:[::ffff:169.254.169.254]:80";
    let answer = node.imds_v2(&pod, IMDS, &["--connect-to", mapped]).await?;
    node.assert_own_role(&pod, &answer);
    let answer = node.imds_v2(&pod, "http://[fd00:ec2::254]", &[]).await?;
    node.assert_own_role(&pod, &answer);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_ask_at_the_same_instant_get_their_own_roles() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pods = (0..6).map(|number| node.pod(&format!("app-{number}"))).collect::<Result<Vec<_>, _>>()?;
    let answers = futures::future::join_all(pods.iter().map(|pod| node.curl(pod, &[POD_IDENTITY]))).await;
    for (pod, answer) in pods.iter().zip(answers) {
        node.assert_own_role(pod, &answer?);
    }
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_an_association_is_refused_fast_and_by_name() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    // The agent signs with the node's credentials, which it fetches once, at the first call.
    node.curl(&node.pod("first")?, &[POD_IDENTITY]).await?;
    let reads = node.lab.imds.credential_reads();
    let pod = node.lab.add_pod(&PodSpec::new("shop", "unassociated"))?;
    let refusal = node.curl(&pod, &[POD_IDENTITY]).await?;
    refusal.assert_refused(404, &["shop", "unassociated"]);
    assert!(refusal.milliseconds < 100.0, "{refusal:?}");
    // Where an SDK goes next, the node's role would be: not for this pod.
    let session = node.session(&pod, IMDS, &[]).await?;
    node.curl(&pod, &["-H", &session, ROLES]).await?.assert_refused(404, &["shop", "unassociated"]);
    let node_role = format!("{ROLES}{NODE_ROLE}");
    node.curl(&pod, &["-H", &session, &node_role]).await?.assert_refused(404, &[]);
    assert_eq!(node.lab.imds.credential_reads(), reads);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_outside_any_pod_still_sees_the_real_metadata_service() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    assert_eq!(node.curl_on_node(&[ROLES]).await?.body, NODE_ROLE);
    let credentials = node.curl_on_node(&[&format!("{ROLES}{NODE_ROLE}")]).await?;
    assert_eq!(credentials.access_key_id().as_deref(), Some(NODE_ACCESS_KEY_ID));
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn in_audit_a_pod_without_identity_sees_the_real_metadata_service() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "audit"]).await?;
    let pod = node.pod("legacy")?;
    // Until then it is intercepted.
    effective(&node, &pod, "Audit", "Default").await?;
    assert_eq!(node.curl(&pod, &[ROLES]).await?.body, NODE_ROLE);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn in_deny_connections_to_imds_fail_at_once() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "deny"]).await?;
    let pod = node.pod("sealed")?;
    let program = "import socket, errno\ntry: socket.create_connection(('169.254.169.254', 80), 5)\n\
                except OSError as error: print(errno.errorcode[error.errno])";
    assert_eq!(node.python(&pod, program).await?, "EPERM");
    let refused = node.curl(&pod, &[ROLES]).await?;
    assert_eq!(refused.status, 0, "{refused:?}");
    assert!(refused.milliseconds < 100.0, "{refused:?}");
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_found_at_every_level_and_with_either_cgroup_driver() -> anyhow::Result<()> {
    for driver in [CgroupDriver::Systemd, CgroupDriver::Cgroupfs] {
        let lab = Lab::up(LabSpec { driver, ..LabSpec::new(&lab_node::lab_name(), HELPER) })?;
        let agent = lab.start_agent(&lab_node::agent(&["--imds", "intercept"])?).await?;
        let node = Node { lab, agent };
        for qos in [Qos::Guaranteed, Qos::Burstable, Qos::BestEffort] {
            let name = format!("{qos:?}").to_lowercase();
            let pod = node.lab.add_pod(&PodSpec { qos, ..lab_node::spec(&name) })?;
            let answer = node.imds_v2(&pod, IMDS, &[]).await?;
            node.assert_own_role(&pod, &answer);
        }
        node.down().await?;
    }
    Ok(())
}
