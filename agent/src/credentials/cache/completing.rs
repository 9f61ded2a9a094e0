//! Runs one fetch, and delivers its result: to the cache, to the scheduler, and to its waiters.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::AtomicBool},
};

use futures::FutureExt as _;
use jiff::SignedDuration;
use tracing::{debug, error, info, warn};

use super::{
    CredentialCache, Ready, State,
    fetch::{Accepted, Fetched},
    in_flight::{Progress, TokenSources},
    outcome::outcome,
};
use crate::{
    credentials::{
        Credentials, Error, Life, TokenDigest,
        scheduler::{Completion, Failure, Key, Outcome, Priority},
        source::CredentialSource,
    },
    identity::{Pod, PodUid},
};

/// The result of a fetch, as callers see it from now on.
struct Received {
    credentials: Arc<Credentials>,
    life: Life,
    /// The pod to cache them for.
    uid: Option<PodUid>,
    /// The token that gives access to them.
    token: Option<TokenDigest>,
}

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// Runs a fetch from start to end.
    pub(super) async fn run_fetch(
        self: Arc<Self>,
        key: Key,
        priority: Priority,
        number: u64,
        tokens: TokenSources,
        is_retry: bool,
    ) {
        let fetched = AssertUnwindSafe(self.fetch(key, number, &tokens, is_retry)).catch_unwind().await;
        let bug = |_| Err(Error::BadAnswer { reason: "BUG: the call has panicked".to_owned() });
        let fetched = fetched.unwrap_or_else(bug);
        let completed = catch_unwind(AssertUnwindSafe(|| self.complete(key, priority, number, fetched)));
        if completed.is_err() {
            error!(?key, "BUG: completing a fetch panicked; the pod's entry is removed");
            self.cancel(&mut self.lock(), key);
        }
    }

    /// Gives up the slot of a fetch whose token takes long.
    pub(super) fn release_slot(&self, key: Key, number: u64) {
        let mut state = self.lock();
        if state.is_running(key, number) {
            state.scheduler.awaits_token(key, self.now());
            self.apply_schedule(&mut state);
        }
    }

    fn complete(&self, key: Key, priority: Priority, number: u64, fetched: Result<Fetched, Error>) {
        let mut guard = self.lock();
        let state = &mut *guard;
        if !state.is_running(key, number) {
            return;
        }
        let (outcome, result) = match fetched {
            Ok(Fetched::Token) => {
                state.scheduler.completed(key, Outcome::HasToken, self.now());
                if let Some(in_flight) =
                    state.records.get_mut(&key).and_then(|record| record.in_flight.as_mut())
                {
                    in_flight.task = None;
                }
                return self.apply_schedule(state);
            }
            Ok(Fetched::TokenRefused(error)) => {
                let completion = state.scheduler.completed(key, Outcome::TokenRefused, self.now());
                if let Some(in_flight) =
                    state.records.get_mut(&key).and_then(|record| record.in_flight.as_mut())
                {
                    in_flight.token_refused = true;
                }
                state.outage = None;
                self.notify_waiters(state, key, completion, Err(Error::Service(error)));
                return self.apply_schedule(state);
            }
            Ok(Fetched::Credentials { credentials, accepted }) => {
                let received = self.received(key, credentials, accepted);
                (Outcome::Received(received.life), Ok(received))
            }
            Err(error) => (outcome(&error), Err(error)),
        };
        self.metrics.fetched(priority, result.as_ref().err());
        let completion = state.scheduler.completed(key, outcome, self.now());
        let result = match result {
            Ok(received) => {
                state.outage = None;
                Ok(self.store(state, key, received))
            }
            Err(error) => {
                state.note_error(key, priority, &error, self.remaining_life(key));
                Err(error)
            }
        };
        self.notify_waiters(state, key, completion, result);
        self.apply_schedule(state);
    }

    fn received(&self, key: Key, credentials: Arc<Credentials>, accepted: Option<Accepted>) -> Received {
        let uid = match key {
            Key::Pod(uid) => Some(uid),
            // EKS Auth has accepted the token, and with it the claim that names the pod.
            Key::Token(_) => accepted.and_then(|accepted| accepted.pod),
        };
        let obtained_at = credentials.obtained_at;
        let cached = uid.and_then(|uid| self.unexpired(uid)).map(|ready| Arc::clone(&ready.credentials));
        // Credentials that live longer stay, unless the pod's role has changed.
        let cached = cached
            .filter(|cached| cached.role == credentials.role && cached.expiration > credentials.expiration);
        let credentials = cached.unwrap_or(credentials);
        let life = Life { obtained_at, expiration: credentials.expiration };
        Received { credentials, life, uid, token: accepted.map(|accepted| accepted.token) }
    }

    /// Caches the result of a fetch.
    fn store(&self, state: &mut State, key: Key, received: Received) -> Arc<Credentials> {
        let Received { credentials, life, uid, token } = received;
        let Some(uid) = uid.filter(|uid| state.ensure_present(*uid).is_ok()) else { return credentials };
        if let Some(digest) = token {
            self.trust(state, uid, digest);
        }
        if key != Key::Pod(uid) {
            state.scheduler.on_credentials(uid, life, self.now());
        }
        self.publish(uid, &credentials, life);
        if key != Key::Pod(uid) {
            state.notify_queued(uid, &credentials);
        }
        credentials
    }

    pub(super) fn publish(&self, uid: PodUid, credentials: &Arc<Credentials>, life: Life) {
        let ready = Ready { credentials: Arc::clone(credentials), life, asked: AtomicBool::new(false) };
        self.ready.pin().insert(uid, Arc::new(ready));
    }

    /// How long the cached credentials can still be served.
    fn remaining_life(&self, key: Key) -> Option<SignedDuration> {
        let Key::Pod(uid) = key else { return None };
        self.unexpired(uid).map(|ready| ready.credentials.expiration.duration_since(self.now()))
    }

    /// Tells the waiters of a fetch how it stands.
    fn notify_waiters(
        &self,
        state: &mut State,
        key: Key,
        completion: Completion,
        result: Result<Arc<Credentials>, Error>,
    ) {
        let Some(record) = state.records.get_mut(&key) else { return };
        // The task itself is running this: it must not be aborted.
        let Some(in_flight) = &mut record.in_flight else { return };
        in_flight.task = None;
        match (completion, result) {
            (Completion::Retrying, Err(error)) => {
                in_flight.progress.send_replace(Progress::Retrying(error));
            }
            (_, result) => {
                record.last_error = result.as_ref().err().cloned();
                record.warned &= result.is_err();
                let is_finished = result.is_ok() && matches!(key, Key::Token(_));
                if let Some(in_flight) = record.in_flight.take() {
                    in_flight.progress.send_replace(Progress::Completed(result));
                }
                if is_finished {
                    state.scheduler.remove(key);
                    self.evict(state, key);
                }
            }
        }
    }
}

