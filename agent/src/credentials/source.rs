//! What the cache calls: the kubelet, the API server and EKS Auth, behind one trait.
//!
//! Owns nothing but that seam; never caches credentials, never decides when to call.

use std::path::Path;

use futures::future::BoxFuture;

use super::{
    Clock, Error,
    aws::eks_auth::{Assumed, EksAuth},
    kube_identity::Clients,
    token::{TokenProvider, TokenVerifier, Verdict, claims::Claims},
};
use crate::{
    error::chain,
    identity::{Pod, PodUid},
    secret::Secret,
};

/// What can mint credentials. A trait because every call of it leaves the process.
pub trait CredentialSource: Send + Sync + 'static {
    /// Whether a token that a caller sent is valid.
    fn verify<'a>(&'a self, token: &'a Secret, claims: &'a Claims) -> BoxFuture<'a, Verdict>;
    /// A token of this pod, valid now.
    fn token<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<Secret, Error>>;
    /// Drops a token of this pod that EKS Auth has refused: the next one is another, if there is one.
    fn reject_token<'a>(&'a self, uid: PodUid, token: &'a Secret) -> BoxFuture<'a, ()>;
    /// The credentials of the role of the token's service account.
    fn assume_role<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Assumed, Error>>;
    /// Drops the tokens of a pod that was removed.
    fn remove_pod(&self, uid: PodUid) -> BoxFuture<'_, ()>;
}

/// The real source: the kubelet, the API server and EKS Auth.
#[derive(Debug)]
pub struct NodeSource {
    /// Verifies tokens.
    pub verifier: TokenVerifier,
    /// Provides tokens.
    pub tokens: TokenProvider,
    /// Exchanges tokens for credentials.
    pub eks_auth: EksAuth,
}

// === impl NodeSource ===

impl NodeSource {
    /// That of a node, with these clients. Begins to fetch the cluster's keys.
    pub fn new(kubelet_root: &Path, kube: &Clients, eks_auth: EksAuth, clock: Clock) -> Self {
        let verifier = TokenVerifier::new(kube.own.clone());
        verifier.prepare();
        let tokens = TokenProvider::new(kubelet_root, kube.node.clone(), verifier.clone(), clock);
        Self { verifier, tokens, eks_auth }
    }
}

impl CredentialSource for NodeSource {
    fn verify<'a>(&'a self, token: &'a Secret, claims: &'a Claims) -> BoxFuture<'a, Verdict> {
        Box::pin(self.verifier.verify(token, claims))
    }

    fn token<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<Secret, Error>> {
        Box::pin(async {
            self.tokens.for_pod(pod).await.map_err(|error| Error::Token { reason: chain(&error) })
        })
    }

    fn reject_token<'a>(&'a self, uid: PodUid, token: &'a Secret) -> BoxFuture<'a, ()> {
        Box::pin(self.tokens.reject_token(uid, token))
    }

    fn assume_role<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Assumed, Error>> {
        Box::pin(self.eks_auth.assume_role(token))
    }

    fn remove_pod(&self, uid: PodUid) -> BoxFuture<'_, ()> {
        Box::pin(self.tokens.remove_pod(uid))
    }
}
