//! Keeps each pod's credentials, and makes one call however many ask at once.
//!
//! Owns who shares what: the cache's key is the pod, so a caller gets into it by the kernel's word alone, or
//! with a token that EKS Auth has accepted for that very pod. Never knows a request or a dialect.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use agent_common::defence::{Defence, holds};
use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use futures::future::BoxFuture;
use jiff::Timestamp;
use moka::{Expiry, future::Cache};

use super::{
    Credentials, Error,
    eks_auth::{Assumed, EksAuth},
    jwt::Claims,
    schedule,
    token::Tokens,
};
use crate::{
    error::chain,
    identity::{Pod, PodUid},
    secret::Secret,
};

/// How long finding a token and exchanging it may take in all. Callers are answered sooner; this ends what they
/// share, so that a service that hangs does not hold a pod for ever.
const FETCH_TIMEOUT: Duration = Duration::from_secs(6);
/// Pods whose credentials are kept: more than a node can run.
const PODS_MAX: u64 = 4096;
/// Accepted tokens that are remembered: each pod has one, and a new one every 19 hours.
const ACCEPTED_MAX: u64 = 8192;

/// What exchanges a token for credentials, and finds one for a pod that sent none. A trait because both ask
/// another service.
pub trait CredentialSource: Send + Sync + 'static {
    /// A token of this pod, good now.
    fn token<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<Secret, Error>>;
    /// The credentials of the role of the token's service account.
    fn assume_role<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Assumed, Error>>;
    /// Drops what is kept for a pod that is gone.
    fn forget(&self, uid: PodUid) -> BoxFuture<'_, ()>;
}

/// The kubelet, the API server and EKS Auth.
#[derive(Debug)]
pub struct NodeSource {
    /// Where tokens come from.
    pub tokens: Tokens,
    /// Who exchanges them.
    pub eks_auth: EksAuth,
}

/// The credentials of this node's pods.
pub struct Engine<S> {
    source: Arc<S>,
    by_pod: Cache<PodUid, Arc<Credentials>>,
    accepted: Cache<TokenDigest, PodUid>,
}

/// What proves a pod's service account to EKS Auth.
#[derive(Clone, Debug)]
pub enum Proof {
    /// The token that the pod itself sent; it says that it is bound to that pod.
    Own(Secret),
    /// The pod sent none: podgate finds one for it.
    OnBehalf(Arc<Pod>),
}

type TokenDigest = [u8; SHA256_OUTPUT_LEN];

/// Credentials leave the cache when fresher ones are due.
struct UntilDue;

// === impl NodeSource ===

impl CredentialSource for NodeSource {
    fn token<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<Secret, Error>> {
        Box::pin(async {
            self.tokens.for_pod(pod).await.map_err(|error| Error::Token { reason: chain(&error) })
        })
    }

    fn assume_role<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Assumed, Error>> {
        Box::pin(self.eks_auth.assume_role(token))
    }

    fn forget(&self, uid: PodUid) -> BoxFuture<'_, ()> {
        Box::pin(self.tokens.forget(uid))
    }
}

// === impl Engine ===

impl<S: CredentialSource> Engine<S> {
    /// An empty cache in front of `source`.
    pub fn new(source: S) -> Self {
        Self {
            source: Arc::new(source),
            by_pod: Cache::builder().max_capacity(PODS_MAX).expire_after(UntilDue).build(),
            accepted: Cache::builder().max_capacity(ACCEPTED_MAX).build(),
        }
    }

