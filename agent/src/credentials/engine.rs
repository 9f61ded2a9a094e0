//! Each pod's credentials: at hand, or fetched once however many ask.
//!
//! Owns the credentials and the calls that fetch them; what is fetched when is the `plan`'s. A call belongs to the engine,
//! not to whoever asked: callers may give up, its result is kept. Its key is the pod, so a caller gets what is kept for a
//! pod by the kernel's word alone, or with a token that was verified here, or that EKS Auth has accepted for that very pod.
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

use agent_common::defence::{Defence, holds};
use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use jiff::{SignedDuration, Timestamp};
use papaya::HashMap as ConcurrentMap;
use tokio::{
    sync::Notify,
    time::{Instant as TokioInstant, sleep},
};

mod flight;
mod handed_over;
#[cfg(test)]
pub(super) mod planted;

use self::flight::{Flight, Tokens, Waiter};
pub use self::handed_over::HandedOver;
#[cfg(test)]
use self::planted::{Bug, planted};
use super::{
    Budget, Credentials, Error,
    issuer::Verdict,
    jwt::SentToken,
    metrics::EngineMetrics,
    plan::{Action, Answer, Key, Payer, Plan, TokenDigest},
    schedule::Floor,
    source::CredentialSource,
};
use crate::{
    identity::{Pod, PodUid},
    secret::Secret,
};

/// What a node allows itself: its pods at once after a start, one every tenth of a second in the long run.
pub const BUDGET: Budget = Budget { per_second: 10.0, burst: 256.0 };
/// Who can be served from what is at hand waits no longer for something fresher.
const PATIENCE: Duration = Duration::from_millis(400);
/// Longest sleep: the clock may be set meanwhile.
const SLEEP_MAX: Duration = Duration::from_mins(1);
/// A pod's tokens that are remembered: it has one, and a new one every 19 hours.
const TOKENS_REMEMBERED: usize = 4;

/// Tells the time.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// The credentials of this node's pods.
pub struct Engine<S> {
    source: S,
    clock: Clock,
    ready: ConcurrentMap<PodUid, Arc<Ready>>,
    /// Tokens that open what is kept for a pod.
    trusted: ConcurrentMap<TokenDigest, PodUid>,
    state: Mutex<State>,
    planned: Arc<Notify>,
    metrics: EngineMetrics,
    myself: Weak<Self>,
}

/// Credentials at hand.
struct Ready {
    credentials: Arc<Credentials>,
    /// Whether anybody has been served from them.
    asked: AtomicBool,
}

struct State {
    plan: Plan,
    records: HashMap<Key, Record>,
    /// What the agent before this one had, until its pods are known.
    held: HashMap<PodUid, HandedOver>,
    /// Flights begun so far: their numbers.
    flights: u64,
    /// Why EKS Auth gave no answer the last time.
    outage: Option<Error>,
}

/// What is kept beside the plan.
#[derive(Default)]
struct Record {
    tokens: Tokens,
    trusted: Vec<TokenDigest>,
    flight: Option<Flight>,
    last_error: Option<Error>,
}

// === impl Engine ===

