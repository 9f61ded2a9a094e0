//! Each pod's credentials: cached, or fetched once however many ask.
//!
//! Owns the credentials and the calls that fetch them; what is fetched when is the `plan`'s. A call belongs to the engine,
//! not to whoever asked: callers may give up, its result is kept. Its key is the pod, so a caller gets what is kept for a
//! pod by the kernel's attestation alone, or with a token that was verified here, or that EKS Auth has accepted for that very pod.
//! Never knows a request or a dialect.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use agent_common::defense::{Defense, holds};
use jiff::Timestamp;
use papaya::HashMap as ConcurrentMap;
use tokio::{sync::Notify, time::Instant as TokioInstant};

mod absent;
mod fetch;
mod in_flight;
#[cfg(test)]
pub(super) mod planted;
mod transferred;
mod trust;
mod upkeep;

#[cfg(test)]
use self::planted::{Bug, planted};
pub use self::transferred::Transferred;
use self::{
    absent::Absent,
    in_flight::{InFlight, Tokens, Waiter},
    upkeep::supervise,
};
use super::{
    Budget, Credentials, Error,
    metrics::CacheMetrics,
    scheduler::freshness::{Floor, Life},
    scheduler::{Action, Answer, FairnessKey, Key, Scheduler, TokenDigest},
    source::CredentialSource,
    token::claims::SentToken,
};
use crate::identity::{Pod, PodUid};

/// What a node allows itself: its pods at once after a start, and again every fourth of them whose answer was lost, since
/// their callers wait; one every tenth of a second in the long run.
pub const BUDGET: Budget = Budget { per_second: 10.0, burst: 320.0 };
/// Who can be served from what is cached waits no longer for something fresher.
const TIMEOUT: Duration = Duration::from_millis(400);

/// Tells the time.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The credentials of this node's pods.
pub struct CredentialCache<S> {
    source: S,
    clock: Clock,
    ready: ConcurrentMap<PodUid, Arc<Ready>>,
    /// Tokens that open what is kept for a pod.
    trusted: ConcurrentMap<TokenDigest, PodUid>,
    state: Mutex<State>,
    planned: Arc<Notify>,
    metrics: CacheMetrics,
    myself: Weak<Self>,
}

/// Credentials cached.
struct Ready {
    credentials: Arc<Credentials>,
    /// From when it was known last that there are no better ones.
    life: Life,
    /// Whether anybody has been served from them.
    asked: AtomicBool,
}

struct State {
    plan: Scheduler,
    records: HashMap<Key, Record>,
    /// What the predecessor had, until its pods are known.
    held: HashMap<PodUid, Transferred>,
    /// InFlights begun so far: their numbers.
    flights: u64,
    /// Why EKS Auth gave no answer the last time, if it has given none since.
    outage: Option<Error>,
    absent: Absent,
    /// When the pods in need were last counted.
    counted_at: Timestamp,
}

