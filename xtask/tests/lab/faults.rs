//! When something else is broken, or the agent is told to stop.

use std::time::Duration;

use lab::fault_injection::{Fault, Service};

use crate::lab_node::{IMDS, Node, POD_IDENTITY, ROLES};

#[tokio::test(flavor = "multi_thread")]
async fn when_eks_auth_does_not_answer_the_refusal_is_fast_and_gives_the_reason() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    // The agent's own credentials are not what is missing.
    node.curl(&node.pod("first")?, &[POD_IDENTITY]).await?;
    let pod = node.pod("unlucky")?;
    for fault in [Fault::Drop, Fault::Hang] {
        node.lab.faults.set(Service::EksAuth, fault.clone());
        let refusal = node.curl(&pod, &[POD_IDENTITY]).await?;
        assert!((500..600).contains(&refusal.status), "{fault:?}: {refusal:?}");
        assert!(refusal.milliseconds < 2000.0, "{fault:?}: {refusal:?}");
        assert!(refusal.body.contains("EKS Auth"), "{fault:?}: {refusal:?}");
        node.lab.faults.clear(Service::EksAuth);
    }
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_outlive_eks_auth() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("steady")?;
    let before = node.curl(&pod, &[POD_IDENTITY]).await?;
    node.assert_own_role(&pod, &before);
    node.lab.faults.set(Service::EksAuth, Fault::Drop);
    let after = node.curl(&pod, &[POD_IDENTITY]).await?;
    assert_eq!(after.access_key_id(), before.access_key_id());
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn known_pods_are_served_while_the_api_server_is_down() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "intercept", "--prefetch", "off"]).await?;
    let cached = node.lab.add_pod(&crate::lab_node::spec("cached").with_token())?;
    node.assert_own_role(&cached, &node.imds_v2(&cached, IMDS, &[]).await?);
    // Known to the agent, but without credentials yet: the refusal of IMDSv1 needs the pod and no more.
    let known = node.lab.add_pod(&crate::lab_node::spec("known").with_token())?;
    node.curl(&known, &[ROLES]).await?.assert_refused(401, &[]);
    let calls = node.lab.eks_auth.calls();
    node.lab.faults.set(Service::KubeApi, Fault::Drop);
    node.assert_own_role(&cached, &node.imds_v2(&cached, IMDS, &[]).await?);
    node.assert_own_role(&known, &node.imds_v2(&known, IMDS, &[]).await?);
    assert_eq!(node.lab.eks_auth.calls(), calls + 1, "the second pod's first call is made meanwhile");
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_the_webhook_changed_has_its_credentials_before_it_asks() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.lab.add_pod(&crate::lab_node::spec("expected").with_token())?;
    let begun = std::time::Instant::now();
    while node.lab.eks_auth.accepted_calls() == 0 {
        assert!(begun.elapsed() < Duration::from_secs(5), "nothing is fetched");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.lab.faults.set(Service::EksAuth, Fault::Drop);
    node.assert_own_role(&pod, &node.imds_v2(&pod, IMDS, &[]).await?);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_flight_at_sigterm_is_answered() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    node.curl(&node.pod("first")?, &[POD_IDENTITY]).await?;
    let pod = node.pod("patient")?;
    node.lab.faults.set(Service::EksAuth, Fault::Latency(Duration::from_millis(500)));
    let stopping = async {
        tokio::time::sleep(Duration::from_millis(250)).await;
        node.agent.terminate()
    };
    let (answer, stopped) = tokio::join!(node.curl(&pod, &[POD_IDENTITY]), stopping);
    stopped?;
    node.assert_own_role(&pod, &answer?);
    assert!(node.agent.wait().await?.success());
    node.lab.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_started_again_serves_the_pods_that_are_there() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("constant")?;
    let Node { lab, mut agent } = node;
    agent.kill().await?;
    let agent = lab.start_agent(&crate::lab_node::agent(&["--imds", "intercept"])?).await?;
    let node = Node { lab, agent };
    node.assert_own_role(&pod, &node.imds_v2(&pod, crate::lab_node::IMDS, &[]).await?);
    node.down().await
}
