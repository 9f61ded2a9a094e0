//! Service-account tokens that callers send.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use super::{
    ECS, Fault, Faults, IMDS, ImdsMode, KubeApi, Node, POD_IDENTITY, ROLES, Service, TOKEN, TTL, TestPod,
    WRONG_AUDIENCE, imds_credentials, injected,
};

#[tokio::test(flavor = "multi_thread")]
async fn the_webhooks_token_is_served_with_and_without_an_origin() {
    let node = Node::start(ImdsMode::Audit).await;
    let pod = injected(&node);
    let token = pod.token(&node);
    node.connect_anonymously();
    let answer = node.get("/v1/credentials", &[("Authorization", &token)]).await;
    assert_eq!(node.role_of(&answer), "web-role for web-0");
    assert!(answer.head.contains("content-length:"), "{answer:?}");
    node.connect_as(&pod, POD_IDENTITY);
    let answer = node.get("/v1/credentials", &[("Authorization", &token)]).await;
    assert_eq!(node.role_of(&answer), "web-role for web-0");
    assert_eq!(node.eks_auth.calls(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn anonymous_callers_without_a_token_are_refused() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_anonymously();
    let answer = node.get("/v1/credentials", &[]).await;
    assert_eq!((answer.status, answer.message().as_str()), (400, "Service account token cannot be empty"));
    for (method, path) in [("PUT", TOKEN), ("GET", ROLES), ("GET", "/")] {
        let answer = node.request(method, path, &[TTL, ("Host", "169.254.169.254")]).await;
        assert_eq!(answer.status, 403, "{answer:?}");
        assert!(answer.body.contains("does not know which pod"), "{answer:?}");
    }
}

/// What the container endpoints answer a pod that sends no token, and how often its account was counted for that.
async fn tokenless(node: &Node, pod: &TestPod, account: &str) -> ([u16; 2], u64) {
    let mut statuses = [0; 2];
    for (status, address) in statuses.iter_mut().zip([POD_IDENTITY, ECS]) {
        node.connect_as(pod, address);
        let answer = node.get("/v1/credentials", &[("Host", address)]).await;
        if answer.status == 200 {
            assert_eq!(node.role_of(&answer), format!("{account}-role for {}", pod.name));
        } else {
            assert!(answer.body.contains("podgate.dev/tokenless"), "{answer:?}");
        }
        *status = answer.status;
    }
    let name =
        format!("podgate_tokenless_requests_total{{namespace=\"app\",service_account=\"{account}\"}} ");
    let metrics = node.metrics();
    let count =
        metrics.lines().find_map(|line| line.strip_prefix(&name)).and_then(|count| count.parse().ok());
    (statuses, count.unwrap_or(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_a_token_is_served_and_counted_as_the_settings_say() {
    for (is_allowed, plain, allowed) in
        [(true, ([200, 200], 2), ([200, 200], 2)), (false, ([400, 400], 0), ([200, 200], 2))]
    {
        let deny = |config: &mut agent::config::Config| config.tokenless = false;
        let configure = if is_allowed { |_: &mut _| {} } else { deny };
        let node = Node::start_configured(ImdsMode::Intercept, Faults::default(), |_| {}, configure).await;
        for account in ["plain", "volume", "asks", "asks-with-volume", "denies"] {
            node.eks_auth.associate("app", account, &format!("{account}-role"));
        }
        let pod = |account: &str, token_volume: bool, annotation: Option<&str>| {
            node.pod(&format!("{account}-0"), account, |spec| {
                spec.token_volume = token_volume;
                let annotation =
                    annotation.map(|value| ("podgate.dev/tokenless".to_owned(), value.to_owned()));
                spec.annotations.extend(annotation);
            })
        };
        assert_eq!(tokenless(&node, &pod("plain", false, None), "plain").await, plain);
        assert_eq!(tokenless(&node, &pod("volume", true, None), "volume").await, ([400, 400], 0));
        assert_eq!(tokenless(&node, &pod("asks", false, Some("allow")), "asks").await, allowed);
        let with_volume = pod("asks-with-volume", true, Some("allow"));
        assert_eq!(tokenless(&node, &with_volume, "asks-with-volume").await, allowed);
        assert_eq!(tokenless(&node, &pod("denies", false, Some("deny")), "denies").await, ([400, 400], 0));

        // With its token, the pod is served and not counted.
        let volume = node.pod("volume-1", "volume", |spec| spec.token_volume = true);
        node.connect_as(&volume, POD_IDENTITY);
        let answer = node.get("/v1/credentials", &[("Authorization", &volume.token(&node))]).await;
        assert_eq!(node.role_of(&answer), "volume-role for volume-1");
        assert!(
            !node
                .metrics()
                .contains("podgate_tokenless_requests_total{namespace=\"app\",service_account=\"volume\"}")
        );
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forged_anonymous_token_never_gets_cached_credentials() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = injected(&node);
    let genuine = pod.token(&node);
    node.connect_anonymously();
    let header = |token: &str| [("Authorization", token.to_owned())];
    let get = async |token: &str| {
        let [(name, value)] = header(token);
        node.get("/v1/credentials", &[(name, &value)]).await
    };
    assert_eq!(get(&genuine).await.status, 200, "the pod's credentials are cached now");
    let (signed, _signature) = genuine.rsplit_once('.').unwrap();
    let forged = format!("{signed}.Zm9yZ2Vk");
    let answer = get(&forged).await;
    assert_eq!(answer.status, 400, "{answer:?}");
    assert!(answer.message().contains("InvalidTokenException"), "{answer:?}");
    assert_eq!(get(&genuine).await.status, 200);
    assert_eq!(node.eks_auth.calls(), 1, "its signature was verified here");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_cannot_be_verified_here_is_sent_to_eks_auth() {
    let deny = |kube_api: &KubeApi| kube_api.allow_issuer_discovery(false);
    let node = Node::start_where(ImdsMode::Intercept, Faults::default(), deny).await;
    let pod = injected(&node);
    let genuine = pod.token(&node);
    node.connect_anonymously();
    for _ in 0..2 {
        let answer = node.get("/v1/credentials", &[("Authorization", &genuine)]).await;
        assert_eq!(node.role_of(&answer), "web-role for web-0");
    }
    assert_eq!(node.eks_auth.calls(), 1);
    let (signed, _signature) = genuine.rsplit_once('.').unwrap();
    let forged = format!("{signed}.Zm9yZ2Vk");
    for _ in 0..3 {
        let answer = node.get("/v1/credentials", &[("Authorization", &forged)]).await;
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.message().contains("InvalidTokenException"), "{answer:?}");
    }
    assert_eq!(node.eks_auth.calls(), 2, "one call settles a forged token");
}

/// Bad tokens, and why they are refused where the cluster's keys are known.
fn bad_tokens(node: &Node) -> [(String, &'static str); 5] {
    let life = Duration::from_hours(1);
    let audience = node.cluster.mint_pod_token("app", "web-0", &["sts.amazonaws.com"], life);
    let mut claims = node.cluster.pod_claims("app", "web-0", &["pods.eks.amazonaws.com"], life);
    let forged = node.cluster.signing_key().forge().sign(&claims);
    let other_key = lab::jwt::SigningKey::generate().sign(&claims);
    claims.iss = "https://oidc.test.invalid/id/OTHER".into();
    let issuer = node.cluster.sign(&claims);
    claims.iss = node.cluster.issuer().into();
    claims.kubernetes.pod = None;
    let unbound = node.cluster.sign(&claims);
    [
        (audience, WRONG_AUDIENCE),
        (unbound, "it is not bound to a pod"),
        (forged, "its signature is wrong"),
        (other_key, "a key that is not the cluster's"),
        (issuer, "its issuer is not this cluster"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_another_audience_or_cluster_is_refused_here() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = injected(&node);
    for (token, reason) in bad_tokens(&node) {
        node.connect_anonymously();
        let answer = node.get("/v1/credentials", &[("Authorization", &token)]).await;
        assert_eq!(answer.status, 400, "{answer:?}");
        assert!(answer.message().contains(reason), "{answer:?}");
        // The kernel's attestation does not make a bad token good.
        node.connect_as(&pod, POD_IDENTITY);
        let answer = node.get("/v1/credentials", &[("Authorization", &token)]).await;
        assert!((400..=403).contains(&answer.status), "{answer:?}");
    }
    assert_eq!(node.eks_auth.calls(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_keys_wrong_audiences_are_refused_here_forgeries_by_eks_auth() {
    let deny = |kube_api: &KubeApi| kube_api.allow_issuer_discovery(false);
    for number in 0..5 {
        // A node of its own: whoever has sent a bad token must wait before the next.
        let node = Node::start_where(ImdsMode::Intercept, Faults::default(), deny).await;
        let pod = injected(&node);
        let (token, reason) = bad_tokens(&node)[number].clone();
        let get = async || node.get("/v1/credentials", &[("Authorization", &token)]).await;
        node.connect_anonymously();
        let anonymous = get().await;
        node.connect_as(&pod, POD_IDENTITY);
        let answers = [anonymous, get().await];
        assert!(answers.iter().all(|answer| (400..=403).contains(&answer.status)), "{answers:?}");
        if number < 2 {
            assert!(answers[0].message().contains(reason), "{answers:?}");
            assert_eq!(node.eks_auth.calls(), 0, "{reason}");
        } else {
            assert!(node.eks_auth.calls() > 0, "{reason}: only EKS Auth can tell");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kubelet_token_for_another_audience_is_not_sent_to_eks_auth() {
    for has_keys in [true, false] {
        let change =
            if has_keys { |_: &KubeApi| {} } else { |api: &KubeApi| api.allow_issuer_discovery(false) };
        let node = Node::start_where(ImdsMode::Intercept, Faults::default(), change).await;
        let pod = injected(&node);
        let life = Duration::from_hours(1);
        pod.kubelet_writes(&node, &node.cluster.mint_pod_token("app", "web-0", &["sts.amazonaws.com"], life));
        node.connect_as(&pod, IMDS);
        assert_eq!(node.role_of(&imds_credentials(&node).await), "web-role for web-0");
        assert_eq!((node.eks_auth.calls(), node.eks_auth.refusals().len()), (1, 0), "keys: {has_keys}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stolen_token_is_worthless_to_a_pod() {
    let node = Node::start(ImdsMode::Intercept).await;
    let victim = injected(&node);
    let thief = node.pod("thief-0", "thief", |_| {});
    node.connect_as(&thief, POD_IDENTITY);
    let answer = node.get("/v1/credentials", &[("Authorization", &victim.token(&node))]).await;
    assert_eq!(answer.status, 403, "{answer:?}");
    assert_eq!(node.eks_auth.calls(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_delegate_may_present_other_pods_verified_tokens() {
    let node = Node::start(ImdsMode::Intercept).await;
    let app = injected(&node);
    let [delegate, other] = ["csi", "csi-2"].map(|name| node.pod(&format!("{name}-0"), name, |_| {}));
    let ask = async |pod: &TestPod, token: &str| {
        node.connect_as(pod, POD_IDENTITY);
        node.get("/v1/credentials", &[("Authorization", token)]).await
    };
    let token = app.token(&node);
    let answer = ask(&delegate, &token).await;
    assert_eq!((answer.status, node.role_of(&answer).as_str()), (200, "web-role for web-0"));
    let answer = ask(&other, &token).await;
    assert_eq!(answer.status, 403, "{answer:?}");

    let calls = node.eks_auth.calls();
    let life = Duration::from_hours(1);
    let mut claims = node.cluster.pod_claims("app", "web-0", &["pods.eks.amazonaws.com"], life);
    let forged = node.cluster.signing_key().forge().sign(&claims);
    claims.kubernetes.pod = None;
    let unbound = node.cluster.sign(&claims);
    node.cluster.add_node("n2");
    let elsewhere = node.pod("far-0", "far", |spec| spec.node = "n2".into()).token(&node);
    let off = node.pod("off-0", "off", |spec| {
        spec.token_volume = true;
        spec.annotations.insert("podgate.dev/pod-identity".into(), "off".into());
    });
    let off = off.token(&node);
    for (token, status) in [(forged, 400), (unbound, 400), (elsewhere, 503), (off, 403)] {
        let answer = ask(&delegate, &token).await;
        assert_eq!(answer.status, status, "{answer:?}");
    }
    assert_eq!(node.eks_auth.calls(), calls);
    let metrics = node.metrics();
    for line in [
        "podgate_delegated_requests_total{namespace=\"app\",service_account=\"csi\",answer=\"served\"} 1",
        "podgate_delegated_requests_total{namespace=\"app\",service_account=\"csi\",answer=\"refused\"} 4",
        "podgate_mismatched_tokens_total{namespace=\"app\",service_account=\"csi-2\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_keys_a_delegate_must_retry_and_eks_auth_is_not_called() {
    let deny = |kube_api: &KubeApi| kube_api.allow_issuer_discovery(false);
    let node = Node::start_where(ImdsMode::Intercept, Faults::default(), deny).await;
    let app = injected(&node);
    let delegate = node.pod("csi-0", "csi", |_| {});
    node.connect_as(&delegate, POD_IDENTITY);
    let answer = node.get("/v1/credentials", &[("Authorization", &app.token(&node))]).await;
    assert_eq!(answer.status, 503, "{answer:?}");
    assert_eq!(node.eks_auth.calls(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_fetched_from_a_slow_api_server_though_no_caller_waits() {
    let faults = Faults::default();
    // Two calls for the keys: longer than any caller waits.
    faults.set(Service::KubeApi, Fault::Latency(Duration::from_millis(400)));
    let node = Node::start_with(ImdsMode::Intercept, faults).await;
    let app = injected(&node);
    let delegate = node.pod("csi-0", "csi", |_| {});
    let token = app.token(&node);
    node.connect_as(&delegate, POD_IDENTITY);
    let begun = Instant::now();
    loop {
        let mut stream = TcpStream::connect(node.address).unwrap();
        let request =
            format!("GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nAuthorization: {token}\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut status = [0; 12];
        if stream.read_exact(&mut status).is_ok() && &status == b"HTTP/1.1 200" {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(5), "{}", String::from_utf8_lossy(&status));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stolen_token_is_worthless_to_a_pod_unknown_to_the_watch() {
    let node = Node::start(ImdsMode::Intercept).await;
    let victim = injected(&node);
    node.connect_as(&node.cgroup_of("thief", "0c5cb3f2-7a47-4a4b-8f0c-5b0f6a3d2e11"), POD_IDENTITY);
    let answer = node.get("/v1/credentials", &[("Authorization", &victim.token(&node))]).await;
    assert_eq!(answer.status, 503, "{answer:?}");
    assert_eq!(node.eks_auth.calls(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_has_a_token_must_send_it() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = injected(&node);
    node.connect_as(&pod, POD_IDENTITY);
    let answer = node.get("/v1/credentials", &[]).await;
    assert_eq!(answer.status, 400);
    assert!(answer.message().starts_with("Service account token cannot be empty"), "{answer:?}");
    // IMDS has no token: there the kernel's attestation is enough, and the kubelet's file the token.
    pod.kubelet_writes(&node, &pod.token(&node));
    node.connect_as(&pod, IMDS);
    assert_eq!(node.role_of(&imds_credentials(&node).await), "web-role for web-0");
}
