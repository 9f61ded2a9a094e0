//! Whether a token is one that this cluster has issued for EKS Auth.
//!
//! Owns the cluster's keys: fetched from the API server as the agent itself (which `system:service-account-issuer-discovery`
//! lets every service account do), kept, and fetched again when they are old or a token names another. Never takes a token
//! for good that it cannot verify, nor for bad because it cannot reach the keys.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use http::Request;
use kube::Client;
use serde::Deserialize;
use tokio::{sync::Mutex, time::Instant};
use tracing::{info, warn};

use super::{
    jwt::{
        Claims,
        signature::{self, KeySet},
    },
    token::AUDIENCE,
};
use crate::{error::chain, secret::Secret};

const DISCOVERY: &str = "/.well-known/openid-configuration";
const KEYS: &str = "/openid/v1/jwks";
/// A key that the cluster has taken back counts for so long at most.
const OLD: Duration = Duration::from_hours(1);
/// Between two attempts to fetch the keys, whatever callers send.
const EVERY: Duration = Duration::from_secs(5);
/// A caller waits no longer for the keys.
const TIMEOUT: Duration = Duration::from_millis(400);

/// What is known of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The cluster has issued it for EKS Auth.
    Good,
    /// It has not, and why.
    Bad(String),
    /// The cluster's keys cannot be had.
    Unknown,
}

/// The cluster as it signs tokens.
pub struct Issuer {
    kube: Client,
    known: RwLock<Option<Arc<Known>>>,
    attempt: Mutex<Option<Instant>>,
}

#[derive(Debug)]
struct Known {
    issuer: String,
    keys: KeySet,
    at: Instant,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
}

// === impl Issuer ===

impl Issuer {
    /// The issuer of the cluster that `kube`, the agent itself, talks to. Nothing is fetched yet.
    pub fn new(kube: Client) -> Self {
        Self { kube, known: RwLock::default(), attempt: Mutex::default() }
    }

    /// Fetches the keys, so that no caller need wait for them.
    pub async fn prepare(&self) {
        self.known(OLD).await;
    }

    /// Judges a token that has been read already, as `claims`, and whose times are right.
    pub async fn judge(&self, token: &Secret, claims: &Claims) -> Verdict {
        let Some(known) = self.known(OLD).await else { return Verdict::Unknown };
        match known.judge(token, claims) {
            Err(signature::Error::UnknownKey) => {
                // The cluster may have a new one.
                let Some(known) = self.known(EVERY).await else { return Verdict::Unknown };
                match known.judge(token, claims) {
                    Err(signature::Error::UnknownKey) if known.at.elapsed() >= EVERY => Verdict::Unknown,
                    judged => verdict(judged),
                }
            }
            judged => verdict(judged),
        }
    }

    /// The keys, fetched again if they are older than this; old ones where there are no newer.
    async fn known(&self, age: Duration) -> Option<Arc<Known>> {
        let current = || self.known.read().unwrap_or_else(PoisonError::into_inner).clone();
        let is_fresh = |known: &Arc<Known>| known.at.elapsed() < age;
        if let Some(known) = current().filter(is_fresh) {
            return Some(known);
        }
        // One fetches, the others wait for it.
        let mut attempt = self.attempt.lock().await;
        let recent = attempt.is_some_and(|at| at.elapsed() < EVERY);
        if recent || current().is_some_and(|known| is_fresh(&known)) {
            return current();
        }
        *attempt = Some(Instant::now());
        match tokio::time::timeout(TIMEOUT, self.fetch()).await {
            Ok(Ok(known)) => {
                info!(issuer = known.issuer, "the keys of the cluster's tokens are known");
                *self.known.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(known));
            }
            Ok(Err(error)) => {
                warn!(
                    error = chain(&*error),
                    "cannot fetch the keys of the cluster's tokens: EKS Auth alone judges those"
                );
            }
            Err(_) => {
                warn!("the keys of the cluster's tokens did not come in time: EKS Auth alone judges those");
            }
        }
        current()
    }

    async fn fetch(&self) -> Result<Known, Box<dyn std::error::Error + Send + Sync>> {
        let get = |path| Request::get(path).body(vec![]);
        let Discovery { issuer } = self.kube.request(get(DISCOVERY)?).await?;
        let keys = KeySet::parse(&self.kube.request_text(get(KEYS)?).await?)?;
        if keys.is_empty() {
            return Err("the key set has no key of a known kind".into());
        }
        Ok(Known { issuer, keys, at: Instant::now() })
    }
}

impl std::fmt::Debug for Issuer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issuer").field("known", &self.known).finish_non_exhaustive()
    }
}

// === impl Known ===

impl Known {
    /// `Ok` has the verdict, unless it is the key that is not known.
    fn judge(&self, token: &Secret, claims: &Claims) -> Result<Verdict, signature::Error> {
        if claims.issuer.as_ref() != Some(&self.issuer) {
            return Ok(Verdict::Bad("its issuer is not this cluster".to_owned()));
        }
        if !claims.audiences.iter().any(|audience| audience == AUDIENCE) {
            return Ok(Verdict::Bad(format!("its audience is not {AUDIENCE}")));
        }
        if claims.pod.is_none() {
            return Ok(Verdict::Bad("it is not bound to a pod".to_owned()));
        }
        self.keys.verify(token.expose()).map(|()| Verdict::Good)
    }
}

fn verdict(judged: Result<Verdict, signature::Error>) -> Verdict {
    judged.unwrap_or_else(|error| Verdict::Bad(error.to_string()))
}
