//! The API server's answers, case by case, as recorded from kube-apiserver 1.35 and 1.36.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "servers_kube_api/fixture.rs"]
mod fixture;

use std::time::Duration;

use fixture::{As, EKS, Fixture, case, pod, pods_of, token_of};
use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use lab::kube_api::KubeUser;
use serde_json::{Value, json};

const API: &str = "https://kubernetes.default.svc";
const NO_RELATION: &str = "no relationship found between node 'n1' and this object";
const ONLY_OWN_PODS: &str = "can only list/watch pods with spec.nodeName field selector";

fn names(list: &str) -> Vec<String> {
    let list: Value = serde_json::from_str(list).unwrap();
    let items = list["items"].as_array().unwrap().iter();
    items.map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn a_token_request_is_answered_as_recorded() {
    let fixture = Fixture::start();
    let mut short = fixture.bound("web-n1", &[EKS]);
    short["spec"]["expirationSeconds"] = json!(300);
    let mut nope = fixture.bound("web-n1", &[EKS]);
    nope["spec"]["boundObjectRef"]["name"] = json!("nope");
    let mut mixed = fixture.bound("web-n1", &[EKS]);
    mixed["spec"]["boundObjectRef"]["uid"] = json!(fixture.uid("web-n2"));
    let other =
        "cannot bind token for serviceaccount \"other\" to pod running with different serviceaccount name.";
    fixture
        .check(vec![
            case("good", As::Admin, token_of("web"), fixture.bound("web-n1", &[EKS]), 201, ""),
            case(
                "short",
                As::Admin,
                token_of("web"),
                short,
                422,
                "may not specify a duration less than 10 minutes",
            ),
            case("no such pod", As::Admin, token_of("web"), nope, 404, "pods \"nope\" not found"),
            case(
                "another pod's uid",
                As::Admin,
                token_of("web"),
                mixed,
                409,
                "does not match the UID in record",
            ),
            case(
                "another account",
                As::Admin,
                token_of("other"),
                fixture.bound("web-n1", &[EKS]),
                400,
                other,
            ),
            case("no such account", As::Admin, token_of("none"), json!({"spec": {}}), 404, "not found"),
            case(
                "anonymous",
                As::Anonymous,
                token_of("web"),
                fixture.bound("web-n1", &[EKS]),
                403,
                "system:anonymous",
            ),
        ])
        .await;
}

#[tokio::test]
async fn a_token_has_the_claims_that_a_real_one_has() {
    let fixture = Fixture::start();
    let (_, answer) = fixture.send(As::Admin, &token_of("web"), Some(&fixture.bound("web-n1", &[EKS]))).await;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let claims = fixture.cluster.signing_key().verify(answer["status"]["token"].as_str().unwrap()).unwrap();
    assert_eq!(claims.aud, [EKS]);
    assert_eq!(claims.exp - claims.iat, 3600);
    assert_eq!(claims.iss, "https://oidc.test.invalid/id/TEST");
    assert_eq!(claims.sub, "system:serviceaccount:app:web");
    assert_eq!(claims.kubernetes.pod.unwrap().uid, fixture.uid("web-n1"));
    assert_eq!(claims.kubernetes.node.unwrap().name, "n1");

    let mut kubelet = fixture.bound("web-n1", &[API]);
    kubelet["spec"]["expirationSeconds"] = json!(3607);
    let (_, answer) = fixture.send(As::Admin, &token_of("web"), Some(&kubelet)).await;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let claims = fixture.cluster.signing_key().verify(answer["status"]["token"].as_str().unwrap()).unwrap();
    assert_eq!(claims.exp - claims.iat, 31_536_000, "the server prolongs the kubelet's own");
    assert_eq!(claims.kubernetes.warnafter, Some(claims.iat + 3607));
}

#[tokio::test]
async fn a_node_gets_what_is_recorded() {
    let fixture = Fixture::start();
    let node = As::Node;
    let bound = |pod: &str| fixture.bound(pod, &[EKS]);
    let mut wrong_uid = bound("web-n1");
    wrong_uid["spec"]["boundObjectRef"]["uid"] = json!("11111111-1111-1111-1111-111111111111");
    let unbound = json!({"spec": {"audiences": [EKS]}});
    let event = json!({"metadata": {"name": "e"}, "reason": "Test"});
    let review = json!({"spec": {"token": "x"}});
    let refused = |audience: &str| {
        format!(
            "audience \"{audience}\" not found in pod spec volume, system:node:n1 is not authorized to request tokens \
             for this audience"
        )
    };
    fixture
        .check(vec![
            case("own pods", node, pods_of("n1"), None, 200, ""),
            case("pods of n2", node, pods_of("n2"), None, 403, ONLY_OWN_PODS),
            case("all pods", node, "GET /api/v1/pods", None, 403, ONLY_OWN_PODS),
            case("watch all pods", node, "GET /api/v1/pods?watch=true", None, 403, ONLY_OWN_PODS),
            case("own pod", node, "GET /api/v1/namespaces/app/pods/web-n1", None, 200, ""),
            case("pod of n2", node, "GET /api/v1/namespaces/app/pods/web-n2", None, 403, NO_RELATION),
            case("account", node, "GET /api/v1/namespaces/app/serviceaccounts/web", None, 200, ""),
            case(
                "other's account",
                node,
                "GET /api/v1/namespaces/app/serviceaccounts/other",
                None,
                403,
                NO_RELATION,
            ),
            case(
                "accounts",
                node,
                "GET /api/v1/serviceaccounts",
                None,
                403,
                "can only create tokens for individual service accounts",
            ),
            case("event", node, "POST /api/v1/namespaces/app/events", event, 201, ""),
            case("own node", node, "GET /api/v1/nodes/n1", None, 200, ""),
            case("review", node, "POST /apis/authentication.k8s.io/v1/tokenreviews", review, 201, ""),
            case("other node", node, "GET /api/v1/nodes/n2", None, 403, "only its own Node object"),
            case("namespace", node, "GET /api/v1/namespaces/app", None, 403, "in the namespace \"app\""),
            case("keys", node, "GET /openid/v1/jwks", None, 403, "cannot get path \"/openid/v1/jwks\""),
            case("token", node, token_of("web"), bound("web-n1"), 201, ""),
            case(
                "sts",
                node,
                token_of("web"),
                fixture.bound("web-n1", &["sts.amazonaws.com"]),
                403,
                refused("sts.amazonaws.com"),
            ),
            case("no audience", node, token_of("web"), fixture.bound("web-n1", &[]), 403, refused("")),
            case("own audience", node, token_of("web"), fixture.bound("web-n1", &[API]), 403, refused(API)),
            case(
                "pod of n2's token",
                node,
                token_of("web"),
                bound("web-n2"),
                403,
                "node requested token bound to a pod scheduled on a different node",
            ),
            case("unbound", node, token_of("web"), unbound, 403, "node requested token not bound to a pod"),
            case("wrong uid", node, token_of("web"), wrong_uid, 403, "does not match the UID in record"),
            case("unused account", node, token_of("idle"), bound("web-n1"), 403, NO_RELATION),
        ])
        .await;
    let (_, own) = fixture.send(node, &pods_of("n1"), None).await;
    assert_eq!(names(&own), ["vol-n1", "web-n1", "agent-n1", "plain-n1"]);

    fixture.api.allow_node_audience(false);
    fixture
        .check(vec![
            case("without the rule", node, token_of("web"), bound("web-n1"), 403, refused(EKS)),
            case("by the pod's volume", node, token_of("web"), bound("vol-n1"), 201, ""),
        ])
        .await;
}

#[tokio::test]
async fn an_agent_acts_as_its_own_node_and_no_further() {
    let fixture = Fixture::start();
    let (own, other) = (As::Impersonating("system:node:n1"), As::Impersonating("system:node:n2"));
    let bound = |pod: &str| fixture.bound(pod, &[EKS]);
    let watch = format!("{}&watch=1&timeoutSeconds=1", pods_of("n1"));
    let watch_list =
        format!("{watch}&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true");
    fixture
        .check(vec![
            case("own name: pods", As::Agent, pods_of("n1"), None, 403, "cannot list resource \"pods\""),
            case(
                "own name: token",
                As::Agent,
                token_of("web"),
                bound("web-n1"),
                403,
                "cannot create resource \"serviceaccounts/token\"",
            ),
            case("own name: namespaces", As::Agent, "GET /api/v1/namespaces", None, 200, ""),
            case("own name: keys", As::Agent, "GET /openid/v1/jwks", None, 200, ""),
            case("list", own, pods_of("n1"), None, 200, ""),
            case("watch", own, watch, None, 200, ""),
            case("watch list", own, watch_list, None, 200, "initial-events-end"),
            case("account", own, "GET /api/v1/namespaces/app/serviceaccounts/web", None, 200, ""),
            case("token", own, token_of("web"), bound("web-n1"), 201, ""),
            case("pods of n2", own, pods_of("n2"), None, 403, ONLY_OWN_PODS),
            case("all pods", own, "GET /api/v1/pods", None, 403, ONLY_OWN_PODS),
            case(
                "token for a pod of n2",
                own,
                token_of("web"),
                bound("web-n2"),
                403,
                "node requested token bound to a pod scheduled on a different node",
            ),
            case(
                "sts",
                own,
                token_of("web"),
                fixture.bound("web-n1", &["sts.amazonaws.com"]),
                403,
                "not found in pod spec volume",
            ),
            case(
                "other node",
                other,
                pods_of("n2"),
                None,
                403,
                "cannot impersonate-on:arbitrary-node:list resource \"pods\"",
            ),
            case(
                "not granted",
                own,
                "PATCH /api/v1/nodes/n1",
                json!({}),
                403,
                "cannot impersonate-on:associated-node:patch resource \"nodes\"",
            ),
            case(
                "somebody",
                As::Impersonating("admin"),
                pods_of("n1"),
                None,
                403,
                "cannot impersonate-on:user-info:list",
            ),
            case(
                "an account without the rules",
                As::Impersonating("system:serviceaccount:kube-system:plain"),
                "GET /api/v1/pods",
                None,
                403,
                "cannot impersonate-on:serviceaccount:list",
            ),
        ])
        .await;
    let log = fixture.api.requests();
    let token = log.iter().find(|request| request.status == 201).unwrap();
    assert_eq!(token.user, "system:serviceaccount:kube-system:agent");
    assert_eq!(token.impersonated.as_deref(), Some("system:node:n1"));
}

#[tokio::test]
async fn an_agent_whose_token_names_no_node_may_not_act_as_one() {
    let fixture = Fixture::start();
    let mut claims = fixture.cluster.pod_claims("kube-system", "agent-n1", &[API], Duration::from_mins(10));
    (claims.kubernetes.pod, claims.kubernetes.node) = (None, None);
    let mut kubeconfig = Kubeconfig::from_yaml(&fixture.api.kubeconfig(&KubeUser::Admin)).unwrap();
    let auth = kubeconfig.auth_infos[0].auth_info.as_mut().unwrap();
    (auth.client_certificate_data, auth.client_key_data) = (None, None);
    auth.token = Some(fixture.cluster.sign(&claims).into());
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
    config.headers.push(("impersonate-user".parse().unwrap(), "system:node:n1".parse().unwrap()));
    let request = hyper::Request::get(pods_of("n1").strip_prefix("GET ").unwrap()).body(Vec::new().into());
    let response = Client::try_from(config).unwrap().send(request.unwrap()).await.unwrap();
    assert_eq!(response.status().as_u16(), 403);
}

#[tokio::test]
async fn plain_rbac_owns_every_service_account() {
    let fixture = Fixture::start();
    let plain = As::Plain;
    fixture
        .check(vec![
            case("all pods", plain, "GET /api/v1/pods", None, 200, ""),
            case("token for a pod of n2", plain, token_of("web"), fixture.bound("web-n2", &[EKS]), 201, ""),
            case("unbound", plain, token_of("web"), json!({"spec": {"audiences": [EKS]}}), 201, ""),
            case("own audience", plain, token_of("web"), fixture.bound("web-n1", &[API]), 201, ""),
            case(
                "acting as its node",
                As::Plain,
                "GET /api/v1/nodes/n1",
                None,
                403,
                "cannot get resource \"nodes\"",
            ),
        ])
        .await;
}

#[tokio::test]
async fn anybody_sees_health_and_version_and_nothing_else() {
    let fixture = Fixture::start();
    fixture
        .check(vec![
            case("ready", As::Anonymous, "GET /readyz", None, 200, "ok"),
            case("live", As::Anonymous, "GET /livez", None, 200, "ok"),
            case("version", As::Anonymous, "GET /version", None, 200, "v1.36"),
            case("keys", As::Anonymous, "GET /openid/v1/jwks", None, 403, "system:anonymous"),
            case("discovery", As::Anonymous, "GET /.well-known/openid-configuration", None, 403, ""),
            case("pods", As::Anonymous, "GET /api/v1/pods", None, 403, "cannot list resource \"pods\""),
            case("unknown", As::Admin, "GET /nope", None, 404, ""),
            case("unserved", As::Admin, "GET /api/v1/secrets", None, 404, ""),
            case("delete", As::Admin, "DELETE /api/v1/namespaces/app/pods/web-n1", None, 405, ""),
        ])
        .await;
}

#[tokio::test]
async fn a_token_review_tells_pod_and_node_or_why_not() {
    let fixture = Fixture::start();
    let cluster = &fixture.cluster;
    let hour = Duration::from_hours(1);
    let review = async |token: &str, audiences: &[&str]| -> Value {
        let body = json!({"spec": {"token": token, "audiences": audiences}});
        let target = "POST /apis/authentication.k8s.io/v1/tokenreviews";
        let (status, answer) = fixture.send(As::Node, target, Some(&body)).await;
        assert_eq!(status, 201);
        serde_json::from_str::<Value>(&answer).unwrap()["status"].clone()
    };
    let token = cluster.mint_pod_token("app", "web-n1", &[EKS], hour);
    let good = review(&token, &[EKS]).await;
    assert_eq!(good["authenticated"], true);
    assert_eq!(good["user"]["username"], "system:serviceaccount:app:web");
    let extra = &good["user"]["extra"];
    assert_eq!(extra["authentication.kubernetes.io/node-name"], json!(["n1"]));
    assert_eq!(extra["authentication.kubernetes.io/pod-uid"], json!([fixture.uid("web-n1")]));

    let foreign = review(&token, &[]).await;
    assert_eq!(foreign["authenticated"], Value::Null);
    let error = format!("token audiences [\"{EKS}\"] is invalid for the target audiences [\"{API}\"]");
    assert!(foreign["error"].as_str().unwrap().contains(&error), "{foreign}");

    let mut expired = cluster.pod_claims("app", "web-n1", &[EKS], hour);
    expired.exp = expired.iat - 10;
    let expired = cluster.sign(&expired);
    let forged = cluster.signing_key().forge().sign(&cluster.pod_claims("app", "web-n1", &[EKS], hour));
    let unseen = cluster.mint_pod_token("app", "web-n2", &[EKS], hour);
    cluster.delete_pod("app", "web-n1");
    cluster.delete_pod("app", "web-n2");
    for (case, token, error) in [
        ("expired", &expired, "service account token has expired"),
        ("forged", &forged, "invalid bearer token"),
        ("pod deleted", &unseen, "service account token has been invalidated"),
    ] {
        let status = review(token, &[EKS]).await;
        assert!(status["authenticated"].is_null(), "{case}: {status}");
        assert!(status["error"].as_str().unwrap().contains(error), "{case}: {status}");
    }
    let remembered = review(&token, &[EKS]).await;
    assert_eq!(remembered["authenticated"], true, "a real server remembers a good token for 10 s");
}

#[tokio::test]
async fn a_fresh_pod_has_no_relation_to_its_node_while_the_authorizer_lags() {
    let fixture = Fixture::start();
    let lag = Duration::from_secs(2);
    fixture.cluster.set_authorizer_lag(lag);
    fixture.cluster.add_service_account("app", "fresh");
    fixture.cluster.add_pod(&pod("app", "fresh-n1", "fresh", "n1"));
    let body = fixture.bound("fresh-n1", &[EKS]);
    let early = case("early", As::Node, token_of("fresh"), body.clone(), 403, NO_RELATION);
    fixture.check(vec![early]).await;
    tokio::time::sleep(lag).await;
    fixture.check(vec![case("later", As::Node, token_of("fresh"), body, 201, "")]).await;
}

#[tokio::test]
async fn a_resource_version_is_honored_or_refused() {
    let fixture = Fixture::start();
    let list = |query: &str| format!("GET /api/v1/pods?{query}");
    let (_, answer) = fixture.send(As::Admin, "GET /api/v1/pods", None).await;
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let now: u64 = answer["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
    fixture.cluster.annotate_pod("app", "web-n1", "a", Some("b"));
    fixture.cluster.compact();
    let watch_from = |version: u64| list(&format!("watch=1&timeoutSeconds=1&resourceVersion={version}"));
    fixture
        .check(vec![
            case("any", As::Admin, list("resourceVersion=0"), None, 200, ""),
            case("not older", As::Admin, list(&format!("resourceVersion={now}")), None, 200, ""),
            case(
                "old and exact",
                As::Admin,
                list(&format!("resourceVersion={now}&resourceVersionMatch=Exact")),
                None,
                410,
                "too old",
            ),
            case(
                "future",
                As::Admin,
                list("resourceVersion=999999"),
                None,
                504,
                "Too large resource version",
            ),
            case("text", As::Admin, list("resourceVersion=x"), None, 422, ""),
            case("watch of the past", As::Admin, watch_from(now), None, 200, "\"code\":410"),
            case("watch of the present", As::Admin, watch_from(now + 1), None, 200, ""),
            case(
                "initial events without a match",
                As::Admin,
                list("watch=1&sendInitialEvents=true"),
                None,
                422,
                "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
            ),
        ])
        .await;
    let (_, stream) = fixture.send(As::Admin, &watch_from(now + 1), None).await;
    assert_eq!(stream, "", "nothing has changed since");
}
