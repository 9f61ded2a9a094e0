//! The simulated cluster's state: nodes, namespaces, service accounts and pods, with resource versions and a log
//! of changes, and the keys of its tokens.
//!
//! Owns what exists. Never authorizes anything: that is the API server's part.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Value, json};
use tokio::sync::watch;
use uuid::Uuid;

use crate::jwt::{Claims, Error as JwtError, KubernetesClaims, ObjectClaim, SigningKey};

mod objects;
pub(crate) mod store;

pub use objects::PodSpec;
use store::{Kind, Store};

/// Audience of the tokens that EKS Auth accepts.
pub const POD_IDENTITY_AUDIENCE: &str = "pods.eks.amazonaws.com";
/// Audience of the tokens that the API server accepts.
pub const API_AUDIENCE: &str = "https://kubernetes.default.svc";

/// A handle on the cluster's state; clones share it.
#[derive(Clone, Debug)]
pub struct Cluster {
    inner: Arc<Inner>,
}

/// What a token is asked to be.
#[derive(Clone, Debug)]
pub(crate) struct TokenOrder<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) service_account: &'a str,
    /// The pod's name, for a bound token.
    pub(crate) pod: Option<&'a str>,
    pub(crate) audiences: Vec<String>,
    pub(crate) lifetime: Duration,
    /// When a prolonged token was meant to expire.
    pub(crate) warn_after: Option<Duration>,
}

#[derive(Debug)]
struct Inner {
    issuer: String,
    /// The newest one signs; tokens of all are valid.
    keys: Mutex<Vec<Arc<SigningKey>>>,
    state: Mutex<State>,
    revision: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    store: Store,
    authorizer_lag: Duration,
}

// === impl Cluster ===

impl Cluster {
    /// A cluster with the namespaces `default` and `kube-system` and nothing else. `issuer` is the URL in its
    /// tokens.
    pub fn new(issuer: &str) -> Self {
        let inner = Inner {
            issuer: issuer.to_owned(),
            keys: Mutex::new(vec![Arc::new(SigningKey::generate())]),
            state: Mutex::default(),
            revision: watch::Sender::new(0),
        };
        let cluster = Self { inner: Arc::new(inner) };
        for name in ["default", "kube-system"] {
            cluster.add_namespace(name, BTreeMap::new());
        }
        cluster
    }

    /// Adds a node; returns its UID.
    pub fn add_node(&self, name: &str) -> String {
        self.add(Kind::Node, "", name, objects::node(name))
    }

    /// Adds a namespace with these annotations; returns its UID.
    pub fn add_namespace(&self, name: &str, annotations: BTreeMap<String, String>) -> String {
        self.add(Kind::Namespace, "", name, objects::namespace(name, annotations))
    }

    /// Whether there is such a namespace.
    pub fn has_namespace(&self, name: &str) -> bool {
        self.get(Kind::Namespace, "", name).is_some()
    }

    /// Adds a service account; returns its UID.
    pub fn add_service_account(&self, namespace: &str, name: &str) -> String {
        self.add(Kind::ServiceAccount, namespace, name, objects::service_account(namespace, name))
    }

    /// Adds a pod that is scheduled already; returns its UID.
    pub fn add_pod(&self, spec: &PodSpec) -> String {
        self.add(Kind::Pod, &spec.namespace, &spec.name, objects::pod(spec))
    }

    /// Gives a pod its addresses, as the kubelet does once the network is there.
    pub fn set_pod_ips(&self, namespace: &str, name: &str, pod_ips: &[IpAddr]) {
        self.modify(Kind::Pod, namespace, name, |pod| objects::set_pod_ips(pod, pod_ips));
    }

    /// Sets an annotation of a pod, or removes it.
    pub fn annotate_pod(&self, namespace: &str, name: &str, key: &str, value: Option<&str>) {
        self.modify(Kind::Pod, namespace, name, |pod| objects::annotate(pod, key, value));
    }

    /// Sets an annotation of a namespace, or removes it.
    pub fn annotate_namespace(&self, name: &str, key: &str, value: Option<&str>) {
        self.modify(Kind::Namespace, "", name, |namespace| objects::annotate(namespace, key, value));
    }

    /// Deletes a pod at once, without a grace period. One that is not there is left alone.
    pub fn delete_pod(&self, namespace: &str, name: &str) {
        self.change(|store| store.delete(Kind::Pod, namespace, name));
    }

    /// Drops the log of changes: to continue from an older resource version is 410 from now on.
    pub fn compact(&self) {
        self.state().store.compact();
    }

    /// For so long after a pod was added, the Node authorizer does not know yet that it is on its node: requests
    /// of the node about it are 403 "no relationship found". 0 by default.
    pub fn set_authorizer_lag(&self, lag: Duration) {
        self.state().authorizer_lag = lag;
    }

    /// The token that the kubelet would fetch for a pod: bound to it, valid for `ttl` from now.
    ///
    /// # Panics
    /// If the cluster has no such pod, or not its service account.
    pub fn mint_pod_token(&self, namespace: &str, pod: &str, audiences: &[&str], ttl: Duration) -> String {
        self.sign(&self.pod_claims(namespace, pod, audiences, ttl))
    }

    /// The claims of such a token; to be altered and signed by a test.
    ///
    /// # Panics
    /// If the cluster has no such pod, or not its service account.
    pub fn pod_claims(&self, namespace: &str, pod: &str, audiences: &[&str], ttl: Duration) -> Claims {
        let object = self.get(Kind::Pod, namespace, pod).unwrap_or_default();
        let order = TokenOrder {
            namespace,
            service_account: object["spec"]["serviceAccountName"].as_str().unwrap_or_default(),
            pod: Some(pod),
            audiences: audiences.iter().map(|&audience| audience.to_owned()).collect(),
            lifetime: ttl,
            warn_after: None,
        };
        let claims = self.claims(&order, Timestamp::now());
        claims.unwrap_or_else(|| panic!("add the pod {namespace}/{pod} and its service account first"))
    }