impl State {
    fn is_running(&self, key: Key, number: u64) -> bool {
        let in_flight = self.records.get(&key).and_then(|record| record.in_flight.as_ref());
        in_flight.is_some_and(|in_flight| in_flight.is_running(number))
    }

    /// Serves the waiters of a queued fetch with credentials that a token has brought meanwhile.
    fn notify_queued(&mut self, uid: PodUid, credentials: &Arc<Credentials>) {
        let Some(record) = self.records.get_mut(&Key::Pod(uid)) else { return };
        if let Some(in_flight) = record.in_flight.take_if(|in_flight| in_flight.task.is_none()) {
            in_flight.progress.send_replace(Progress::Completed(Ok(Arc::clone(credentials))));
        }
    }

    /// Records an error. Operators are told once in a row of those that no caller sees, because there are still credentials
    /// to serve, for `remaining`.
    fn note_error(&mut self, key: Key, priority: Priority, error: &Error, remaining: Option<SignedDuration>) {
        match outcome(error) {
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
        let pod = record.tokens.pod().map(Pod::full_name);
        match (remaining.map(|remaining| remaining.as_mins()), priority) {
            (Some(minutes_left), _) if !std::mem::replace(&mut record.warned, true) => {
                warn!(?key, pod.name = pod, %error, minutes_left,
                    "cannot refresh a pod's credentials; serving the cached ones, and retrying");
            }
            (None, Priority::Prefetch) => {
                info!(?key, pod.name = pod, %error, "cannot prefetch a pod's credentials");
            }
            (minutes_left, _) => {
                debug!(?key, pod.name = pod, %error, minutes_left, "cannot fetch a pod's credentials");
            }
        }
    }
}
