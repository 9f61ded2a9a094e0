//! The whole agent except for the kernel, in process: real requests in front, the lab's servers behind.

mod freshness;
mod harness;
mod key_rotation;
mod removed_pods;

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use agent::policy::ImdsMode;
use harness::{Answer, Node, TestPod};
use lab::{
    fault_injection::{Fault, Faults, Service},
    kube_api::KubeApi,
};
use rustix::net::{AddressFamily, SocketType, sockopt};

const IMDS: &str = "169.254.169.254";
const POD_IDENTITY: &str = "169.254.170.23";
const ECS: &str = "169.254.170.2";
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
const TOKEN: &str = "/latest/api/token";
const WRONG_AUDIENCE: &str = "its audience is not pods.eks.amazonaws.com";
const TTL: (&str, &str) = ("X-aws-ec2-metadata-token-ttl-seconds", "21600");

async fn session(node: &Node) -> String {
    let answer = node.request("PUT", TOKEN, &[TTL]).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.body
}

async fn imds_v2(node: &Node, path: &str) -> Answer {
    let session = session(node).await;
    node.get(path, &[("X-aws-ec2-metadata-token", &session)]).await
}

/// The three requests that every IMDSv2 client makes.
async fn imds_credentials(node: &Node) -> Answer {
    let session = session(node).await;
    let header = [("X-aws-ec2-metadata-token", session.as_str())];
    let roles = node.get(ROLES, &header).await;
    assert_eq!(roles.status, 200, "{roles:?}");
    node.get(&format!("{ROLES}{}", roles.body), &header).await
}

fn web(node: &Node) -> TestPod {
    node.eks_auth.associate("app", "web", "web-role");
    node.pod("web-0", "web", |_| {})
}