/// What is kept beside the plan.
#[derive(Default)]
struct Record {
    tokens: Tokens,
    trusted: Vec<TokenDigest>,
    flight: Option<InFlight>,
    last_error: Option<Error>,
    /// Whether operators know that what there is cannot be refreshed.
    warned: bool,
}

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// An engine with nothing in it, and the task that keeps its schedule on the current runtime. `seed` is for jitter_source
    /// that need no secrecy, and should differ between nodes.
    pub fn start(source: S, budget: Budget, clock: Clock, seed: u64, metrics: CacheMetrics) -> Arc<Self> {
        let plan = Scheduler::new(budget, seed, clock());
        let state = State {
            plan,
            records: HashMap::new(),
            held: HashMap::new(),
            flights: 0,
            outage: None,
            absent: Absent::default(),
            counted_at: Timestamp::MIN,
        };
        let engine = Arc::new_cyclic(|myself| Self {
            source,
            clock,
            ready: ConcurrentMap::new(),
            trusted: ConcurrentMap::new(),
            state: Mutex::new(state),
            planned: Arc::new(Notify::new()),
            metrics,
            myself: Weak::clone(myself),
        });
        tokio::spawn(supervise(Arc::downgrade(&engine), Arc::clone(&engine.planned)));
        engine
    }

    /// The credentials of a pod that the kernel vouches for. `sent` is the token that it sent, if any, which says that it
    /// is bound to this pod; else podgate finds one.
    ///
    /// # Errors
    /// [`Error::Slow`] at `deadline`, while the fetch goes on for whoever asks next.
    pub async fn for_pod(
        &self,
        pod: &Arc<Pod>,
        sent: Option<SentToken>,
        floor: Floor,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Error> {
        if let Some(sent) = &sent {
            let digest = sent.token.digest();
            // Where nobody can tell, the kernel's attestation is enough, and EKS Auth judges the token.
            if self.whose(&digest) != Some(pod.uid) && self.is_good(sent).await? {
                let mut state = self.lock();
                state.is_here(pod.uid)?;
                self.trust(&mut state, pod.uid, digest);
            }
        }
        self.counted(self.of_pod(pod.uid, Tokens::new(sent, Some(pod)), floor, deadline).await, floor)
    }

    /// The credentials of the pod that a token is bound to, for a caller at `address` that nobody vouches for. What the
    /// token says counts for nothing before it is verified, here or by EKS Auth.
    ///
    /// # Errors
    /// [`Error::Slow`] at `deadline`, while the fetch goes on for whoever asks next.
    pub async fn for_token(
        &self,
        sent: SentToken,
        address: IpAddr,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Error> {
        let digest = sent.token.digest();
        let mut uid = self.whose(&digest);
        if !holds(Defense::AcceptedTokens) {
            uid = sent.claims.pod;
        }
        #[cfg(test)]
        if planted(Bug::ForgedOpens) {
            uid = sent.claims.pod;
        }
        if uid.is_none() && self.is_good(&sent).await? {
            uid = sent.claims.pod;
            if let Some(uid) = uid {
                let mut state = self.lock();
                state.is_here(uid)?;
                self.trust(&mut state, uid, digest);
            }
        }
        let tokens = Tokens::new(Some(sent), None);
        let answer = if let Some(uid) = uid {
            self.of_pod(uid, tokens, Floor::Container, deadline).await
        } else {
            let fairness_key = FairnessKey::Address(address.to_canonical());
            let waiter = self.join(&mut self.lock(), Key::Token(digest), fairness_key, tokens)?;
            waiter.wait(deadline.into()).await
        };
        self.counted(answer, Floor::Container)
    }

    /// Fetches a pod's credentials before it asks.
    pub fn prefetch(&self, pod: &Arc<Pod>) {
        let mut state = self.lock();
        if state.absent.is_gone(pod.uid, TokioInstant::now()) {
            return;
        }
        self.adopt_for(&mut state, pod);
        let tokens = Tokens::new(None, Some(pod));
        state.records.entry(Key::Pod(pod.uid)).or_default().tokens.update(tokens);
        state.plan.prefetch(pod.uid, self.now());
        self.act(&mut state);
    }

    /// Counts what has little life left, however it came.
    fn counted(
        &self,
        answer: Result<Arc<Credentials>, Error>,
        floor: Floor,
    ) -> Result<Arc<Credentials>, Error> {
        if answer.as_ref().is_ok_and(|credentials| credentials.life().is_below(floor, self.now())) {
            self.metrics.below_floor.inc();
        }
        answer
    }

    async fn of_pod(
        &self,
        uid: PodUid,
        tokens: Tokens,
        floor: Floor,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Error> {
        let ready = self.ready.pin().get(&uid).cloned();
        if let Some(ready) = &ready
            && self.is_fresh(ready, floor)
        {
            if !ready.asked.load(Relaxed) && !ready.asked.swap(true, Relaxed) {
                self.first_asked(&mut self.lock(), uid);
            }
            return Ok(Arc::clone(&ready.credentials));
        }
        let until = TokioInstant::from(deadline);
        let timeout_limit = TokioInstant::now() + TIMEOUT;
        let until =
            if ready.is_some_and(|ready| self.is_alive(&ready)) { until.min(timeout_limit) } else { until };
        let joined = {
            let mut state = self.lock();
            // A flight may have completed meanwhile: the caller needs no other one.
            let ready = self.ready.pin().get(&uid).cloned();
            #[cfg(test)]
            let ready = ready.filter(|_| !planted(Bug::OneLook));
            if let Some(ready) = ready.filter(|ready| self.is_fresh(ready, floor)) {
                ready.asked.store(true, Relaxed);
                self.first_asked(&mut state, uid);
                return Ok(Arc::clone(&ready.credentials));
            }
            state.is_here(uid)?;
            self.join(&mut state, Key::Pod(uid), FairnessKey::Pod(uid), tokens)
        };
        let fetched = match joined {
            Ok(waiter) => waiter.wait(until).await,
            Err(error) => Err(error),
        };
        match (fetched, self.alive(uid)) {
            (Err(_), Some(spare)) => Ok(Arc::clone(&spare.credentials)),
            (fetched, _) => fetched,
        }
    }

    /// Joins the flight of a key, which begins if there is none.
    fn join(
        &self,
        state: &mut State,
        key: Key,
        fairness_key: FairnessKey,
        tokens: Tokens,
    ) -> Result<Waiter, Error> {
        let answer = state.plan.ask(key, fairness_key, self.now());
        if answer == Answer::Busy {
            return Err(Error::Busy);
        }
        let record = state.records.entry(key).or_default();
        record.tokens.update(tokens);
        let last_error = record.last_error.clone();
        let Answer::Joined { hope } = answer else {
            return Err(last_error.unwrap_or(Error::Slow(Duration::ZERO)));
        };
        let outage = state.outage.as_ref().filter(|_| state.plan.eks_auth_is_unavailable());
        let last_error = last_error.or_else(|| outage.map(Error::for_others));
        let waiter = record.flight.get_or_insert_default().waiter(hope, last_error);
        self.act(state);
        Ok(waiter)
    }

    /// Does what the plan says is to be done now, and lets the schedule be looked at again.
    fn act(&self, state: &mut State) {
        self.act_for_now(state);
        #[cfg(test)]
        if planted(Bug::NotifyLost) {
            return;
        }
        self.planned.notify_one();
    }

    fn act_for_now(&self, state: &mut State) {
        while let Some(action) = state.plan.next(self.now()) {
            match action {
                #[cfg(test)]
                Action::Drop(_) if planted(Bug::ExpiredOut) => {}
                Action::Drop(key) => self.drop_record(state, key),
                Action::Fetch(key, class) => {
                    state.flights += 1;
                    let record = state.records.entry(key).or_default();
                    let flight = record.flight.get_or_insert_default();
                    let Some(engine) = self.myself.upgrade() else { return };
                    let (tokens, is_second) = (record.tokens.clone(), flight.is_second());
                    flight.begin(state.flights, engine.fly(key, class, state.flights, tokens, is_second));
                }
            }
        }
        self.metrics.flights.set(i64::try_from(state.plan.flights()).unwrap_or(i64::MAX));
        self.metrics.eks_auth_unavailable.set(i64::from(state.plan.eks_auth_is_unavailable()));
    }

    /// Drops everything that is known of a key, a flight included.
    fn give_up(&self, state: &mut State, key: Key) {
        state.plan.forget(key);
        self.drop_record(state, key);
        self.act(state);
    }

    fn drop_record(&self, state: &mut State, key: Key) {
        #[cfg(test)]
        if planted(Bug::ForgetLeaves) {
            return;
        }
        let record = state.records.remove(&key).unwrap_or_default();
        let trusted = self.trusted.pin();
        for digest in &record.trusted {
            trusted.remove(digest);
        }
        if let Key::Pod(uid) = key {
            self.ready.pin().remove(&uid);
        }
    }

    fn first_asked(&self, state: &mut State, uid: PodUid) {
        state.plan.asked(Key::Pod(uid), self.now());
        self.act(state);
    }

    fn is_fresh(&self, ready: &Ready, floor: Floor) -> bool {
        #[cfg(test)]
        if planted(Bug::ExpiredOut) {
            return true;
        }
        self.now() < ready.life.good_until(floor)
    }

    fn is_alive(&self, ready: &Ready) -> bool {
        self.now() < ready.credentials.expiration
    }

    /// What there is for a pod, for want of something fresher.
    fn alive(&self, uid: PodUid) -> Option<Arc<Ready>> {
        let ready = self.ready.pin().get(&uid).cloned();
        ready.filter(|ready| self.is_alive(ready))
    }

    fn now(&self) -> Timestamp {
        (self.clock)()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> std::fmt::Debug for CredentialCache<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CredentialCache").field("pods", &self.ready.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
