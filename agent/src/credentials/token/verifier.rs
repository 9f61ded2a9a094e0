//! Whether a token was issued by this cluster for EKS Auth.
//!
//! Owns the cluster's keys: fetched from the API server as the agent itself (which
//! `system:service-account-issuer-discovery` allows every service account), cached, and fetched again when they are old or
//! a token names an unknown one. A token is never valid without verification, and never invalid because the keys are
//! unavailable: only because of its own claims.

use std::{sync::Arc, time::Duration};

use http::Request;
use kube::Client;
use parking_lot::{Mutex, MutexGuard};
use serde::Deserialize;
use tokio::{sync::watch, time::Instant};
use tracing::{info, warn};

use super::{
    claims::Claims,
    jwks::{self, KeySet},
};
use crate::{error::chain, identity::AUDIENCE, secret::Secret};

const DISCOVERY_PATH: &str = "/.well-known/openid-configuration";
const JWKS_PATH: &str = "/openid/v1/jwks";
/// Keys are refreshed after this time: a key that the cluster has retired is accepted for so long, and for longer only
/// while the API server is unavailable.
const MAX_AGE: Duration = Duration::from_hours(1);
/// Least time between two attempts to fetch the keys, whatever callers send.
const RETRY_DELAY: Duration = Duration::from_secs(5);
/// A caller waits no longer for the keys; the fetch continues for the next one.
const WAIT_TIMEOUT: Duration = Duration::from_millis(400);
/// How long a fetch may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

/// The result of verifying a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The cluster issued it for EKS Auth.
    Valid,
    /// The cluster did not, for this reason.
    Invalid(String),
    /// The cluster's keys are unavailable.
    Unknown,
}

/// Verifies tokens with the cluster's keys. Clones share the keys.
#[derive(Clone)]
pub struct TokenVerifier {
    kube: Client,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    known: Option<Arc<Known>>,
    /// When the last fetch started.
    attempt: Option<Instant>,
    /// Closed when that fetch has ended.
    fetching: Option<watch::Receiver<()>>,
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

// === impl TokenVerifier ===

impl TokenVerifier {
    /// For the cluster of `kube`, which acts as the agent itself. Nothing is fetched yet.
    pub fn new(kube: Client) -> Self {
        Self { kube, state: Arc::default() }
    }

    /// Starts fetching the keys, so that no caller has to wait for them.
    pub fn prepare(&self) {
        self.refresh(&mut self.state());
    }

    /// Verifies a token whose `claims` were parsed already, and whose times were checked.
    pub async fn verify(&self, token: &Secret, claims: &Claims) -> Verdict {
        // Claims need no key: EKS Auth must not see a token that is meant for another service.
        if let Some(reason) = not_for_eks_auth(claims) {
            return Verdict::Invalid(reason);
        }
        let Some(known) = self.known().await else { return Verdict::Unknown };
        match known.verify(token, claims) {
            Err(jwks::Error::UnknownKey) => {
                // The cluster may have a new key.
                let Some(known) = self.newer_than(&known).await else { return Verdict::Unknown };
                match known.verify(token, claims) {
                    Err(jwks::Error::UnknownKey) if known.at.elapsed() >= RETRY_DELAY => Verdict::Unknown,
                    verified => verdict(verified),
                }
            }
            verified => verdict(verified),
        }
    }

    /// The keys. Old ones are used until there are new ones; the first fetch is waited for.
    async fn known(&self) -> Option<Arc<Known>> {
        let fetching = {
            let mut state = self.state();
            let known = state.known.clone();
            if known.as_ref().is_none_or(|known| known.at.elapsed() >= MAX_AGE) {
                self.refresh(&mut state);
            }
            if known.is_some() {
                return known;
            }
            state.fetching.clone()
        };
        self.after(fetching).await
    }

    /// The keys, fetched again unless these are new.
    async fn newer_than(&self, known: &Known) -> Option<Arc<Known>> {
        let fetching = {
            let mut state = self.state();
            if known.at.elapsed() >= RETRY_DELAY {
                self.refresh(&mut state);
            }
            state.fetching.clone()
        };
        self.after(fetching).await
    }

    /// The keys after a fetch has ended, or has taken too long for a caller.
    async fn after(&self, fetching: Option<watch::Receiver<()>>) -> Option<Arc<Known>> {
        if let Some(mut fetching) = fetching {
            let _ = tokio::time::timeout(WAIT_TIMEOUT, fetching.changed()).await;
        }
        self.state().known.clone()
    }

    /// Starts a fetch, unless one is running or a recent one has ended. It does not depend on any caller.
    fn refresh(&self, state: &mut State) {
        let is_recent = state.attempt.is_some_and(|at| at.elapsed() < RETRY_DELAY);
        let is_running = |fetching: &watch::Receiver<()>| fetching.has_changed().is_ok();
        if is_recent || state.fetching.as_ref().is_some_and(is_running) {
            return;
        }
        state.attempt = Some(Instant::now());
        let (end, fetching) = watch::channel(());
        state.fetching = Some(fetching);
        let verifier = self.clone();
        tokio::spawn(async move {
            let fetched = tokio::time::timeout(FETCH_TIMEOUT, verifier.fetch()).await;
            match fetched {
                Ok(Ok(known)) => {
                    info!(issuer = known.issuer, "fetched the cluster's token keys");
                    verifier.state().known = Some(Arc::new(known));
                }
                Ok(Err(error)) => {
                    warn!(
                        error = chain(&*error),
                        "cannot fetch the cluster's token keys; only EKS Auth can verify new tokens"
                    );
                }
                Err(_) => {
                    warn!("timed out fetching the cluster's token keys; only EKS Auth can verify new tokens");
                }
            }
            drop(end);
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    async fn fetch(&self) -> Result<Known, Box<dyn std::error::Error + Send + Sync>> {
        let get = |path| Request::get(path).body(vec![]);
        let Discovery { issuer } = self.kube.request(get(DISCOVERY_PATH)?).await?;
        let keys = KeySet::parse(&self.kube.request_text(get(JWKS_PATH)?).await?)?;
        if keys.is_empty() {
            return Err("the key set has no key of a known kind".into());
        }
        Ok(Known { issuer, keys, at: Instant::now() })
    }
}

impl std::fmt::Debug for TokenVerifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenVerifier").field("state", &self.state).finish_non_exhaustive()
    }
}

// === impl Known ===

impl Known {
    /// The verdict, or why the signature does not verify.
    fn verify(&self, token: &Secret, claims: &Claims) -> Result<Verdict, jwks::Error> {
        if claims.issuer.as_ref() != Some(&self.issuer) {
            return Ok(Verdict::Invalid("its issuer is not this cluster".to_owned()));
        }
        self.keys.verify(token.expose()).map(|()| Verdict::Valid)
    }
}

/// Why a token is not for EKS Auth, whoever issued it.
fn not_for_eks_auth(claims: &Claims) -> Option<String> {
    if !claims.audiences.iter().any(|audience| audience == AUDIENCE) {
        return Some(format!("its audience is not {AUDIENCE}"));
    }
    claims.pod.is_none().then(|| "it is not bound to a pod".to_owned())
}

fn verdict(verified: Result<Verdict, jwks::Error>) -> Verdict {
    verified.unwrap_or_else(|error| Verdict::Invalid(error.to_string()))
}

#[cfg(test)]
mod tests;
