//! Who a caller is: a pod that the API server does not show yet, an anonymous caller, a forged token.

use std::time::Duration;

use lab::PodSpec;
use serde_json::Value;

use crate::lab_node::{self, Node, POD_IDENTITY};

const NO_TOKEN: &str = "Service account token cannot be empty";
const AUDIENCE: &str = "pods.eks.amazonaws.com";
const HOUR: Duration = Duration::from_hours(1);

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_never_appears_is_refused_after_a_bounded_wait() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.lab.start_unannounced(&lab_node::spec("ghost"))?;
    let refusal = node.curl(&pod, &[POD_IDENTITY]).await?;
    refusal.assert_refused(503, &[]);
    assert!((500.0..1000.0).contains(&refusal.milliseconds), "{refusal:?}");
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_appears_while_its_first_call_waits_is_served() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let spec = lab_node::spec("late");
    let pod = node.lab.start_unannounced(&spec)?;
    let appearing = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        node.lab.announce(&pod, &spec)
    };
    let (answer, announced) = tokio::join!(node.curl(&pod, &[POD_IDENTITY]), appearing);
    announced?;
    let answer = answer?;
    node.assert_own_role(&pod, &answer);
    assert!(answer.milliseconds > 250.0, "{answer:?}");
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_without_origin_and_token_is_refused_as_by_the_eks_agent() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    node.curl_on_node(&[POD_IDENTITY]).await?.assert_refused(400, &[NO_TOKEN]);
    let elsewhere = "http://169.254.170.23/latest/meta-data/";
    let refusal = node.curl_on_node(&["-H", "Host: 169.254.169.254", elsewhere]).await?;
    refusal.assert_refused(403, &["does not know which pod"]);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_without_an_origin_is_believed_only_when_it_is_genuine() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.lab.add_pod(&lab_node::spec("victim").with_token())?;
    let genuine = node.lab.cluster.mint_pod_token(&pod.namespace, &pod.name, &[AUDIENCE], HOUR);
    let ask = async |token: &str| {
        let header = format!("Authorization: {token}");
        node.curl_on_node(&["-H", &header, POD_IDENTITY]).await
    };
    // The victim's credentials are in the cache from here on.
    node.assert_own_role(&pod, &ask(&genuine).await?);

    let claims = node.lab.cluster.pod_claims(&pod.namespace, &pod.name, &[AUDIENCE], HOUR);
    let forged = node.lab.cluster.signing_key().forge().sign(&claims);
    let unsigned = format!("{}.", genuine.rsplit_once('.').map_or("", |(signed, _)| signed));
    for (what, token) in [("forged", &forged), ("unsigned", &unsigned)] {
        let refusal = ask(token).await?;
        assert!((400..500).contains(&refusal.status), "{what}: {refusal:?}");
        assert_eq!(refusal.access_key_id(), None, "{what}: {refusal:?}");
    }
    node.assert_own_role(&pod, &ask(&genuine).await?);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_stolen_by_another_pod_is_refused() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let victim = node.lab.add_pod(&lab_node::spec("victim").with_token())?;
    let thief = node.pod("thief")?;
    let stolen = node.lab.cluster.mint_pod_token(&victim.namespace, &victim.name, &[AUDIENCE], HOUR);
    let header = format!("Authorization: {stolen}");
    node.curl(&thief, &["-H", &header, POD_IDENTITY]).await?.assert_refused(403, &["not bound to the pod"]);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_csi_driver_presents_its_application_token_once_it_is_named() -> anyhow::Result<()> {
    let node =
        Node::with_flags(&["--imds", "intercept", "--token-delegate", "kube-system/secrets-store"]).await?;
    let app = node.lab.add_pod(&lab_node::spec("app").with_token())?;
    let driver = node.lab.add_pod(&PodSpec::new("kube-system", "secrets-store").role("driver-role"))?;
    let impostor = node.lab.add_pod(&PodSpec::new("shop", "secrets-store"))?;
    let token = node.lab.cluster.mint_pod_token(&app.namespace, &app.name, &[AUDIENCE], HOUR);
    let header = format!("Authorization: {token}");
    let presented = ["-H", header.as_str(), POD_IDENTITY];
    node.assert_own_role(&app, &node.curl(&driver, &presented).await?);
    node.curl(&impostor, &presented).await?.assert_refused(403, &["not bound to the pod"]);
    // For itself it is what it was.
    node.assert_own_role(&driver, &node.curl(&driver, &[POD_IDENTITY]).await?);
    let log = node.agent.log_text()?;
    let audited = log.lines().find(|line| line.contains("a token delegate presented"));
    let audited = audited.unwrap_or_else(|| panic!("nothing in the log: {log}"));
    assert!(audited.contains("kube-system/secrets-store") && audited.contains(&app.uid), "{audited}");
    assert!(!log.contains(&token));
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_pod_with_the_name_of_a_deleted_one_is_a_pod_of_its_own() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let before = node.pod("phoenix")?;
    node.assert_own_role(&before, &node.curl(&before, &[POD_IDENTITY]).await?);
    node.lab.delete_pod(&before)?;
    let after = node.lab.add_pod(&PodSpec::new("shop", "phoenix").role("another-role"))?;
    node.assert_own_role(&after, &node.curl(&after, &[POD_IDENTITY]).await?);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn whois_names_the_pod_of_a_process() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("orders")?;
    let pid = pod.sandbox.pid.to_string();
    let whois = node.lab.agent_tool(&lab_node::agent_binary()?, &["whois", "--pid", &pid, "--json"])?;
    let answer: Value = serde_json::from_str(&lab_node::text(whois).await?)?;
    let answer = answer.to_string();
    for word in [&pod.uid, "orders", "shop"] {
        assert!(answer.contains(word), "{word}: {answer}");
    }
    node.down().await
}