/// A pod as the EKS webhook leaves it.
fn injected(node: &Node) -> TestPod {
    node.eks_auth.associate("app", "web", "web-role");
    node.pod("web-0", "web", |spec| spec.token_volume = true)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_gets_its_own_role_from_each_address() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = web(&node);
    node.connect_as(&pod, IMDS);
    assert_eq!(node.role_of(&imds_credentials(&node).await), "web-role for web-0");
    node.connect_as(&pod, POD_IDENTITY);
    assert_eq!(node.role_of(&node.get("/v1/credentials", &[]).await), "web-role for web-0");
    node.connect_as(&pod, ECS);
    let ecs = node.get("/v1/credentials/anything", &[("Host", ECS)]).await;
    assert_eq!(node.role_of(&ecs), "web-role for web-0");
    assert_eq!(ecs.json()["RoleArn"], "arn:aws:iam::123456789012:role/web-role");
    assert_eq!(node.eks_auth.calls(), 1, "one call served all three");
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_one_service_account_get_credentials_of_their_own() {
    let node = Node::start(ImdsMode::Intercept).await;
    let first = web(&node);
    let second = node.pod("web-1", "web", |_| {});
    node.connect_as(&first, IMDS);
    assert_eq!(node.role_of(&imds_credentials(&node).await), "web-role for web-0");
    node.connect_as(&second, IMDS);
    assert_eq!(node.role_of(&imds_credentials(&node).await), "web-role for web-1");
}

#[tokio::test(flavor = "multi_thread")]
async fn imds_v1_is_refused_with_a_hint_and_served_where_it_is_allowed() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = web(&node);
    node.connect_as(&pod, IMDS);
    let refused = node.get(ROLES, &[]).await;
    assert_eq!(refused.status, 401);
    assert!(refused.body.contains("podgate.dev/imds-v1: allow"), "{refused:?}");

    let allowed = node.pod("old-0", "web", |spec| {
        spec.annotations.insert("podgate.dev/imds-v1".into(), "allow".into());
    });
    node.connect_as(&allowed, IMDS);
    assert_eq!(node.get(ROLES, &[]).await.body, "web-role");
    let credentials = node.get(&format!("{ROLES}web-role"), &[]).await;
    assert_eq!(node.role_of(&credentials), "web-role for old-0");
    let proxied = node.get(ROLES, &[("X-Forwarded-For", "10.0.0.1")]).await;
    assert_eq!(proxied.status, 403, "{proxied:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_token_is_of_no_use_to_another_pod() {
    let node = Node::start(ImdsMode::Intercept).await;
    let first = web(&node);
    let second = node.pod("web-1", "web", |_| {});
    node.connect_as(&first, IMDS);
    let stolen = session(&node).await;
    node.connect_as(&second, IMDS);
    for token in [stolen.as_str(), "INVALID", ""] {
        let answer = node.get(ROLES, &[("X-aws-ec2-metadata-token", token)]).await;
        assert_eq!(answer.status, 401, "{token:?} {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_node_is_served() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), IMDS);
    for path in [
        "/latest/user-data",
        "/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance",
        "/latest/dynamic/instance-identity/signature",
        "/latest/meta-data/iam/security-credentials/node-role",
    ] {
        assert_eq!(imds_v2(&node, path).await.status, 404, "{path}");
    }
}

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
        assert!(begun.elapsed() < Duration::from_secs(15), "the hung call is never cancelled");
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
async fn a_connection_is_closed_after_its_request_limit() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = web(&node);
    node.connect_as(&pod, POD_IDENTITY);
    let address = node.address;
    let served = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut answer = [0; 4096];
        for served in 0_u32..2000 {
            let sent = stream.write_all(b"GET /elsewhere HTTP/1.1\r\nHost: 169.254.170.23\r\n\r\n");
            let length = sent.and_then(|()| stream.read(&mut answer)).unwrap_or(0);
            if length == 0 {
                return served;
            }
        }
        u32::MAX
    });
    assert_eq!(served.await.unwrap(), 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_its_answers_is_disconnected() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = web(&node);
    node.connect_as(&pod, POD_IDENTITY);
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    sockopt::set_socket_recv_buffer_size(&socket, 2048).unwrap();
    rustix::net::connect(&socket, &node.address).unwrap();
    let mut stream = TcpStream::from(socket);
    let client = stream.local_addr().unwrap();
    let request = b"GET /elsewhere HTTP/1.1\r\nHost: 169.254.170.23\r\n\r\n".repeat(900);
    stream.write_all(&request).unwrap();
    // In whatever state: one that is closed with unread answers would stay for minutes. Both ends are compared: the
    // client's port alone may also be that of a connection of another test.
    let agent = node.address;
    let open = || {
        let mut sockets = procfs::net::tcp().unwrap().into_iter();
        sockets.find(|socket| socket.local_address == agent && socket.remote_address == client)
    };
    let begun = Instant::now();
    while let Some(socket) = open() {
        assert!(begun.elapsed() < Duration::from_secs(30), "it is still there: {socket:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_hangs_up_early_is_counted() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = web(&node);
    node.faults.set(Service::EksAuth, Fault::Hang);
    node.connect_as(&pod, POD_IDENTITY);
    let mut stream = TcpStream::connect(node.address).unwrap();
    stream.write_all(b"GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\n\r\n").unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(stream);
    let line = "podgate_abandoned_requests_total{dialect=\"pod-identity\"} 1";
    node.until(|| async { node.metrics().contains(line) }).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_mesh_proxy_gets_neither_role_but_may_pass_a_token_on() {
    let node = Node::start(ImdsMode::Intercept).await;
    let application = injected(&node);
    node.eks_auth.associate("app", "proxy", "proxy-role");
    let proxy = node.pod("proxy-0", "proxy", |_| {});
    // What the proxy connects to from its own network is its own request.
    node.connect_as(&proxy, POD_IDENTITY);
    assert_eq!(node.role_of(&node.get("/v1/credentials", &[]).await), "proxy-role for proxy-0");

    for address in [POD_IDENTITY, ECS, IMDS] {
        node.connect_through_another_network(&proxy, address);
        let refused = match address {
            IMDS => imds_v2(&node, ROLES).await,
            _ => node.get("/v1/credentials", &[("Host", address)]).await,
        };
        assert_eq!(refused.status, 403, "{refused:?}");
        assert!(refused.body.contains("exclude 169.254.169.254/32"), "{refused:?}");
    }
    node.connect_through_another_network(&proxy, POD_IDENTITY);
    let token = application.token(&node);
    let answer = node.get("/v1/credentials", &[("Authorization", &token)]).await;
    assert_eq!(node.role_of(&answer), "web-role for web-0", "as with the EKS Pod Identity Agent");
    // A token that names the proxy gets nothing that is cached for the proxy.
    let (signed, _) = proxy.token(&node).rsplit_once('.').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    let forged = format!("{signed}.Zm9yZ2Vk");
    assert_eq!(node.get("/v1/credentials", &[("Authorization", &forged)]).await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn annotations_of_pod_and_namespace_decide_at_once() {
    let node = Node::start(ImdsMode::Audit).await;
    let pod = web(&node);
    node.connect_as(&pod, IMDS);
    assert_eq!(imds_v2(&node, ROLES).await.status, 503, "audit: not ours");
    node.cluster.annotate_namespace("app", "podgate.dev/imds", Some("intercept"));
    node.until(|| async { imds_v2(&node, ROLES).await.status == 200 }).await;
    node.cluster.annotate_pod("app", "web-0", "podgate.dev/imds", Some("deny"));
    node.until(|| async { imds_v2(&node, ROLES).await.status == 403 }).await;
    node.cluster.annotate_pod("app", "web-0", "podgate.dev/imds", Some("off"));
    node.until(|| async { imds_v2(&node, ROLES).await.status == 200 }).await;
    node.cluster.annotate_namespace("app", "podgate.dev/imds-v1", Some("allow"));
    node.until(|| async { node.get(ROLES, &[]).await.status == 200 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_account_without_association_is_named_at_once() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = node.pod("web-0", "lonely", |_| {});
    for address in [IMDS, POD_IDENTITY] {
        node.connect_as(&pod, address);
        let answer = match address {
            IMDS => imds_v2(&node, ROLES).await,
            _ => node.get("/v1/credentials", &[]).await,
        };
        assert_eq!(answer.status, 404, "{answer:?}");
        assert!(answer.body.contains("app/lonely"), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_outside_of_pods_are_refused() {
    let node = Node::start(ImdsMode::Intercept).await;
    let cases = [
        ("burstable/podfc407168c6823ed1e0a61410d6621724/c", "static pod"),
        ("burstable", "belongs to no pod"),
        ("elsewhere/pod0c5cb3f2-7a47-4a4b-8f0c-5b0f6a3d2e11/c", "belongs to no pod"),
    ];
    for (path, reason) in cases {
        node.connect_from_cgroup(path, IMDS);
        let answer = node.request("PUT", TOKEN, &[TTL]).await;
        assert_eq!(answer.status, 403, "{path} {answer:?}");
        assert!(answer.body.contains(reason), "{path} {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_unknown_to_the_watch_waits_and_is_then_told_to_retry() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.eks_auth.associate("app", "web", "web-role");
    let uid = "0c5cb3f2-7a47-4a4b-8f0c-5b0f6a3d2e11";
    let pod = node.cgroup_of("late-0", uid);
    node.connect_as(&pod, POD_IDENTITY);
    let begun = Instant::now();
    let answer = node.get("/v1/credentials", &[]).await;
    let waited = begun.elapsed();
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(waited >= Duration::from_millis(700) && waited < Duration::from_secs(1), "{waited:?}");

    let (late, ()) = tokio::join!(node.get("/v1/credentials", &[]), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        node.pod("late-0", "web", |spec| spec.uid = Some(uid.into()));
    });
    assert_eq!(node.role_of(&late), "web-role for late-0");
    // The session token needs no watch at all.
    node.connect_as(&node.cgroup_of("never", "0c5cb3f2-7a47-4a4b-8f0c-5b0f6a3d2e12"), IMDS);
    session(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_not_intercepted_any_more_is_told_to_reconnect() {
    for (imds, status) in [(ImdsMode::Off, 503), (ImdsMode::Audit, 503), (ImdsMode::Deny, 403)] {
        let node = Node::start(imds).await;
        node.connect_as(&web(&node), IMDS);
        assert_eq!(imds_v2(&node, ROLES).await.status, status, "{imds:?}");
        assert_eq!(node.eks_auth.calls(), 0);
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

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_client_harms_only_its_own_connection() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), POD_IDENTITY);
    let long =
        format!("GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nX: {}\r\n\r\n", "a".repeat(100_000));
    let (garbage, long, one_byte) = tokio::join!(
        node.raw(b"\x16\x03\x01 this is no HTTP\r\n\r\n".to_vec()),
        node.raw(long),
        // Waits for the end of the connection, which comes although nothing more is sent.
        tokio::time::timeout(Duration::from_secs(9), node.raw("G"))
    );
    for answer in [garbage, long, one_byte.expect("the connection is closed")].into_iter().flatten() {
        assert!((400..500).contains(&answer.status), "{answer:?}");
    }
    assert_eq!(node.get("/v1/credentials", &[]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_body_is_never_taken_for_another_request() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), POD_IDENTITY);
    let inner = "GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\n\r\n";
    let outer =
        format!("POST /v1/credentials HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{inner}", inner.len());
    let answer = node.raw(outer).await.unwrap();
    assert_eq!(answer.status, 405, "{answer:?}");
    assert!(!answer.body.contains("AccessKeyId"), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_flight_is_finished_before_shutdown() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), POD_IDENTITY);
    node.faults.set(Service::EksAuth, Fault::Latency(Duration::from_millis(400)));
    let address = node.address;
    let request = tokio::task::spawn_blocking(move || {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    tokio::time::sleep(Duration::from_millis(150)).await;
    node.stop().await;
    assert!(request.await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(std::net::TcpStream::connect(address).is_err(), "the listener is closed");
}
