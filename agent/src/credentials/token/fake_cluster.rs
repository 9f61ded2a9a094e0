//! A fake API server for tokens: its keys and its `TokenRequest`, in virtual time.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use http::{Request, Response, StatusCode};
use jiff::{SignedDuration, Timestamp};
use kube::{Client, client::Body};
use lab::cluster::{Cluster, POD_IDENTITY_AUDIENCE, PodSpec};
use serde_json::json;
use tokio::time::sleep;
use tower::service_fn;

use crate::{
    identity::{Pod, PodUid, ServiceAccountRef},
    secret::Secret,
    testing,
};

/// The life of its tokens.
pub(super) const LIFE: SignedDuration = SignedDuration::from_hours(24);

/// A cluster with the pod `web-0`.
pub(super) struct FakeCluster {
    pub(super) cluster: Cluster,
    pub(super) pod: Pod,
    is_down: AtomicBool,
    latency_ms: AtomicU64,
    key_fetches: AtomicUsize,
    token_requests: AtomicUsize,
}

// === impl FakeCluster ===

impl FakeCluster {
    pub(super) fn new() -> Arc<Self> {
        let cluster = Cluster::new("https://oidc.test.invalid/id/TEST");
        cluster.add_node("n1");
        cluster.add_service_account("app", "web");
        let spec = PodSpec {
            namespace: "app".to_owned(),
            name: "web-0".to_owned(),
            service_account: "web".to_owned(),
            node: "n1".to_owned(),
            token_volume: true,
            ..PodSpec::default()
        };
        let uid = PodUid::parse(&cluster.add_pod(&spec)).unwrap();
        let service_account = ServiceAccountRef { namespace: spec.namespace, name: spec.service_account };
        let pod =
            Pod { uid, name: spec.name, service_account, token_volume: true, ..testing::pod("app", "web") };
        Arc::new(Self {
            cluster,
            pod,
            is_down: AtomicBool::default(),
            latency_ms: AtomicU64::default(),
            key_fetches: AtomicUsize::default(),
            token_requests: AtomicUsize::default(),
        })
    }

    /// A client of it.
    pub(super) fn client(self: &Arc<Self>) -> Client {
        let cluster = Arc::clone(self);
        let service = service_fn(move |request: Request<Body>| {
            let cluster = Arc::clone(&cluster);
            async move { cluster.answer(request.uri().path()).await }
        });
        Client::new(service, "default")
    }

    /// Refuses connections from now on, or no longer.
    pub(super) fn set_down(&self, is_down: bool) {
        self.is_down.store(is_down, SeqCst);
    }

    /// How long each answer takes from now on.
    pub(super) fn set_latency(&self, latency: Duration) {
        self.latency_ms.store(u64::try_from(latency.as_millis()).unwrap(), SeqCst);
    }

    /// How often a fetch of the keys has started.
    pub(super) fn key_fetches(&self) -> usize {
        self.key_fetches.load(SeqCst)
    }

    /// How often a token was requested.
    pub(super) fn token_requests(&self) -> usize {
        self.token_requests.load(SeqCst)
    }

    /// A token of the pod as the kubelet would have it.
    pub(super) fn token(&self) -> Secret {
        let life = LIFE.unsigned_abs();
        Secret::from(self.cluster.mint_pod_token("app", "web-0", &[POD_IDENTITY_AUDIENCE], life))
    }

    async fn answer(&self, path: &str) -> io::Result<Response<Body>> {
        match path {
            "/.well-known/openid-configuration" => self.key_fetches.fetch_add(1, SeqCst),
            "/api/v1/namespaces/app/serviceaccounts/web/token" => self.token_requests.fetch_add(1, SeqCst),
            _ => 0,
        };
        sleep(Duration::from_millis(self.latency_ms.load(SeqCst))).await;
        if self.is_down.load(SeqCst) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (status, body) = match path {
            "/.well-known/openid-configuration" => (StatusCode::OK, json!({"issuer": self.cluster.issuer()})),
            "/openid/v1/jwks" => (StatusCode::OK, self.cluster.jwks()),
            "/api/v1/namespaces/app/serviceaccounts/web/token" => {
                let expiration = (Timestamp::now() + LIFE).to_string();
                let status = json!({"token": self.token().expose(), "expirationTimestamp": expiration});
                (StatusCode::CREATED, json!({"spec": {"audiences": []}, "status": status}))
            }
            _ => (StatusCode::NOT_FOUND, json!({})),
        };
        let answer = Response::builder().status(status).body(Body::from(body.to_string().into_bytes()));
        answer.map_err(io::Error::other)
    }
}