    /// The credentials of a pod that the kernel vouches for.
    ///
    /// # Errors
    /// [`Error::Slow`] at `deadline`, while the call goes on for whoever asks next.
    pub async fn for_pod(
        &self,
        uid: PodUid,
        proof: Proof,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Error> {
        if let Some(credentials) = self.by_pod.get(&uid).await {
            return Ok(credentials);
        }
        let (source, by_pod) = (Arc::clone(&self.source), self.by_pod.clone());
        detached(deadline, async move {
            let fetch = in_time(async {
                let (token, owner) = match proof {
                    Proof::Own(token) => (token, None),
                    Proof::OnBehalf(pod) => (source.token(&pod).await?, Some(pod)),
                };
                let assumed = source.assume_role(&token).await?;
                match owner {
                    Some(pod) if pod.service_account != assumed.service_account => Err(Error::BadAnswer {
                        reason: format!("it is for {}, not {}", assumed.service_account, pod.service_account),
                    }),
                    _ => Ok(Arc::new(assumed.credentials)),
                }
            });
            by_pod.try_get_with(uid, fetch).await.map_err(Arc::unwrap_or_clone)
        })
        .await
    }

    /// The credentials of the pod that `token` is bound to, for a caller that the kernel does not vouch for.
    /// `claims` are the token's own and count for nothing until EKS Auth has accepted this very token.
    ///
    /// # Errors
    /// [`Error::Slow`] at `deadline`, while the call goes on for whoever asks next.
    pub async fn for_token(
        &self,
        token: Secret,
        claims: Claims,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Error> {
        let known = if holds(Defence::AcceptedTokens) {
            self.accepted.get(&fingerprint(&token)).await
        } else {
            claims.pod
        };
        if let Some(uid) = known
            && let Some(credentials) = self.by_pod.get(&uid).await
        {
            return Ok(credentials);
        }
        let (source, by_pod) = (Arc::clone(&self.source), self.by_pod.clone());
        let accepted = self.accepted.clone();
        detached(deadline, async move {
            let accept = in_time(async {
                let pod = claims.pod.ok_or_else(unbound)?;
                let assumed = source.assume_role(&token).await?;
                by_pod.insert(pod, Arc::new(assumed.credentials)).await;
                Ok(pod)
            });
            let accept = accepted.try_get_with(fingerprint(&token), accept);
            let pod = accept.await.map_err(Arc::unwrap_or_clone)?;
            let fetch =
                async { source.assume_role(&token).await.map(|assumed| Arc::new(assumed.credentials)) };
            by_pod.try_get_with(pod, fetch).await.map_err(Arc::unwrap_or_clone)
        })
        .await
    }

    /// Drops everything about a pod that is gone.
    pub async fn forget(&self, uid: PodUid) {
        self.by_pod.invalidate(&uid).await;
        self.source.forget(uid).await;
    }
}

impl<S> std::fmt::Debug for Engine<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("pods", &self.by_pod.entry_count()).finish_non_exhaustive()
    }
}

// === impl UntilDue ===

impl Expiry<PodUid, Arc<Credentials>> for UntilDue {
    fn expire_after_create(&self, _: &PodUid, value: &Arc<Credentials>, _: Instant) -> Option<Duration> {
        let until = schedule::serve_until(value.obtained_at, value.expiration);
        Some(Duration::try_from(until.duration_since(Timestamp::now())).unwrap_or_default())
    }

    fn expire_after_update(
        &self,
        key: &PodUid,
        value: &Arc<Credentials>,
        at: Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        self.expire_after_create(key, value, at)
    }
}

/// Runs a call that outlives its caller: one who hangs up, or does not wait so long, takes nothing from those
/// who share it.
async fn detached(
    deadline: Instant,
    call: impl Future<Output = Result<Arc<Credentials>, Error>> + Send + 'static,
) -> Result<Arc<Credentials>, Error> {
    let begun = Instant::now();
    match tokio::time::timeout_at(deadline.into(), tokio::spawn(call)).await {
        Ok(Ok(result)) => result,
        Ok(Err(join)) => Err(Error::BadAnswer { reason: format!("BUG: the call ended early: {join}") }),
        Err(_) => Err(Error::Slow(begun.elapsed())),
    }
}

async fn in_time<T>(fetch: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let fetched = tokio::time::timeout(FETCH_TIMEOUT, fetch).await;
    fetched.unwrap_or_else(|_| Err(Error::Slow(FETCH_TIMEOUT)))
}

fn fingerprint(token: &Secret) -> TokenDigest {
    let mut fingerprint = [0; SHA256_OUTPUT_LEN];
    fingerprint.copy_from_slice(digest(&SHA256, token.expose().as_bytes()).as_ref());
    fingerprint
}

fn unbound() -> Error {
    Error::Token { reason: "the token is not bound to a pod".to_owned() }
}

#[cfg(test)]
mod tests;
