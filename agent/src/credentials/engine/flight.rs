//! One fetch: from its beginning to what its callers are told.
//!
//! Owns the task of a fetch and the news of it. It goes on without its callers, and they end without it: by their own
//! deadline.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use futures::FutureExt as _;
use jiff::{SignedDuration, Timestamp};
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{Instant, timeout, timeout_at},
};
use tracing::{debug, info, warn};

#[cfg(test)]
use super::planted::{Bug, planted};
use super::{Engine, Ready, State, fingerprint};
use crate::{
    credentials::{
        Credentials, Error,
        jwt::SentToken,
        plan::{Class, Key, Landing, Outcome, TokenDigest},
        schedule::Failure,
        source::CredentialSource,
    },
    identity::{Pod, PodUid},
    secret::Secret,
};

/// How long a token may take. Callers are answered sooner; this ends what they share, so that a service that hangs does
/// not hold a pod for ever.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long EKS Auth may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);
/// Who asks while nothing can be had is told why after that.
const NO_HOPE: Duration = Duration::from_millis(50);
/// Credentials with less life are of no use to anybody.
const LIFE_MIN: SignedDuration = SignedDuration::from_secs(15);

/// Where a pod's token comes from: the caller's own comes first, then one that podgate finds.
#[derive(Clone, Default)]
pub(super) struct Tokens {
    sent: Option<SentToken>,
    pod: Option<Arc<Pod>>,
}

/// A fetch that waits for its turn or is under way.
#[derive(Default)]
pub(super) struct Flight {
    news: watch::Sender<News>,
    /// Its number, and its task, once it is under way.
    task: Option<(u64, AbortHandle)>,
}

/// What is known of a flight.
#[derive(Clone, Default)]
enum News {
    #[default]
    None,
    /// It has failed, and goes on.
    Trouble(Error),
    Landed(Result<Arc<Credentials>, Error>),
}

/// A caller's place in a flight.
pub(super) struct Waiter {
    news: watch::Receiver<News>,
    hope: bool,
    last_error: Option<Error>,
}

/// What a flight brings.
struct Fetched {
    credentials: Credentials,
    /// The token that EKS Auth has accepted, where a caller sent it.
    accepted: Option<(TokenDigest, Option<PodUid>)>,
}

// === impl Tokens ===

impl Tokens {
    pub(super) fn new(sent: Option<SentToken>, pod: Option<&Arc<Pod>>) -> Self {
        Self { sent, pod: pod.cloned() }
    }

    /// Takes over what is newer.
    pub(super) fn update(&mut self, newer: Self) {
        self.sent = newer.sent.or_else(|| self.sent.take());
        self.pod = newer.pod.or_else(|| self.pod.take());
    }

    /// The pod, where the kernel or the API server has vouched for it.
    pub(super) fn pod(&self) -> Option<&Pod> {
        self.pod.as_deref()
    }

    fn sent_and_good(&self, now: Timestamp) -> Option<&SentToken> {
        self.sent.as_ref().filter(|sent| sent.claims.expiration.is_none_or(|expiration| now < expiration))
    }
}

// === impl Flight ===

impl Flight {
    /// A caller's place. Without `hope` its end is not worth waiting for.
    pub(super) fn waiter(&self, hope: bool, last_error: Option<Error>) -> Waiter {
        Waiter { news: self.news.subscribe(), hope, last_error }
    }

    /// It is under way from now on.
    pub(super) fn begin(&mut self, number: u64, flight: impl Future<Output = ()> + Send + 'static) {
        self.task = Some((number, tokio::spawn(flight).abort_handle()));
    }

    fn is(&self, number: u64) -> bool {
        self.task.as_ref().is_some_and(|(own, _)| *own == number)
    }
}

impl Drop for Flight {
    /// Of a pod that is gone nothing is fetched any more.
    fn drop(&mut self) {
        if let Some((_, task)) = &self.task {
            task.abort();
        }
    }
}

// === impl Waiter ===

impl Waiter {
    /// Waits for the flight's end, but no longer than until then.
    pub(super) async fn wait(mut self, until: Instant) -> Result<Arc<Credentials>, Error> {
        let begun = Instant::now();
        let until = if self.hope { until } else { until.min(begun + NO_HOPE) };
        let landed = self.news.wait_for(|news| matches!(news, News::Landed(_)));
        match timeout_at(until, landed).await.map(|landed| landed.map(|news| news.clone())) {
            Ok(Ok(News::Landed(result))) => return result,
            Ok(_) => return Err(Error::Token { reason: "the pod is gone".to_owned() }),
            Err(_) => {}
        }
        let trouble = match &*self.news.borrow() {
            News::Trouble(error) => Some(error.clone()),
            _ => self.last_error,
        };
        Err(trouble.unwrap_or(Error::Slow(begun.elapsed())))
    }
}

// === impl Engine ===

impl<S: CredentialSource> Engine<S> {
    /// A flight from its beginning to its end.
    pub(super) async fn fly(self: Arc<Self>, key: Key, class: Class, number: u64, tokens: Tokens) {
        let fetched = AssertUnwindSafe(self.fetch(&tokens)).catch_unwind().await;
        let bug = |_| Err(Error::BadAnswer { reason: "BUG: the call has panicked".to_owned() });
        self.land(key, class, number, fetched.unwrap_or_else(bug));
    }