impl<S: CredentialSource> Engine<S> {
    /// An engine with nothing in it, and the task that keeps its schedule on the current runtime. `seed` is for chances
    /// that need no secrecy, and should differ between nodes.
    pub fn start(source: S, budget: Budget, clock: Clock, seed: u64, metrics: EngineMetrics) -> Arc<Self> {
        let plan = Plan::new(budget, seed, clock());
        let state = State { plan, records: HashMap::new(), held: HashMap::new(), flights: 0, outage: None };
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
        tokio::spawn(keep_schedule(Arc::downgrade(&engine), Arc::clone(&engine.planned)));
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
            let digest = fingerprint(&sent.token);
            // Where nobody can tell, the kernel's word is enough, and EKS Auth judges the token.
            if self.whose(&digest) != Some(pod.uid) && self.is_good(sent).await? {
                self.trust(&mut self.lock(), pod.uid, digest);
            }
        }
        self.of_pod(pod.uid, Tokens::new(sent, Some(pod)), floor, deadline).await
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
        let digest = fingerprint(&sent.token);
        let mut uid = self.whose(&digest);
        if !holds(Defence::AcceptedTokens) {
            uid = sent.claims.pod;
        }
        if uid.is_none() && self.is_good(&sent).await? {
            uid = sent.claims.pod;
            if let Some(uid) = uid {
                self.trust(&mut self.lock(), uid, digest);
            }
        }
        let tokens = Tokens::new(Some(sent), None);
        if let Some(uid) = uid {
            return self.of_pod(uid, tokens, Floor::Container, deadline).await;
        }
        let waiter = self.join(&mut self.lock(), Key::Token(digest), Payer::Address(address), tokens)?;
        waiter.wait(deadline.into()).await
    }

    /// Fetches a pod's credentials before it asks.
    pub fn prefetch(&self, pod: &Arc<Pod>) {
        let mut state = self.lock();
        self.adopt_for(&mut state, pod);
        let tokens = Tokens::new(None, Some(pod));
        state.records.entry(Key::Pod(pod.uid)).or_default().tokens.update(tokens);
        state.plan.prefetch(pod.uid, self.now());
        self.act(&mut state);
    }

    /// Drops everything about a pod that is gone, a fetch under way included.
    pub async fn forget(&self, uid: PodUid) {
        {
            let mut state = self.lock();
            state.held.remove(&uid);
            state.plan.forget(Key::Pod(uid));
            self.drop_record(&mut state, Key::Pod(uid));
            self.act(&mut state);
        }
        self.source.forget(uid).await;
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
        let patience = TokioInstant::now() + PATIENCE;
        let until =
            if ready.is_some_and(|ready| self.is_alive(&ready)) { until.min(patience) } else { until };
        let joined = {
            let mut state = self.lock();
            // A flight may have landed meanwhile: the caller needs no other one.
            let ready = self.ready.pin().get(&uid).cloned();
            if let Some(ready) = ready.filter(|ready| self.is_fresh(ready, floor)) {
                ready.asked.store(true, Relaxed);
                self.first_asked(&mut state, uid);
                return Ok(Arc::clone(&ready.credentials));
            }
            self.join(&mut state, Key::Pod(uid), Payer::Pod(uid), tokens)
        };
        let fetched = match joined {
            Ok(waiter) => waiter.wait(until).await,
            Err(error) => Err(error),
        };
        let spare = self.ready.pin().get(&uid).cloned();
        match (fetched, spare.filter(|ready| self.is_alive(ready))) {
            (Err(_), Some(spare)) => {
                self.metrics.below_floor.inc();
                Ok(Arc::clone(&spare.credentials))
            }
            (fetched, _) => fetched,
        }
    }

    /// Joins the flight of a key, which begins if there is none.
    fn join(&self, state: &mut State, key: Key, payer: Payer, tokens: Tokens) -> Result<Waiter, Error> {
        let answer = state.plan.ask(key, payer, self.now());
        if answer == Answer::Busy {
            return Err(Error::Busy);
        }
        let record = state.records.entry(key).or_default();
        record.tokens.update(tokens);
        let last_error = record.last_error.clone();
        let Answer::Joined { hope } = answer else {
            return Err(last_error.unwrap_or(Error::Slow(Duration::ZERO)));
        };
        let last_error = last_error.or_else(|| state.outage.clone());
        let waiter = record.flight.get_or_insert_default().waiter(hope, last_error);
        self.act(state);
        Ok(waiter)
    }

    /// Does what the plan says is to be done now, and lets the schedule be looked at again.
    fn act(&self, state: &mut State) {
        self.act_for_now(state);
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
                    flight.begin(state.flights, engine.fly(key, class, state.flights, record.tokens.clone()));
                }
            }
        }
        self.metrics.flights.set(i64::try_from(state.plan.flights()).unwrap_or(i64::MAX));
        self.metrics.service_away.set(i64::from(state.plan.service_is_away()));
    }

    /// Does what is due, and tells how long there is nothing to do.
    fn act_when_due(&self) -> Duration {
        let mut state = self.lock();
        self.act_for_now(&mut state);
        state.plan.wake_at().map_or(SLEEP_MAX, |at| {
            let left = at.duration_since(self.now()).max(SignedDuration::ZERO);
            left.unsigned_abs().min(SLEEP_MAX)
        })
    }

    fn drop_record(&self, state: &mut State, key: Key) {
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

    /// Whether a token is good; `false` where nobody can tell.
    ///
    /// # Errors
    /// [`Error::BadToken`] when it is known to be bad.
    pub async fn is_good(&self, sent: &SentToken) -> Result<bool, Error> {
        match self.source.judge(&sent.token, &sent.claims).await {
            Verdict::Good => Ok(true),
            Verdict::Unknown => Ok(false),
            Verdict::Bad(_) if !holds(Defence::AcceptedTokens) => Ok(false),
            Verdict::Bad(reason) => Err(Error::BadToken { reason }),
        }
    }

    fn whose(&self, digest: &TokenDigest) -> Option<PodUid> {
        self.trusted.pin().get(digest).copied()
    }

    /// From now on the token opens what is kept for the pod.
    fn trust(&self, state: &mut State, uid: PodUid, digest: TokenDigest) {
        let remembered = &mut state.records.entry(Key::Pod(uid)).or_default().trusted;
        let trusted = self.trusted.pin();
        if trusted.insert(digest, uid).is_none() {
            remembered.push(digest);
        }
        if remembered.len() > TOKENS_REMEMBERED {
            trusted.remove(&remembered.remove(0));
        }
    }

    fn is_fresh(&self, ready: &Ready, floor: Floor) -> bool {
        #[cfg(test)]
        if planted(Bug::ExpiredOut) {
            return true;
        }
        self.now() < ready.credentials.life().good_until(floor)
    }

    fn is_alive(&self, ready: &Ready) -> bool {
        self.now() < ready.credentials.expiration
    }

    fn now(&self) -> Timestamp {
        (self.clock)()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S> std::fmt::Debug for Engine<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("pods", &self.ready.len()).finish_non_exhaustive()
    }
}

/// Does what is due when it is due, for as long as there is an engine.
async fn keep_schedule<S: CredentialSource>(engine: Weak<Engine<S>>, planned: Arc<Notify>) {
    loop {
        let Some(engine) = engine.upgrade() else { return };
        let until = engine.act_when_due();
        drop(engine);
        tokio::select! {
            () = sleep(until) => {}
            () = planned.notified() => {}
        }
    }
}

fn fingerprint(token: &Secret) -> TokenDigest {
    let mut fingerprint = [0; SHA256_OUTPUT_LEN];
    fingerprint.copy_from_slice(digest(&SHA256, token.expose().as_bytes()).as_ref());
    fingerprint
}

#[cfg(test)]
mod tests;
