//! The kube crate's watcher against the API server, through everything that ends a watch.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::TcpListener, pin::pin, time::Duration};

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::{
    authentication::v1::TokenRequest,
    core::v1::{Namespace, Pod, ServiceAccount},
};
use kube::{
    Api, Client, Config, ResourceExt as _,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use lab::{
    cluster::{Cluster, PodSpec},
    fault_injection::{Fault, Faults, Service},
    kube_api::{KubeApi, KubeUser},
};
use serde_json::json;

const TIMEOUT: Duration = Duration::from_secs(20);

struct Fixture {
    api: KubeApi,
    cluster: Cluster,
    faults: Faults,
}

impl Fixture {
    fn start() -> Self {
        let (cluster, faults) = (Cluster::new("https://oidc.test.invalid/id/TEST"), Faults::default());
        cluster.add_node("n1");
        cluster.add_service_account("kube-system", "agent");
        cluster.add_service_account("app", "web");
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let api = KubeApi::serve(listener, cluster.clone(), faults.clone()).unwrap();
        api.allow_impersonation("kube-system", "agent");
        let fixture = Self { api, cluster, faults };
        fixture.add("kube-system", "agent-n1", "agent");
        fixture
    }

    fn add(&self, namespace: &str, name: &str, service_account: &str) -> String {
        self.cluster.add_pod(&PodSpec {
            namespace: namespace.into(),
            name: name.into(),
            service_account: service_account.into(),
            node: "n1".into(),
            ..PodSpec::default()
        })
    }

    /// The agent's client, which acts as its node.
    async fn agent(&self) -> Client {
        let user = KubeUser::Pod { namespace: "kube-system".into(), name: "agent-n1".into() };
        let mut config = config(&self.api, &user).await;
        config.headers.push(("impersonate-user".parse().unwrap(), "system:node:n1".parse().unwrap()));
        Client::try_from(config).unwrap()
    }
}

async fn config(api: &KubeApi, user: &KubeUser) -> Config {
    let kubeconfig = Kubeconfig::from_yaml(&api.kubeconfig(user)).unwrap();
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap()
}

/// Reads events, past errors, until one is described by `wanted`.
async fn until(
    events: &mut (impl Stream<Item = watcher::Result<Event<Pod>>> + Unpin),
    wanted: &str,
) -> Vec<String> {
    let mut seen = Vec::new();
    let found = tokio::time::timeout(TIMEOUT, async {
        while let Some(event) = events.next().await {
            let text = match event {
                Ok(Event::Init) => "init".to_owned(),
                Ok(Event::InitApply(pod)) => format!("initial {}", pod.name_any()),
                Ok(Event::InitDone) => "done".to_owned(),
                Ok(Event::Apply(pod)) => format!("apply {}", pod.name_any()),
                Ok(Event::Delete(pod)) => format!("delete {}", pod.name_any()),
                Err(error) => format!("error {error}"),
            };
            seen.push(text.clone());
            if text == wanted {
                return;
            }
        }
    });
    assert!(found.await.is_ok(), "no {wanted:?} among {seen:?}");
    seen
}

async fn watch_through_everything(config: watcher::Config) {
    let fixture = Fixture::start();
    let (cluster, faults) = (&fixture.cluster, &fixture.faults);
    let pods: Api<Pod> = Api::all(fixture.agent().await);
    fixture.add("app", "first", "web");
    let mut events = pin!(watcher(pods, config.fields("spec.nodeName=n1")).default_backoff());
    assert_eq!(until(&mut events, "done").await, ["init", "initial first", "initial agent-n1", "done"]);

    fixture.add("app", "second", "web");
    cluster.set_pod_ips("app", "second", &["10.0.0.7".parse().unwrap()]);
    cluster.delete_pod("app", "second");
    assert_eq!(until(&mut events, "delete second").await, ["apply second", "apply second", "delete second"]);

    // A broken connection alone costs no event and no new list.
    faults.set(Service::KubeApi, Fault::Drop);
    fixture.add("app", "third", "web");
    faults.clear(Service::KubeApi);
    let seen = until(&mut events, "apply third").await;
    assert!(!seen.contains(&"init".to_owned()), "{seen:?}");

    // A broken connection and a compacted log: what happened in between comes with a new list.
    faults.set(Service::KubeApi, Fault::Drop);
    cluster.delete_pod("app", "first");
    fixture.add("app", "fourth", "web");
    cluster.compact();
    faults.clear(Service::KubeApi);
    let seen = until(&mut events, "done").await;
    assert!(seen.contains(&"initial fourth".to_owned()), "{seen:?}");
    assert!(!seen.contains(&"initial first".to_owned()), "{seen:?}");

    cluster.annotate_pod("app", "fourth", "podgate.dev/imds", Some("deny"));
    until(&mut events, "apply fourth").await;
}

#[tokio::test]
async fn a_listing_watcher_misses_nothing() {
    watch_through_everything(watcher::Config::default()).await;
}

#[tokio::test]
async fn a_streaming_watcher_misses_nothing() {
    watch_through_everything(watcher::Config::default().streaming_lists()).await;
}

#[tokio::test]
async fn an_idle_watch_goes_on_from_a_bookmark_though_the_log_was_compacted() {
    let fixture = Fixture::start();
    let pods: Api<Pod> = Api::all(fixture.agent().await);
    let mut events =
        pin!(watcher(pods, watcher::Config::default().fields("spec.nodeName=n1")).default_backoff());
    until(&mut events, "done").await;
    // Nothing of this concerns the watch, which learns the resource version all the same.
    fixture.cluster.add_namespace("other", [].into());
    tokio::time::timeout(Duration::from_secs(2), events.next()).await.unwrap_err();
    fixture.cluster.compact();
    fixture.faults.set(Service::KubeApi, Fault::Drop);
    fixture.faults.clear(Service::KubeApi);
    fixture.add("app", "late", "web");
    let seen = until(&mut events, "apply late").await;
    assert!(!seen.contains(&"init".to_owned()), "{seen:?}");
}

#[tokio::test]
async fn a_watch_that_hangs_delivers_afterwards() {
    let fixture = Fixture::start();
    let pods: Api<Pod> = Api::all(fixture.agent().await);
    let mut events =
        pin!(watcher(pods, watcher::Config::default().streaming_lists().fields("spec.nodeName=n1")));
    until(&mut events, "done").await;
    fixture.faults.set(Service::KubeApi, Fault::Hang);
    fixture.add("app", "late", "web");
    tokio::time::timeout(Duration::from_millis(300), events.next()).await.unwrap_err();
    fixture.faults.clear(Service::KubeApi);
    assert_eq!(until(&mut events, "apply late").await, ["apply late"]);
}

#[tokio::test]
async fn the_kube_crate_creates_tokens_and_reads_namespaces() {
    let fixture = Fixture::start();
    let uid = fixture.add("app", "web-1", "web");
    fixture.cluster.add_namespace("app", [("podgate.dev/imds".to_owned(), "deny".to_owned())].into());
    let accounts: Api<ServiceAccount> = Api::namespaced(fixture.agent().await, "app");
    let request: TokenRequest = serde_json::from_value(json!({"spec": {
        "audiences": ["pods.eks.amazonaws.com"],
        "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "web-1", "uid": uid},
    }}))
    .unwrap();
    let answer: TokenRequest =
        accounts.create_subresource("token", "web", &PostParams::default(), &request).await.unwrap();
    let claims = fixture.cluster.signing_key().verify(&answer.status.unwrap().token).unwrap();
    assert_eq!(claims.kubernetes.pod.unwrap().uid, uid);

    let user = KubeUser::Pod { namespace: "kube-system".into(), name: "agent-n1".into() };
    let namespaces: Api<Namespace> = Api::all(Client::try_from(config(&fixture.api, &user).await).unwrap());
    let app = namespaces.get("app").await.unwrap();
    assert_eq!(app.annotations()["podgate.dev/imds"], "deny");
    let all = namespaces.list(&kube::api::ListParams::default()).await.unwrap();
    assert_eq!(all.items.len(), 3);
}
