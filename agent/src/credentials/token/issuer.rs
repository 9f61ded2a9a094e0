//! Whether a token is one that this cluster has issued for EKS Auth.
//!
//! Owns the cluster's keys: fetched from the API server as the agent itself (which `system:service-account-issuer-discovery`
//! lets every service account do), kept, and fetched again when they are old or a token names another. Never takes a token
//! for good that it cannot verify, nor for bad because it cannot reach the keys: for what it says of itself alone.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use http::Request;
use kube::Client;
use serde::Deserialize;
use tokio::{sync::watch, time::Instant};
use tracing::{info, warn};

use super::{
    AUDIENCE,
    claims::Claims,
    signature::{self, KeySet},
};
use crate::{error::chain, secret::Secret};

const DISCOVERY: &str = "/.well-known/openid-configuration";
const KEYS: &str = "/openid/v1/jwks";
/// Keys are fetched again after this time, and used until then: one that the cluster has taken back counts for so long,
/// and for longer only while the API server is away.
const OLD: Duration = Duration::from_hours(1);
/// Between two attempts to fetch the keys, whatever callers send.
const EVERY: Duration = Duration::from_secs(5);
/// A caller waits no longer for the keys; the fetch goes on for the next one.
const WAIT_TIMEOUT: Duration = Duration::from_millis(400);
/// How long a fetch may take.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

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

/// The cluster as it signs tokens. Clones share what is known.
#[derive(Clone)]
pub struct Issuer {
    kube: Client,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    known: Option<Arc<Known>>,
    /// When the last fetch began.
    attempt: Option<Instant>,
    /// Its sender is gone when that has ended.
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

// === impl Issuer ===

impl Issuer {
    /// The issuer of the cluster that `kube`, the agent itself, talks to. Nothing is fetched yet.
    pub fn new(kube: Client) -> Self {
        Self { kube, state: Arc::default() }
    }

    /// Begins to fetch the keys, so that no caller need wait for them.
    pub fn prepare(&self) {
        self.refresh(&mut self.state());
    }

    /// Judges a token that has been read already, as `claims`, and whose times are right.
    pub async fn judge(&self, token: &Secret, claims: &Claims) -> Verdict {
        // What it says of itself takes no key to read: EKS Auth is not to see a token that is meant for somebody else.
        if let Some(reason) = not_for_eks_auth(claims) {
            return Verdict::Bad(reason);
        }
        let Some(known) = self.known().await else { return Verdict::Unknown };
        match known.judge(token, claims) {
            Err(signature::Error::UnknownKey) => {
                // The cluster may have a new one.
                let Some(known) = self.newer_than(&known).await else { return Verdict::Unknown };
                match known.judge(token, claims) {
                    Err(signature::Error::UnknownKey) if known.at.elapsed() >= EVERY => Verdict::Unknown,
                    judged => verdict(judged),
                }
            }
            judged => verdict(judged),
        }
    }

    /// The keys. Old ones are good until there are others; without any, their first fetch is waited for.
    async fn known(&self) -> Option<Arc<Known>> {
        let fetching = {
            let mut state = self.state();
            let known = state.known.clone();
            if known.as_ref().is_none_or(|known| known.at.elapsed() >= OLD) {
                self.refresh(&mut state);
            }
            if known.is_some() {
                return known;
            }
            state.fetching.clone()
        };
        self.after(fetching).await
    }

    /// The keys, fetched again unless these are from just now.
    async fn newer_than(&self, known: &Known) -> Option<Arc<Known>> {
        let fetching = {
            let mut state = self.state();
            if known.at.elapsed() >= EVERY {
                self.refresh(&mut state);
            }
            state.fetching.clone()
        };
        self.after(fetching).await
    }

    /// What is known when a fetch has ended, or has taken too long for a caller.
    async fn after(&self, fetching: Option<watch::Receiver<()>>) -> Option<Arc<Known>> {
        if let Some(mut fetching) = fetching {
            let _ = tokio::time::timeout(WAIT_TIMEOUT, fetching.changed()).await;
        }
        self.state().known.clone()
    }

    /// Begins a fetch, unless one is under way or has just been. It is nobody's: callers come and go.
    fn refresh(&self, state: &mut State) {
        let is_recent = state.attempt.is_some_and(|at| at.elapsed() < EVERY);
        let goes_on = |fetching: &watch::Receiver<()>| fetching.has_changed().is_ok();
        if is_recent || state.fetching.as_ref().is_some_and(goes_on) {
            return;
        }
        state.attempt = Some(Instant::now());
        let (end, fetching) = watch::channel(());
        state.fetching = Some(fetching);
        let issuer = self.clone();
        tokio::spawn(async move {
            let fetched = tokio::time::timeout(FETCH_TIMEOUT, issuer.fetch()).await;
            match fetched {
                Ok(Ok(known)) => {
                    info!(issuer = known.issuer, "the keys of the cluster's tokens are known");
                    issuer.state().known = Some(Arc::new(known));
                }
                Ok(Err(error)) => {
                    warn!(
                        error = chain(&*error),
                        "cannot fetch the keys of the cluster's tokens: EKS Auth alone judges new ones"
                    );
                }
                Err(_) => {
                    warn!(
                        "the keys of the cluster's tokens did not come in time: EKS Auth alone judges new ones"
                    );
                }
            }
            drop(end);
        });
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        f.debug_struct("Issuer").field("state", &self.state).finish_non_exhaustive()
    }
}

// === impl Known ===

impl Known {
    /// `Ok` has the verdict, unless it is the key that is not known.
    fn judge(&self, token: &Secret, claims: &Claims) -> Result<Verdict, signature::Error> {
        if claims.issuer.as_ref() != Some(&self.issuer) {
            return Ok(Verdict::Bad("its issuer is not this cluster".to_owned()));
        }
        self.keys.verify(token.expose()).map(|()| Verdict::Good)
    }
}

/// Why a token is not for EKS Auth, whoever has issued it.
fn not_for_eks_auth(claims: &Claims) -> Option<String> {
    if !claims.audiences.iter().any(|audience| audience == AUDIENCE) {
        return Some(format!("its audience is not {AUDIENCE}"));
    }
    claims.pod.is_none().then(|| "it is not bound to a pod".to_owned())
}

fn verdict(judged: Result<Verdict, signature::Error>) -> Verdict {
    judged.unwrap_or_else(|error| Verdict::Bad(error.to_string()))
}

#[cfg(test)]
mod tests;
