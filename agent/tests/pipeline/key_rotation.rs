//! The keys of the cluster's tokens change, as they do now and then.

use std::time::{Duration, Instant};

use super::{IMDS, ImdsMode, Node, imds_credentials, injected};

#[tokio::test(flavor = "multi_thread")]
async fn after_a_key_rotation_new_and_old_tokens_are_verified_here() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = injected(&node);
    let old = pod.token(&node);
    node.connect_anonymously();
    let get = async |token: &str| node.get("/v1/credentials", &[("Authorization", token)]).await;
    assert_eq!(node.role_of(&get(&old).await), "web-role for web-0");
    node.cluster.rotate_signing_key();
    let new = pod.token(&node);
    let begun = Instant::now();
    // The keys are not fetched again within five seconds.
    while get(&new).await.status != 200 {
        assert!(begun.elapsed() < Duration::from_secs(10), "the new key is never known");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(get(&old).await.status, 200);
    let later = pod.token(&node);
    assert_eq!(get(&later).await.status, 200);
    assert_eq!(node.eks_auth.calls(), 1, "EKS Auth has judged none of them");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubelet_token_that_eks_auth_refuses_is_replaced() {
    let node = Node::start(ImdsMode::Intercept).await;
    let first = injected(&node);
    first.kubelet_writes(&node, &first.token(&node));
    node.connect_as(&first, IMDS);
    assert_eq!(node.role_of(&imds_credentials(&node).await), "web-role for web-0");
    // The agent has the keys now; the next token is of one of them that the cluster takes back.
    let second = node.pod("web-1", "web", |spec| spec.token_volume = true);
    second.kubelet_writes(&node, &second.token(&node));
    node.cluster.rotate_signing_key();
    node.cluster.retire_old_keys();
    node.connect_as(&second, IMDS);
    assert_eq!(node.role_of(&imds_credentials(&node).await), "web-role for web-1");
    let refusals = node.eks_auth.refusals();
    assert!(refusals.len() == 1 && refusals[0].contains("InvalidTokenException"), "{refusals:?}");
    assert_eq!((node.eks_auth.calls(), node.eks_auth.accepted_calls()), (3, 2));
}
