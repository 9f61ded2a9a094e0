//! Each pod's credentials: cached, or fetched once however many callers ask.
//!
//! Owns the credentials and the fetches; when something is fetched is up to `scheduler`. A fetch belongs to the cache, not
//! to its callers: they may hang up, and its result is still cached. The key is the pod, so a caller gets a pod's
//! credentials by kernel attestation alone, or with a token that was verified here or accepted by EKS Auth for that very
//! pod. Never knows a request or a dialect.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use agent_common::defense::{Defense, holds};
use jiff::Timestamp;
use papaya::HashMap as ConcurrentMap;
use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::Notify, time::Instant as TokioInstant};

mod absent;
mod completing;
mod fetch;
mod in_flight;
mod outcome;
mod pod_lifecycle;
mod transferred;
mod upkeep;
mod verified_tokens;

use self::{
    absent::AbsentPods,
    in_flight::{InFlight, TokenSources, Waiter},
    outcome::without_request_id,
};
pub use super::scheduler::Budget;
use super::{
    Clock, Credentials, Error, Floor, Life, TokenDigest,
    metrics::CacheMetrics,
    scheduler::{Action, Answer, FairnessKey, Key, Scheduler},
    source::CredentialSource,
    token::claims::SentToken,
};
use crate::identity::{Pod, PodUid, ServiceAccountRef};

/// A node's calls of EKS Auth. The burst lets all its pods be fetched at once after a start, and every fourth again whose
/// answer was lost, since their callers wait; in the long run it is one call every tenth of a second.
pub const BUDGET: Budget = Budget { per_second: 10.0, burst: 320.0 };
/// A caller who can be served stale credentials waits no longer for fresher ones.
const STALE_TIMEOUT: Duration = Duration::from_millis(400);

/// The credentials of this node's pods.
pub struct CredentialCache<S> {
    source: S,
    clock: Clock,
    ready: ConcurrentMap<PodUid, Arc<Ready>>,
    /// Verified tokens, and the pod whose credentials each of them gives access to.
    trusted: ConcurrentMap<TokenDigest, PodUid>,
    state: Mutex<State>,
    schedule_changed: Arc<Notify>,
    metrics: CacheMetrics,
    weak_self: Weak<Self>,
}

/// A pod's credentials, and what was planned for them, on their way from one agent of the node to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transferred {
    /// The pod.
    pub pod: PodUid,
    /// The service account that they are for.
    pub service_account: ServiceAccountRef,
    /// The credentials.
    pub credentials: Arc<Credentials>,
    /// When to refresh them, if they are used.
    pub refresh_at: Timestamp,
    /// Whether they are used.
    pub asked: bool,
}

/// Cached credentials.
struct Ready {
    credentials: Arc<Credentials>,
    /// Counts from the last fetch, even where that brought nothing better.
    life: Life,
    /// Whether they have been served.
    asked: AtomicBool,
}

struct State {
    scheduler: Scheduler,
    records: HashMap<Key, Record>,
    /// What the predecessor had, until its pods are known.
    staged: HashMap<PodUid, Transferred>,
    /// Fetches started so far; each has its number.
    fetches_begun: u64,
    /// The last error of EKS Auth, while it gives no answer.
    outage: Option<Error>,
    absent: AbsentPods,
    /// When failing pods were last counted.
    counted_at: Timestamp,
}

