//! A small cluster with its API server, and tables of requests to it.
//!
//! Owns clients and the comparison of answers. Never knows what the right answer is.

use std::{net::TcpListener, time::Duration};

use kube::{
    Client, Config,
    config::{KubeConfigOptions, Kubeconfig},
};
use lab::{
    cluster::{Cluster, PodSpec},
    fault_injection::Faults,
    kube_api::{KubeApi, KubeUser},
};
use serde_json::{Value, json};

pub(crate) const EKS: &str = "pods.eks.amazonaws.com";

/// Two nodes; in `app` the pods `web-n1`, `web-n2` and `vol-n1` (the one with a token volume) of `web`, `other-n2` of
/// `other`; the agent's pod `agent-n1` of `kube-system/agent`, which may impersonate its node; `plain-n1` of
/// `kube-system/plain`, which has plain RBAC.
pub(crate) struct Fixture {
    pub(crate) api: KubeApi,
    pub(crate) cluster: Cluster,
}

/// Who sends a case's request.
#[derive(Clone, Copy, Debug)]
pub(crate) enum As {
    Admin,
    Anonymous,
    Node,
    /// The agent's service account.
    Agent,
    /// The agent, as this user.
    Impersonating(&'static str),
    /// A service account with plain RBAC.
    Plain,
}

/// A request, and the status and part of the text that answer it.
pub(crate) type Case = (&'static str, As, String, Option<Value>, u16, String);

// === impl Fixture ===

impl Fixture {
    pub(crate) fn start() -> Self {
        let cluster = Cluster::new("https://oidc.test.invalid/id/TEST");
        for node in ["n1", "n2"] {
            cluster.add_node(node);
        }
        cluster.add_namespace("app", [].into());
        for (namespace, account) in [
            ("app", "web"),
            ("app", "other"),
            ("app", "idle"),
            ("kube-system", "agent"),
            ("kube-system", "plain"),
        ] {
            cluster.add_service_account(namespace, account);
        }
        for (namespace, name, account, node) in [
            ("app", "web-n1", "web", "n1"),
            ("app", "web-n2", "web", "n2"),
            ("app", "other-n2", "other", "n2"),
            ("app", "vol-n1", "web", "n1"),
            ("kube-system", "agent-n1", "agent", "n1"),
            ("kube-system", "plain-n1", "plain", "n1"),
        ] {
            cluster
                .add_pod(&PodSpec { token_volume: name == "vol-n1", ..pod(namespace, name, account, node) });
        }
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let api = KubeApi::serve(listener, cluster.clone(), Faults::default()).unwrap();
        api.allow_impersonation("kube-system", "agent");
        api.grant_plain_rbac("kube-system", "plain");
        Self { api, cluster }
    }

    pub(crate) async fn client(&self, who: As) -> Client {
        let system_pod = |name: &str| KubeUser::Pod { namespace: "kube-system".into(), name: name.into() };
        let user = match who {
            As::Admin | As::Anonymous => KubeUser::Admin,
            As::Node => KubeUser::Node("n1".into()),
            As::Agent | As::Impersonating(_) => system_pod("agent-n1"),
            As::Plain => system_pod("plain-n1"),
        };
        let mut kubeconfig = Kubeconfig::from_yaml(&self.api.kubeconfig(&user)).unwrap();
        if matches!(who, As::Anonymous) {
            kubeconfig.auth_infos[0].auth_info = None;
        }
        let mut config =
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
        // The answers are the point, not what a patient client makes of them.
        config.default_retry = false;
        if let As::Impersonating(user) = who {
            config.headers.push(("impersonate-user".parse().unwrap(), user.parse().unwrap()));
        }
        Client::try_from(config).unwrap()
    }

    /// Sends a request; the status and the body, whatever it is.
    pub(crate) async fn send(&self, who: As, target: &str, body: Option<&Value>) -> (u16, String) {
        let (method, path) = target.split_once(' ').unwrap();
        let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
        let request =
            hyper::Request::builder().method(method).uri(path).header("content-type", "application/json");
        let response = self.client(who).await.send(request.body(body.into()).unwrap()).await.unwrap();
        let status = response.status().as_u16();
        let bytes = response.into_body().collect_bytes().await.unwrap();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    pub(crate) async fn check(&self, cases: Vec<Case>) {
        let mut wrong = Vec::new();
        for (case, who, target, body, status, text) in cases {
            let (found, answer) = self.send(who, &target, body.as_ref()).await;
            let message = serde_json::from_str::<Value>(&answer)
                .ok()
                .and_then(|answer| Some(answer["message"].as_str()?.to_owned()))
                .unwrap_or(answer);
            if found != status || !message.contains(&text) {
                wrong.push(format!(
                    "{case}: {status} {text:?} expected of {who:?}, found {found} {message:?}"
                ));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    pub(crate) fn uid(&self, pod: &str) -> String {
        self.cluster.pod_claims("app", pod, &[EKS], Duration::from_mins(1)).kubernetes.pod.unwrap().uid
    }

    /// A `TokenRequest` for a pod in `app`.
    pub(crate) fn bound(&self, pod: &str, audiences: &[&str]) -> Value {
        json!({"spec": {
            "audiences": audiences,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": self.uid(pod)},
        }})
    }
}

pub(crate) fn pod(namespace: &str, name: &str, service_account: &str, node: &str) -> PodSpec {
    PodSpec {
        namespace: namespace.into(),
        name: name.into(),
        service_account: service_account.into(),
        node: node.into(),
        ..PodSpec::default()
    }
}

pub(crate) fn token_of(account: &str) -> String {
    format!("POST /api/v1/namespaces/app/serviceaccounts/{account}/token")
}

pub(crate) fn pods_of(node: &str) -> String {
    format!("GET /api/v1/pods?fieldSelector=spec.nodeName%3D{node}")
}

pub(crate) fn case(
    name: &'static str,
    who: As,
    target: impl Into<String>,
    body: impl Into<Option<Value>>,
    status: u16,
    text: impl Into<String>,
) -> Case {
    (name, who, target.into(), body.into(), status, text.into())
}
