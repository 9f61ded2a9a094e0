//! Which pod gets which role, and who gets none.

use std::time::{Duration, Instant};

use super::{
    ECS, IMDS, ImdsMode, Node, POD_IDENTITY, ROLES, TOKEN, TTL, imds_credentials, imds_v2, injected, session,
    web,
};

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
