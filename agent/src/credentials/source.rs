//! What the engine calls: the kubelet, the API server and EKS Auth, behind one trait.
//!
//! Owns nothing but that seam; never keeps credentials, never decides when to call.

use futures::future::BoxFuture;

use super::{
    Error,
    aws::eks_auth::{Assumed, EksAuth},
    token::Tokens,
    token::claims::Claims,
    token::issuer::{Issuer, Verdict},
};
use crate::{
    error::chain,
    identity::{Pod, PodUid},
    secret::Secret,
};

/// What the engine calls. A trait because all of it is another service's.
pub trait CredentialSource: Send + Sync + 'static {
    /// Whether a token that a caller sent is good.
    fn judge<'a>(&'a self, token: &'a Secret, claims: &'a Claims) -> BoxFuture<'a, Verdict>;
    /// A token of this pod, good now.
    fn token<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<Secret, Error>>;
    /// Drops a token of this pod, which EKS Auth has refused: the next one is another, if there is one.
    fn refused<'a>(&'a self, uid: PodUid, token: &'a Secret) -> BoxFuture<'a, ()>;
    /// The credentials of the role of the token's service account.
    fn assume_role<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Assumed, Error>>;
    /// Drops what is kept for a pod that is gone.
    fn forget(&self, uid: PodUid) -> BoxFuture<'_, ()>;
}

/// The cluster's keys, the kubelet, the API server and EKS Auth.
#[derive(Debug)]
pub struct NodeSource {
    /// Who signs tokens.
    pub issuer: Issuer,
    /// Where tokens come from.
    pub tokens: Tokens,
    /// Who exchanges them.
    pub eks_auth: EksAuth,
}

// === impl NodeSource ===

impl CredentialSource for NodeSource {
    fn judge<'a>(&'a self, token: &'a Secret, claims: &'a Claims) -> BoxFuture<'a, Verdict> {
        Box::pin(self.issuer.judge(token, claims))
    }

    fn token<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<Secret, Error>> {
        Box::pin(async {
            self.tokens.for_pod(pod).await.map_err(|error| Error::Token { reason: chain(&error) })
        })
    }

    fn refused<'a>(&'a self, uid: PodUid, token: &'a Secret) -> BoxFuture<'a, ()> {
        Box::pin(self.tokens.refused(uid, token))
    }

    fn assume_role<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Assumed, Error>> {
        Box::pin(self.eks_auth.assume_role(token))
    }

    fn forget(&self, uid: PodUid) -> BoxFuture<'_, ()> {
        Box::pin(self.tokens.forget(uid))
    }
}