    /// A token with these very claims, signed with the cluster's key.
    pub fn sign(&self, claims: &Claims) -> String {
        self.signing_key().sign(claims)
    }

    /// The key that signs the cluster's tokens.
    ///
    /// # Panics
    /// Never: there is always one.
    #[expect(clippy::expect_used, reason = "there is one from the beginning")]
    pub fn signing_key(&self) -> Arc<SigningKey> {
        Arc::clone(self.keys().last().expect("BUG: a cluster has a key"))
    }

    /// Signs with another key from now on; tokens of earlier keys stay valid.
    pub fn rotate_signing_key(&self) {
        let key = Arc::new(SigningKey::generate());
        self.keys().push(key);
    }

    /// Drops every key but the one that signs: tokens of the others are no longer valid.
    pub fn retire_old_keys(&self) {
        let mut keys = self.keys();
        let old = keys.len() - 1;
        keys.drain(..old);
    }

    /// The public keys of the cluster's tokens, a JSON web key set.
    pub fn jwks(&self) -> Value {
        let keys: Vec<_> = self.keys().iter().map(|key| key.jwk()).collect();
        json!({ "keys": keys })
    }

    /// The URL in the cluster's tokens.
    pub fn issuer(&self) -> &str {
        &self.inner.issuer
    }

    /// The Events that were created through the API, oldest first.
    pub fn events(&self) -> Vec<Value> {
        self.state().store.list(Kind::Event).cloned().collect()
    }

    /// The claims of a token that this cluster signed; says nothing about time, audience or binding.
    pub(crate) fn verify(&self, token: &str) -> Result<Claims, JwtError> {
        let keys = self.keys().clone();
        let mut verified = keys.iter().map(|key| key.verify(token));
        let by_its_key = verified.find(|verified| *verified != Err(JwtError::UnknownKey));
        by_its_key.unwrap_or(Err(JwtError::UnknownKey))
    }

    /// The claims that the API server puts into a token; `None` where an object is missing.
    pub(crate) fn claims(&self, order: &TokenOrder<'_>, now: Timestamp) -> Option<Claims> {
        let named = |object: &Value| ObjectClaim {
            name: text(&object["metadata"]["name"]),
            uid: text(&object["metadata"]["uid"]),
        };
        let account = self.get(Kind::ServiceAccount, order.namespace, order.service_account)?;
        let pod = match order.pod {
            Some(name) => Some(self.get(Kind::Pod, order.namespace, name)?),
            None => None,
        };
        let node = pod.as_ref().and_then(|pod| self.get(Kind::Node, "", pod["spec"]["nodeName"].as_str()?));
        let seconds = |duration: Duration| i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        Some(Claims {
            aud: order.audiences.clone(),
            exp: now.as_second().saturating_add(seconds(order.lifetime)),
            iat: now.as_second(),
            iss: self.inner.issuer.clone(),
            jti: Uuid::new_v4().to_string(),
            kubernetes: KubernetesClaims {
                namespace: order.namespace.to_owned(),
                node: node.as_ref().map(named),
                pod: pod.as_ref().map(named),
                serviceaccount: named(&account),
                warnafter: order.warn_after.map(|after| now.as_second().saturating_add(seconds(after))),
            },
            nbf: now.as_second(),
            sub: format!("system:serviceaccount:{}:{}", order.namespace, order.service_account),
        })
    }

    /// An object as the API shows it.
    pub(crate) fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<Value> {
        self.state().store.get(kind, namespace, name).cloned()
    }

    /// Reads the store under its lock; a list and its resource version belong together.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&Store) -> T) -> T {
        read(&self.state().store)
    }

    /// The latest resource version, and every later one.
    pub(crate) fn revisions(&self) -> watch::Receiver<u64> {
        self.inner.revision.subscribe()
    }

    /// Whether the Node authorizer relates a pod, or a service account by one of its pods, to the node.
    pub(crate) fn related(&self, node: &str, kind: Kind, namespace: &str, name: &str) -> bool {
        let state = self.state();
        let known = |created: &Instant| created.elapsed() >= state.authorizer_lag;
        state.store.list_with_age(Kind::Pod).any(|(pod, created)| {
            let here = pod["spec"]["nodeName"] == node && pod["metadata"]["namespace"] == namespace;
            let named = match kind {
                Kind::Pod => &pod["metadata"]["name"],
                _ => &pod["spec"]["serviceAccountName"],
            };
            here && *named == name && known(created)
        })
    }

    /// Adds an object, or replaces it by a new one; returns its UID.
    pub(crate) fn add(&self, kind: Kind, namespace: &str, name: &str, object: Value) -> String {
        self.change(|store| store.add(kind, namespace, name, object))
    }

    fn modify(&self, kind: Kind, namespace: &str, name: &str, change: impl FnOnce(&mut Value)) {
        self.change(|store| store.modify(kind, namespace, name, change));
    }

    fn change<T>(&self, change: impl FnOnce(&mut Store) -> T) -> T {
        let mut state = self.state();
        let result = change(&mut state.store);
        self.inner.revision.send_replace(state.store.revision());
        result
    }

    fn keys(&self) -> MutexGuard<'_, Vec<Arc<SigningKey>>> {
        self.inner.keys.lock()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock()
    }
}

/// The JSON web token discovery document.
pub(crate) fn openid_configuration(cluster: &Cluster) -> Value {
    json!({
        "issuer": cluster.issuer(),
        "jwks_uri": format!("{}/keys", cluster.issuer()),
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["RS256"],
    })
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
