//! One fetch: from its beginning to what its callers are told.
//!
//! Owns the task of a fetch and the news of it. It goes on without its callers, and they end without it: by their own
//! deadline.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use futures::FutureExt as _;
use jiff::{SignedDuration, Timestamp};
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{Instant, timeout_at},
};
use tracing::{debug, error, info, warn};

#[cfg(test)]
use super::planted::{Bug, planted};
use super::{
    CredentialCache, Ready, State,
    absent::POD_IS_GONE,
    fetch::{Accepted, Fetched},
};
use crate::{
    credentials::{
        Credentials, Error,
        scheduler::freshness::{Failure, Life},
        scheduler::{Class, Completion, Key, Outcome, TokenDigest},
        source::CredentialSource,
        token::claims::SentToken,
    },
    identity::{Pod, PodUid},
};

/// Who asks while nothing can be had is told why after that.
const NO_HOPE: Duration = Duration::from_millis(50);

/// Where a pod's token comes from: the caller's own comes first, then one that podgate finds.
#[derive(Clone, Default)]
pub(super) struct Tokens {
    sent: Option<SentToken>,
    pod: Option<Arc<Pod>>,
}

/// A fetch that waits for its turn or is under way.
#[derive(Default)]
pub(super) struct InFlight {
    news: watch::Sender<News>,
    /// Its number, and its task, once it is under way.
    task: Option<(u64, AbortHandle)>,
    /// Whether EKS Auth has refused a token that podgate found for it.
    token_refused: bool,
}

/// What is known of a flight.
#[derive(Clone, Default)]
enum News {
    #[default]
    None,
    /// It has failed, and goes on.
    Trouble(Error),
    Completed(Result<Arc<Credentials>, Error>),
}

/// A caller's place in a flight.
pub(super) struct Waiter {
    news: watch::Receiver<News>,
    hope: bool,
    last_error: Option<Error>,
}

/// What a flight has brought, as callers see it from now on.
struct Got {
    credentials: Arc<Credentials>,
    life: Life,
    /// The pod that it is kept for.
    uid: Option<PodUid>,
    /// The token that opens it.
    token: Option<TokenDigest>,
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

    /// The pod, where the kernel or the API server has attested for it.
    pub(super) fn pod(&self) -> Option<&Pod> {
        self.pod.as_deref()
    }

    pub(super) fn sent_and_good(&self, now: Timestamp) -> Option<&SentToken> {
        self.sent.as_ref().filter(|sent| sent.claims.expiration.is_none_or(|expiration| now < expiration))
    }
}

// === impl InFlight ===

impl InFlight {
    /// A caller's place. Without `hope` its end is not worth waiting for.
    pub(super) fn waiter(&self, hope: bool, last_error: Option<Error>) -> Waiter {
        Waiter { news: self.news.subscribe(), hope, last_error }
    }

    /// Whether the next token is the second one.
    pub(super) fn is_second(&self) -> bool {
        self.token_refused
    }

    /// It is under way from now on.
    pub(super) fn begin(&mut self, number: u64, flight: impl Future<Output = ()> + Send + 'static) {
        self.task = Some((number, tokio::spawn(flight).abort_handle()));
    }

    fn is(&self, number: u64) -> bool {
        self.task.as_ref().is_some_and(|(own, _)| *own == number)
    }
}

