//! A fetch as its callers see it: which tokens it may use, how it stands, and how they wait for it.
//!
//! Owns the task of a fetch, and the channel that tells of it. The fetch continues without its callers, and each of them
//! waits no longer than its own deadline.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{Instant, timeout_at},
};

use crate::{
    credentials::{Credentials, Error, token::claims::SentToken},
    identity::Pod,
};

/// What callers of a removed pod are told.
pub(super) const POD_REMOVED: &str = "the pod is gone";
/// A caller who is unlikely to be served is told why after this time.
const UNLIKELY_TIMEOUT: Duration = Duration::from_millis(50);

/// The tokens of a fetch: the one that a caller sent comes first, then one that podgate obtains for the pod.
#[derive(Clone, Default)]
pub(super) struct TokenSources {
    pub(super) sent: Option<SentToken>,
    pod: Option<Arc<Pod>>,
}

/// A fetch that is queued or running.
#[derive(Default)]
pub(super) struct InFlight {
    pub(super) progress: watch::Sender<Progress>,
    /// Its number and its task, while it runs.
    pub(super) task: Option<(u64, AbortHandle)>,
    /// Whether EKS Auth has refused a token that podgate obtained for it.
    pub(super) token_refused: bool,
}

/// How a fetch stands.
#[derive(Clone, Default)]
pub(super) enum Progress {
    #[default]
    Pending,
    /// It has failed, and will be tried again.
    Retrying(Error),
    Completed(Result<Arc<Credentials>, Error>),
}

/// A caller that waits for a fetch.
pub(super) struct Waiter {
    progress: watch::Receiver<Progress>,
    likely: bool,
    last_error: Option<Error>,
}

// === impl TokenSources ===

impl TokenSources {
    pub(super) fn new(sent: Option<SentToken>, pod: Option<&Arc<Pod>>) -> Self {
        Self { sent, pod: pod.cloned() }
    }

    /// Replaces tokens by newer ones.
    pub(super) fn update(&mut self, newer: Self) {
        self.sent = newer.sent.or_else(|| self.sent.take());
        self.pod = newer.pod.or_else(|| self.pod.take());
    }

    /// The pod, where it is known from attestation or from the API server.
    pub(super) fn pod(&self) -> Option<&Pod> {
        self.pod.as_deref()
    }

    pub(super) fn unexpired_sent(&self, now: Timestamp) -> Option<&SentToken> {
        self.sent.as_ref().filter(|sent| sent.claims.expiration.is_none_or(|expiration| now < expiration))
    }
}

// === impl InFlight ===

impl InFlight {
    /// Another caller. Unless `likely`, the result is not worth waiting for.
    pub(super) fn waiter(&self, likely: bool, last_error: Option<Error>) -> Waiter {
        Waiter { progress: self.progress.subscribe(), likely, last_error }
    }

    /// Whether the next token will be the second one.
    pub(super) fn is_retry(&self) -> bool {
        self.token_refused
    }

    /// Starts its task.
    pub(super) fn begin(&mut self, number: u64, fetch: impl Future<Output = ()> + Send + 'static) {
        self.task = Some((number, tokio::spawn(fetch).abort_handle()));
    }

    pub(super) fn is_running(&self, number: u64) -> bool {
        self.task.as_ref().is_some_and(|(own, _)| *own == number)
    }
}

impl Drop for InFlight {
    /// Nothing more is fetched for a key that was removed.
    fn drop(&mut self) {
        if let Some((_, task)) = &self.task {
            task.abort();
        }
    }
}

// === impl Waiter ===

impl Waiter {
    /// Waits for the fetch to complete, but no longer than `until`.
    pub(super) async fn wait(mut self, until: Instant) -> Result<Arc<Credentials>, Error> {
        let begun = Instant::now();
        let until = if self.likely { until } else { until.min(begun + UNLIKELY_TIMEOUT) };
        let completed = self.progress.wait_for(|progress| matches!(progress, Progress::Completed(_)));
        match timeout_at(until, completed).await.map(|completed| completed.map(|progress| progress.clone())) {
            Ok(Ok(Progress::Completed(result))) => return result,
            Ok(_) => return Err(Error::Token { reason: POD_REMOVED.to_owned() }),
            Err(_) => {}
        }
        let error = match &*self.progress.borrow() {
            Progress::Retrying(error) => Some(error.clone()),
            _ => self.last_error,
        };
        Err(error.unwrap_or(Error::Slow(begun.elapsed())))
    }
}
