//! EKS Auth and the API server are slow, unavailable or refuse.

use std::time::{Duration, Instant};

use super::{Fault, IMDS, ImdsMode, Node, POD_IDENTITY, Service, imds_credentials, imds_v2, injected, web};

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_api_server_does_not_block_a_pod_forever() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = web(&node);
    node.connect_as(&pod, IMDS);
    imds_v2(&node, "/latest/meta-data/").await;
    node.connect_as(&pod, POD_IDENTITY);
    node.faults.set(Service::KubeApi, Fault::Hang);
    assert_eq!(node.get("/v1/credentials", &[]).await.status, 503, "there is no token to be had");
    node.faults.clear(Service::KubeApi);
    let begun = Instant::now();
    while node.get("/v1/credentials", &[]).await.status != 200 {
        assert!(begun.elapsed() < Duration::from_secs(15), "the hung call is never canceled");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_is_quick_and_clear_when_eks_auth_is_unavailable() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), POD_IDENTITY);
    node.faults.set(Service::EksAuth, Fault::Drop);
    let begun = Instant::now();
    let answer = node.get("/v1/credentials", &[]).await;
    assert!(begun.elapsed() < Duration::from_millis(500));
    assert_eq!(answer.status, 500);
    assert!(answer.message().contains("EKS Auth cannot be reached"), "{answer:?}");
    node.faults.clear(Service::EksAuth);
    // While EKS Auth is unavailable it is called once in two seconds.
    let begun = Instant::now();
    while node.get("/v1/credentials", &[]).await.status != 200 {
        assert!(begun.elapsed() < Duration::from_secs(5), "a failure is cached");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_fetch_outlives_its_caller_and_serves_the_next_one() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), POD_IDENTITY);
    node.faults.set(Service::EksAuth, Fault::Latency(Duration::from_millis(1200)));
    let begun = Instant::now();
    let slow = node.get("/v1/credentials", &[]).await;
    assert_eq!(slow.status, 503, "{slow:?}");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(node.get("/v1/credentials", &[]).await.status, 200);
    assert_eq!(node.eks_auth.calls(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_eks_auth_keep_their_status_and_text() {
    for (status, code) in [(400, "AccessDeniedException"), (503, "ServiceUnavailableException")] {
        let node = Node::start(ImdsMode::Intercept).await;
        node.connect_as(&web(&node), POD_IDENTITY);
        let fault = Fault::Error { status, code: code.into(), message: "words of AWS".into() };
        node.faults.set(Service::EksAuth, fault);
        let answer = node.get("/v1/credentials", &[]).await;
        assert_eq!(answer.status, status, "{answer:?}");
        assert_eq!(answer.json()["code"], code);
        assert!(answer.message().contains(&format!("({code}): words of AWS, fault: ")), "{answer:?}");
    }
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), POD_IDENTITY);
    node.faults.set(Service::EksAuth, Fault::Throttle { retry_after: None });
    assert_eq!(node.get("/v1/credentials", &[]).await.status, 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_remembered_for_its_pod_alone() {
    let node = Node::start(ImdsMode::Intercept).await;
    let first = node.pod("web-0", "lonely", |_| {});
    node.connect_as(&first, POD_IDENTITY);
    for _ in 0..20 {
        assert_eq!(node.get("/v1/credentials", &[]).await.status, 404);
    }
    assert_eq!(node.eks_auth.calls(), 1);
    node.eks_auth.associate("app", "lonely", "web-role");
    node.connect_as(&node.pod("web-1", "lonely", |_| {}), POD_IDENTITY);
    assert_eq!(node.get("/v1/credentials", &[]).await.status, 200, "a new pod starts clean");
}

#[tokio::test(flavor = "multi_thread")]
async fn node_credentials_that_aws_refuses_are_named() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), POD_IDENTITY);
    let (code, message) = ("ExpiredTokenException", "The security token included in the request is expired");
    node.faults
        .set(Service::EksAuth, Fault::Error { status: 403, code: code.into(), message: message.into() });
    let answer = node.get("/v1/credentials", &[]).await;
    assert_eq!(answer.status, 500, "{answer:?}");
    assert!(answer.message().contains("the node has no AWS credentials"), "{answer:?}");
    assert!(answer.message().contains(message), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_pod_with_a_kubelet_token_needs_no_api_server() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = injected(&node);
    pod.kubelet_writes(&node, &pod.token(&node));
    node.connect_as(&pod, IMDS);
    assert_eq!(imds_credentials(&node).await.status, 200, "the pod is known");
    let other = node.pod("web-1", "web", |spec| spec.token_volume = true);
    other.kubelet_writes(&node, &other.token(&node));
    node.connect_as(&other, POD_IDENTITY);
    assert_eq!(node.get("/v1/credentials", &[("Authorization", "x")]).await.status, 400);
    node.connect_as(&other, IMDS);
    imds_v2(&node, "/latest/meta-data/").await;
    node.faults.set(Service::KubeApi, Fault::Drop);
    assert_eq!(node.role_of(&imds_credentials(&node).await), "web-role for web-1");
}