impl Drop for InFlight {
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
        let completed = self.news.wait_for(|news| matches!(news, News::Completed(_)));
        match timeout_at(until, completed).await.map(|completed| completed.map(|news| news.clone())) {
            Ok(Ok(News::Completed(result))) => return result,
            Ok(_) => return Err(Error::Token { reason: POD_IS_GONE.to_owned() }),
            Err(_) => {}
        }
        let trouble = match &*self.news.borrow() {
            News::Trouble(error) => Some(error.clone()),
            _ => self.last_error,
        };
        Err(trouble.unwrap_or(Error::Slow(begun.elapsed())))
    }
}

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// A flight from its beginning to its end.
    pub(super) async fn fly(
        self: Arc<Self>,
        key: Key,
        class: Class,
        number: u64,
        tokens: Tokens,
        is_second: bool,
    ) {
        let fetched = AssertUnwindSafe(self.fetch(key, number, &tokens, is_second)).catch_unwind().await;
        let bug = |_| Err(Error::BadAnswer { reason: "BUG: the call has panicked".to_owned() });
        let fetched = fetched.unwrap_or_else(bug);
        let completed = catch_unwind(AssertUnwindSafe(|| self.land(key, class, number, fetched)));
        if completed.is_err() {
            error!(?key, "BUG: the end of a fetch has panicked; what was known of the pod is dropped");
            self.give_up(&mut self.lock(), key);
        }
    }

    /// Leaves a flight's place to others.
    pub(super) fn linger(&self, key: Key, number: u64) {
        let mut state = self.lock();
        if state.is_under_way(key, number) {
            state.plan.lingers(key, self.now());
            self.act(&mut state);
        }
    }

    fn land(&self, key: Key, class: Class, number: u64, fetched: Result<Fetched, Error>) {
        let mut guard = self.lock();
        let state = &mut *guard;
        if !state.is_under_way(key, number) {
            return;
        }
        let (outcome, result) = match fetched {
            Ok(Fetched::Token) => {
                state.plan.completed(key, Outcome::HasToken, self.now());
                if let Some(flight) = state.records.get_mut(&key).and_then(|record| record.flight.as_mut()) {
                    flight.task = None;
                }
                return self.act(state);
            }
            Ok(Fetched::TokenRefused(error)) => {
                let landing = state.plan.completed(key, Outcome::TokenRefused, self.now());
                if let Some(flight) = state.records.get_mut(&key).and_then(|record| record.flight.as_mut()) {
                    flight.token_refused = true;
                }
                state.outage = None;
                self.tell(state, key, landing, Err(Error::Service(error)));
                return self.act(state);
            }
            Ok(Fetched::Credentials { credentials, accepted }) => {
                let got = self.got(key, credentials, accepted);
                (Outcome::Got(got.life), Ok(got))
            }
            Err(error) => (error.outcome(), Err(error)),
        };
        self.metrics.fetched(class, result.as_ref().err());
        let landing = state.plan.completed(key, outcome, self.now());
        let result = match result {
            Ok(got) => {
                state.outage = None;
                Ok(self.keep(state, key, got))
            }
            Err(error) => {
                state.note_error(key, class, &error, self.left(key));
                Err(error)
            }
        };
        self.tell(state, key, landing, result);
        self.act(state);
    }

    fn got(&self, key: Key, credentials: Arc<Credentials>, accepted: Option<Accepted>) -> Got {
        let uid = match key {
            Key::Pod(uid) => Some(uid),
            // EKS Auth has taken the whole token for good, and with it what it says of its pod.
            Key::Token(_) => accepted.and_then(|accepted| accepted.pod),
        };
        let obtained_at = credentials.obtained_at;
        let kept = uid.and_then(|uid| self.alive(uid)).map(|ready| Arc::clone(&ready.credentials));
        // What is good for longer stays, unless it is of a role that is the pod's no more.
        let kept =
            kept.filter(|kept| kept.role == credentials.role && kept.expiration > credentials.expiration);
        let credentials = kept.unwrap_or(credentials);
        let life = Life { obtained_at, expiration: credentials.expiration };
        Got { credentials, life, uid, token: accepted.map(|accepted| accepted.token) }
    }

    /// Puts what a flight has brought where callers find it.
    fn keep(&self, state: &mut State, key: Key, got: Got) -> Arc<Credentials> {
        let Got { credentials, life, uid, token } = got;
        let Some(uid) = uid.filter(|uid| state.is_here(*uid).is_ok()) else { return credentials };
        if let Some(digest) = token {
            self.trust(state, uid, digest);
        }
        if key != Key::Pod(uid) {
            state.plan.learn(uid, life, self.now());
        }
        #[cfg(test)]
        if planted(Bug::Mixed) {
            for key in state.records.keys() {
                if let Key::Pod(other) = key {
                    self.hand(*other, &credentials, life);
                }
            }
        }
        self.hand(uid, &credentials, life);
        if key != Key::Pod(uid) {
            state.tell_who_queues(uid, &credentials);
        }
        credentials
    }

    pub(super) fn hand(&self, uid: PodUid, credentials: &Arc<Credentials>, life: Life) {
        let ready = Ready { credentials: Arc::clone(credentials), life, asked: AtomicBool::new(false) };
        self.ready.pin().insert(uid, Arc::new(ready));
    }

    /// How long there is something to serve.
    fn left(&self, key: Key) -> Option<SignedDuration> {
        let Key::Pod(uid) = key else { return None };
        self.alive(uid).map(|ready| ready.credentials.expiration.duration_since(self.now()))
    }

    /// Tells a flight's callers what has become of it.
    fn tell(
        &self,
        state: &mut State,
        key: Key,
        landing: Completion,
        result: Result<Arc<Credentials>, Error>,
    ) {
        let Some(record) = state.records.get_mut(&key) else { return };
        // Its task is the one that tells.
        let Some(flight) = &mut record.flight else { return };
        flight.task = None;
        match (landing, result) {
            (Completion::GoesOn, Err(error)) => {
                flight.news.send_replace(News::Trouble(error));
            }
            (_, result) => {
                record.last_error = result.as_ref().err().cloned();
                record.warned &= result.is_err();
                let is_done_with = result.is_ok() && matches!(key, Key::Token(_));
                if let Some(flight) = record.flight.take() {
                    #[cfg(test)]
                    if planted(Bug::LostWakeUp) || (planted(Bug::ErrorNotTold) && result.is_err()) {
                        return std::mem::forget(flight);
                    }
                    flight.news.send_replace(News::Completed(result));
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
    fn is_under_way(&self, key: Key, number: u64) -> bool {
        let flight = self.records.get(&key).and_then(|record| record.flight.as_ref());
        flight.is_some_and(|flight| flight.is(number))
    }

    /// Serves callers of a pod whose flight has not begun from what a token has brought meanwhile.
    fn tell_who_queues(&mut self, uid: PodUid, credentials: &Arc<Credentials>) {
        #[cfg(test)]
        if planted(Bug::QueueNotTold) {
            return;
        }
        let Some(record) = self.records.get_mut(&Key::Pod(uid)) else { return };
        if let Some(flight) = record.flight.take_if(|flight| flight.task.is_none()) {
            flight.news.send_replace(News::Completed(Ok(Arc::clone(credentials))));
        }
    }

    /// Keeps what a failure means, and tells operators of those that no caller is told of, once in a row. `left` is the time
    /// for which there is something to serve.
    fn note_error(&mut self, key: Key, class: Class, error: &Error, left: Option<SignedDuration>) {
        match error.outcome() {
            Outcome::Failed(Failure::Outage) => self.outage = Some(error.clone()),
            Outcome::Failed(Failure::NoToken) => {}
            _ => self.outage = None,
        }
        let Some(record) = self.records.get_mut(&key) else { return };
        if let Error::Service(service) = error
            && service.is_about_the_token()
        {
            record.tokens.sent = None;
        }
        let pod = record.tokens.pod.as_deref().map(Pod::full_name);
        match (left.map(|left| left.as_mins()), class) {
            (Some(minutes_left), _) if !std::mem::replace(&mut record.warned, true) => {
                warn!(?key, pod.name = pod, %error, minutes_left,
                    "a pod's credentials could not be refreshed; those it has are served on, and it is tried again");
            }
            (None, Class::Prefetch) => {
                info!(?key, pod.name = pod, %error, "a pod's credentials could not be fetched before it asks");
            }
            (minutes_left, _) => {
                debug!(?key, pod.name = pod, %error, minutes_left, "a pod's credentials could not be fetched");
            }
        }
    }
}