/// What is known of a key, other than its schedule.
#[derive(Default)]
struct Record {
    tokens: TokenSources,
    trusted: Vec<TokenDigest>,
    in_flight: Option<InFlight>,
    last_error: Option<Error>,
    /// Whether operators were told that the cached credentials cannot be refreshed.
    warned: bool,
}

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// The credentials of a kernel-attested pod. `sent` is the token that it sent, if any, whose claims name this pod;
    /// otherwise podgate obtains one.
    ///
    /// # Errors
    /// [`Error::Slow`] at `deadline`; the fetch continues for the next caller.
    pub async fn for_pod(
        &self,
        pod: &Arc<Pod>,
        sent: Option<SentToken>,
        floor: Floor,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Error> {
        if let Some(sent) = &sent {
            let digest = sent.token.digest();
            // Where the keys are unavailable, attestation is enough, and EKS Auth judges the token.
            if self.pod_of_token(&digest) != Some(pod.uid) && self.is_verified(sent).await? {
                let mut state = self.lock();
                state.ensure_present(pod.uid)?;
                self.trust(&mut state, pod.uid, digest);
            }
        }
        self.count_below_floor(
            self.get_or_fetch(pod.uid, TokenSources::new(sent, Some(pod)), floor, deadline).await,
            floor,
        )
    }

    /// The credentials of the pod that a token is bound to, for an anonymous caller at `address`. The claims count for
    /// nothing until the token is verified, here or by EKS Auth.
    ///
    /// # Errors
    /// [`Error::Slow`] at `deadline`; the fetch continues for the next caller.
    pub async fn for_token(
        &self,
        sent: SentToken,
        address: IpAddr,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Error> {
        let digest = sent.token.digest();
        let mut uid = self.pod_of_token(&digest);
        if !holds(Defense::AcceptedTokens) {
            uid = sent.claims.pod;
        }
        if uid.is_none() && self.is_verified(&sent).await? {
            uid = sent.claims.pod;
            if let Some(uid) = uid {
                let mut state = self.lock();
                state.ensure_present(uid)?;
                self.trust(&mut state, uid, digest);
            }
        }
        let tokens = TokenSources::new(Some(sent), None);
        let answer = if let Some(uid) = uid {
            self.get_or_fetch(uid, tokens, Floor::Container, deadline).await
        } else {
            let fairness_key = FairnessKey::Address(address.to_canonical());
            let waiter = self.join(&mut self.lock(), Key::Token(digest), fairness_key, tokens)?;
            waiter.wait(deadline.into()).await
        };
        self.count_below_floor(answer, Floor::Container)
    }

    /// Fetches a pod's credentials before it asks.
    pub fn prefetch(&self, pod: &Arc<Pod>) {
        let mut state = self.lock();
        if state.absent.is_removed(pod.uid, TokioInstant::now()) {
            return;
        }
        self.adopt_for(&mut state, pod);
        let tokens = TokenSources::new(None, Some(pod));
        state.records.entry(Key::Pod(pod.uid)).or_default().tokens.update(tokens);
        state.scheduler.prefetch(pod.uid, self.now());
        self.apply_schedule(&mut state);
    }

    /// Counts an answer whose credentials are below the floor, wherever they came from.
    fn count_below_floor(
        &self,
        answer: Result<Arc<Credentials>, Error>,
        floor: Floor,
    ) -> Result<Arc<Credentials>, Error> {
        if answer.as_ref().is_ok_and(|credentials| credentials.life().is_below(floor, self.now())) {
            self.metrics.below_floor.inc();
        }
        answer
    }

    async fn get_or_fetch(
        &self,
        uid: PodUid,
        tokens: TokenSources,
        floor: Floor,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Error> {
        let ready = self.ready.pin().get(&uid).cloned();
        if let Some(ready) = &ready
            && self.is_fresh(ready, floor)
        {
            if !ready.asked.load(Relaxed) && !ready.asked.swap(true, Relaxed) {
                self.on_first_use(&mut self.lock(), uid);
            }
            return Ok(Arc::clone(&ready.credentials));
        }
        let until = TokioInstant::from(deadline);
        let stale_until = TokioInstant::now() + STALE_TIMEOUT;
        let until =
            if ready.is_some_and(|ready| self.is_unexpired(&ready)) { until.min(stale_until) } else { until };
        let joined = {
            let mut state = self.lock();
            // A fetch may have completed meanwhile: this caller needs no second one.
            let ready = self.ready.pin().get(&uid).cloned();
            if let Some(ready) = ready.filter(|ready| self.is_fresh(ready, floor)) {
                ready.asked.store(true, Relaxed);
                self.on_first_use(&mut state, uid);
                return Ok(Arc::clone(&ready.credentials));
            }
            state.ensure_present(uid)?;
            self.join(&mut state, Key::Pod(uid), FairnessKey::Pod(uid), tokens)
        };
        let fetched = match joined {
            Ok(waiter) => waiter.wait(until).await,
            Err(error) => Err(error),
        };
        match (fetched, self.unexpired(uid)) {
            (Err(_), Some(stale)) => Ok(Arc::clone(&stale.credentials)),
            (fetched, _) => fetched,
        }
    }

    /// Joins the fetch of a key, which is started if there is none.
    fn join(
        &self,
        state: &mut State,
        key: Key,
        fairness_key: FairnessKey,
        tokens: TokenSources,
    ) -> Result<Waiter, Error> {
        let answer = state.scheduler.ask(key, fairness_key, self.now());
        if answer == Answer::Busy {
            return Err(Error::Busy);
        }
        let record = state.records.entry(key).or_default();
        record.tokens.update(tokens);
        let last_error = record.last_error.clone();
        let Answer::Joined { likely } = answer else {
            return Err(last_error.unwrap_or(Error::Slow(Duration::ZERO)));
        };
        let outage = state.outage.as_ref().filter(|_| state.scheduler.eks_auth_is_unavailable());
        let last_error = last_error.or_else(|| outage.map(without_request_id));
        let waiter = record.in_flight.get_or_insert_default().waiter(likely, last_error);
        self.apply_schedule(state);
        Ok(waiter)
    }

    /// Does what the scheduler says is due, and wakes the upkeep task to look at the schedule again.
    fn apply_schedule(&self, state: &mut State) {
        self.apply_due(state);
        self.schedule_changed.notify_one();
    }

    fn apply_due(&self, state: &mut State) {
        while let Some(action) = state.scheduler.next(self.now()) {
            match action {
                Action::Evict(key) => self.evict(state, key),
                Action::Fetch(key, priority) => {
                    state.fetches_begun += 1;
                    let record = state.records.entry(key).or_default();
                    let in_flight = record.in_flight.get_or_insert_default();
                    let Some(cache) = self.weak_self.upgrade() else { return };
                    let (tokens, is_retry) = (record.tokens.clone(), in_flight.is_retry());
                    in_flight.begin(
                        state.fetches_begun,
                        cache.run_fetch(key, priority, state.fetches_begun, tokens, is_retry),
                    );
                }
            }
        }
        self.metrics.in_flight.set(i64::try_from(state.scheduler.in_flight()).unwrap_or(i64::MAX));
        self.metrics.eks_auth_unavailable.set(i64::from(state.scheduler.eks_auth_is_unavailable()));
    }

    /// Removes a key altogether, and aborts its fetch.
    fn cancel(&self, state: &mut State, key: Key) {
        state.scheduler.remove(key);
        self.evict(state, key);
        self.apply_schedule(state);
    }

    fn evict(&self, state: &mut State, key: Key) {
        let record = state.records.remove(&key).unwrap_or_default();
        let trusted = self.trusted.pin();
        for digest in &record.trusted {
            trusted.remove(digest);
        }
        if let Key::Pod(uid) = key {
            self.ready.pin().remove(&uid);
        }
    }

    fn on_first_use(&self, state: &mut State, uid: PodUid) {
        state.scheduler.asked(Key::Pod(uid), self.now());
        self.apply_schedule(state);
    }

    fn is_fresh(&self, ready: &Ready, floor: Floor) -> bool {
        self.now() < ready.life.fresh_until(floor)
    }

    fn is_unexpired(&self, ready: &Ready) -> bool {
        self.now() < ready.credentials.expiration
    }

    /// The cached credentials of a pod, fresh or stale.
    fn unexpired(&self, uid: PodUid) -> Option<Arc<Ready>> {
        let ready = self.ready.pin().get(&uid).cloned();
        ready.filter(|ready| self.is_unexpired(ready))
    }

    fn now(&self) -> Timestamp {
        (self.clock)()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl<S> std::fmt::Debug for CredentialCache<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CredentialCache").field("pods", &self.ready.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