    async fn fetch(&self, tokens: &Tokens) -> Result<Fetched, Error> {
        let (token, accepted) = match (tokens.sent_and_good(self.now()), &tokens.pod) {
            (Some(sent), _) => (sent.token.clone(), Some((fingerprint(&sent.token), sent.claims.pod))),
            (None, Some(pod)) => (self.token(pod).await?, None),
            (None, None) => {
                let reason = "the token that the pod sent has expired".to_owned();
                return Err(Error::Token { reason });
            }
        };
        let assumed = timeout(CALL_TIMEOUT, self.source.assume_role(&token)).await;
        let assumed =
            assumed.unwrap_or_else(|_| Err(Error::Unreachable { reason: "no answer in time".to_owned() }))?;
        let bad = |reason| Err(Error::BadAnswer { reason });
        if let Some(pod) = &tokens.pod
            && pod.service_account != assumed.service_account
        {
            return bad(format!("it is for {}, not {}", assumed.service_account, pod.service_account));
        }
        if assumed.credentials.expiration < self.now() + LIFE_MIN {
            return bad("its credentials have expired already; is this node's clock right?".to_owned());
        }
        Ok(Fetched { credentials: assumed.credentials, accepted })
    }

    async fn token(&self, pod: &Pod) -> Result<Secret, Error> {
        let token = timeout(TOKEN_TIMEOUT, self.source.token(pod)).await;
        token.unwrap_or_else(|_| {
            Err(Error::Token { reason: "the API server gave no answer in time".to_owned() })
        })
    }

    fn land(&self, key: Key, class: Class, number: u64, fetched: Result<Fetched, Error>) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let flight = state.records.get(&key).and_then(|record| record.flight.as_ref());
        if !flight.is_some_and(|flight| flight.is(number)) {
            return;
        }
        self.metrics.fetched(class, fetched.as_ref().err());
        let outcome = match &fetched {
            Ok(fetched) => Outcome::Got(fetched.credentials.life()),
            Err(error) => error.outcome(),
        };
        let landing = state.plan.landed(key, outcome, self.now());
        let result = match fetched {
            Ok(fetched) => Ok(self.keep(state, key, fetched)),
            Err(error) => {
                state.note_error(key, class, &error);
                Err(error)
            }
        };
        self.tell(state, key, landing, result);
        self.act(state);
    }

    /// Puts what a flight has brought where callers find it.
    fn keep(&self, state: &mut State, key: Key, fetched: Fetched) -> Arc<Credentials> {
        let Fetched { credentials, accepted } = fetched;
        let credentials = Arc::new(credentials);
        let (uid, of_token) = match (key, accepted) {
            (Key::Pod(uid), accepted) => (Some(uid), accepted),
            // EKS Auth has taken the whole token for good, and with it what it says of its pod.
            (Key::Token(_), accepted) => (accepted.and_then(|(_, uid)| uid), accepted),
        };
        let Some(uid) = uid else { return credentials };
        if let Some((digest, _)) = of_token {
            self.trust(state, uid, digest);
        }
        if key != Key::Pod(uid) {
            state.plan.learn(uid, credentials.life(), self.now());
        }
        #[cfg(test)]
        if planted(Bug::Mixed) {
            for key in state.records.keys() {
                if let Key::Pod(other) = key {
                    self.hand(*other, &credentials);
                }
            }
        }
        self.hand(uid, &credentials);
        credentials
    }

    pub(super) fn hand(&self, uid: PodUid, credentials: &Arc<Credentials>) {
        let ready = Ready { credentials: Arc::clone(credentials), asked: AtomicBool::new(false) };
        self.ready.pin().insert(uid, Arc::new(ready));
    }

    /// Tells a flight's callers what has become of it.
    fn tell(&self, state: &mut State, key: Key, landing: Landing, result: Result<Arc<Credentials>, Error>) {
        let Some(record) = state.records.get_mut(&key) else { return };
        // Its task is the one that tells.
        let Some(flight) = &mut record.flight else { return };
        flight.task = None;
        match (landing, result) {
            (Landing::GoesOn, Err(error)) => {
                flight.news.send_replace(News::Trouble(error));
            }
            (_, result) => {
                record.last_error = result.as_ref().err().cloned();
                let is_done_with = result.is_ok() && matches!(key, Key::Token(_));
                if let Some(flight) = record.flight.take() {
                    #[cfg(test)]
                    if planted(Bug::LostWakeUp) {
                        return std::mem::forget(flight);
                    }
                    flight.news.send_replace(News::Landed(result));
                }
                if is_done_with {
                    state.plan.forget(key);
                    self.drop_record(state, key);
                }
            }
        }
    }
}

impl State {
    /// Keeps what a failure means, and tells operators of those that no caller is told of.
    fn note_error(&mut self, key: Key, class: Class, error: &Error) {
        if error.outcome() == Outcome::Failed(Failure::Outage) {
            self.outage = Some(error.clone());
        }
        let Some(record) = self.records.get_mut(&key) else { return };
        if let Error::Service(service) = error
            && service.is_about_the_token()
        {
            record.tokens.sent = None;
        }
        let pod = record.tokens.pod.as_deref().map(Pod::full_name);
        match class {
            Class::Foreground => {
                debug!(?key, pod.name = pod, %error, "a pod's credentials could not be fetched");
            }
            Class::Refresh => {
                warn!(?key, pod.name = pod, %error, "a pod's credentials could not be refreshed; those it has are served on");
            }
            Class::Prefetch => {
                info!(?key, pod.name = pod, %error, "a pod's credentials could not be fetched before it asks");
            }
        }
    }
}
