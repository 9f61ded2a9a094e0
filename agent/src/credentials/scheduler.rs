//! Decides what is fetched when, and in which order.
//!
//! Owns the schedule of every key. Pure: it is told what happened and what time it is; it never waits, makes no calls,
//! reads no clock, and draws jitter from a seed. Knows neither the cache nor where tokens come from.

use std::{
    collections::{HashMap, hash_map},
    time::Duration,
};

use jiff::{SignedDuration, Timestamp};

use super::freshness::{Floor, Life};
use crate::identity::PodUid;

mod anonymous;
mod backoff;
mod circuit;
mod completion;
mod entry;
mod key;
mod queue;
mod rate_limit;
mod timers;
mod transitions;

pub use self::rate_limit::Budget;
use self::{
    anonymous::AnonymousCallers,
    circuit::Circuit,
    entry::{Entry, Phase},
    queue::Queue,
    rate_limit::RateLimit,
    timers::{JitterSource, Timers},
};
pub(crate) use self::{
    backoff::Failure,
    key::{FairnessKey, Key, Priority},
};

/// Clocks of two threads differ by less; a larger step back means that the clock was set.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_secs(1);

/// What a caller can expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A fetch is running or queued. Unless `likely`, it will take longer than a caller waits.
    Joined { likely: bool },
    /// The last failure was too recent to try again.
    Refused,
    /// Too many anonymous callers at the same address.
    Busy,
}

/// What the cache must do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Fetch(Key, Priority),
    /// The key has nothing left to serve, and nobody asks.
    Evict(Key),
}

/// How a fetch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Received(Life),
    /// EKS Auth throttled it, perhaps with a `Retry-After`.
    Throttled(Option<Duration>),
    Failed(Failure),
    /// No call was made yet, but the token that it was waiting for has arrived.
    HasToken,
    /// EKS Auth refused the token, and there may be another one.
    TokenRefused,
}

/// Whether a fetch is over for its callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completion {
    Done,
    /// It will be tried again at once, or as soon as the rate limit allows; callers may keep waiting.
    Retrying,
}

/// The schedule of all keys.
#[derive(Debug)]
pub(crate) struct Scheduler {
    entries: HashMap<Key, Entry>,
    queue: Queue,
    timers: Timers,
    /// Fetches that are queued or running.
    in_flight: usize,
    /// Those of them that hold a slot, and may be calling EKS Auth.
    calling: usize,
    rate_limit: RateLimit,
    circuit: Circuit,
    anonymous: AnonymousCallers,
    /// When the next pod without a token may try again.
    token_turn: Timestamp,
    now: Timestamp,
    jitter_source: JitterSource,
}

// === impl Scheduler ===

impl Scheduler {
    pub(crate) fn new(budget: Budget, seed: u64, now: Timestamp) -> Self {
        Self {
            entries: HashMap::new(),
            queue: Queue::default(),
            timers: Timers::default(),
            in_flight: 0,
            calling: 0,
            rate_limit: RateLimit::new(budget, now),
            circuit: Circuit::new(),
            anonymous: AnonymousCallers::default(),
            token_turn: now,
            now,
            jitter_source: JitterSource::new(seed),
        }
    }

    /// A caller asks, and nothing fresh enough is cached.
    pub(crate) fn ask(&mut self, key: Key, fairness_key: FairnessKey, now: Timestamp) -> Answer {
        let now = self.tick(now);
        let known = self.entries.get(&key);
        let (is_known, fairness_key) =
            (known.is_some(), known.map_or(fairness_key, |entry| entry.fairness_key));
        if let (Key::Token(digest), FairnessKey::Address(address)) = (key, fairness_key)
            && self.is_idle(key)
            && !self.admit(address, digest, now)
        {
            return if is_known { Answer::Refused } else { Answer::Busy };
        }
        let entry = self.entries.entry(key).or_insert_with(|| Entry::new(fairness_key, now));
        entry.asked = true;
        if std::mem::take(&mut entry.prefetch) {
            // It failed before anybody asked: that does not count.
            entry.failed = None;
        }
        if let (Phase::Idle, Some(failed)) = (entry.phase, entry.failed)
            && now < failed.until
        {
            return Answer::Refused;
        }
        entry.waits = true;
        let keeps_failing =
            entry.failed.is_some_and(|failed| failed.failure == Failure::Outage && failed.times >= 2);
        match entry.phase {
            Phase::Idle => self.enqueue(key, Priority::Foreground, now),
            Phase::Queued(position) if position.priority != Priority::Foreground => {
                self.promote(key, position, now);
            }
            Phase::Queued(_) | Phase::Delayed(_) | Phase::Running(..) | Phase::AwaitingToken(_) => {}
        }
        // A caller who comes when a probe is due waits for its result.
        let may_answer = self.circuit.probe_at().is_none_or(|probe_at| now >= probe_at);
        Answer::Joined { likely: !keeps_failing && may_answer }
    }

    /// The cached credentials were served for the first time.
    pub(crate) fn asked(&mut self, key: Key, now: Timestamp) {
        let now = self.tick(now);
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.asked = true;
        let has_lapsed = entry.life.is_some() && entry.failed.is_none() && now >= entry.refresh_at;
        if has_lapsed && matches!(entry.phase, Phase::Idle) {
            self.enqueue(key, Priority::Refresh, now);
        }
    }

    /// A pod is expected to ask.
    pub(crate) fn prefetch(&mut self, uid: PodUid, now: Timestamp) {
        let now = self.tick(now);
        let key = Key::Pod(uid);
        if let hash_map::Entry::Vacant(vacant) = self.entries.entry(key) {
            vacant.insert(Entry { prefetch: true, ..Entry::new(FairnessKey::Pod(uid), now) });
            self.enqueue(key, Priority::Prefetch, now);
        }
    }

    /// A pod's credentials were obtained in another way: with a token that EKS Auth has accepted. A fetch that has not
    /// started is no longer needed.
    pub(crate) fn on_credentials(&mut self, uid: PodUid, life: Life, now: Timestamp) {
        let now = self.tick(now);
        let key = Key::Pod(uid);
        let entry = self.entries.entry(key).or_insert_with(|| Entry::new(FairnessKey::Pod(uid), now));
        (entry.failed, entry.lost) = (None, 0);
        if let Phase::Queued(position) | Phase::Delayed(position) = entry.phase {
            entry.waits = false;
            self.queue.remove(position);
            self.set_phase(key, Phase::Idle);
        }
        self.schedule_refresh(key, life, true);
    }

    /// A pod's credentials were inherited from the predecessor, along with their schedule.
    pub(crate) fn adopt(
        &mut self,
        uid: PodUid,
        life: Life,
        refresh_at: Timestamp,
        asked: bool,
        now: Timestamp,
    ) {
        let now = self.tick(now);
        let key = Key::Pod(uid);
        self.entries.entry(key).or_insert_with(|| Entry::new(FairnessKey::Pod(uid), now));
        // Never later than this agent would refresh them.
        self.schedule_refresh_at(key, life, refresh_at.min(life.refresh_at(1.0)), asked);
    }

    /// When a pod's credentials are to be refreshed, and whether they are used.
    pub(crate) fn refresh_state(&self, uid: PodUid) -> Option<(Timestamp, bool)> {
        self.entries.get(&Key::Pod(uid)).map(|entry| (entry.refresh_at, entry.asked))
    }

    /// What must be done now. To be called until it returns `None`.
    pub(crate) fn next(&mut self, now: Timestamp) -> Option<Action> {
        let now = self.tick(now);
        while let Some(key) = self.timers.pop_due(now) {
            if self.on_timer(key, now) {
                self.remove(key);
                return Some(Action::Evict(key));
            }
        }
        let priority = self.queue.first()?;
        if self.calling >= self.circuit.limit() || !self.may_call(priority, now) {
            return None;
        }
        let (position, key) = self.queue.pop()?;
        self.set_timer(key, None);
        let fairness_key = self.entry(key).fairness_key;
        self.circuit.called(fairness_key);
        self.set_phase(key, Phase::Running(position, now));
        self.calling += 1;
        Some(Action::Fetch(key, position.priority))
    }

    /// When to call `next` again, if nothing happens before.
    pub(crate) fn wake_at(&self) -> Option<Timestamp> {
        let priority = self.queue.first().filter(|_| self.calling < self.circuit.limit());
        let call = priority.map(|priority| {
            self.circuit
                .probe_at()
                .unwrap_or_else(|| self.rate_limit.ready_at(priority != Priority::Foreground))
        });
        [self.timers.next_at(), call].into_iter().flatten().min()
    }

    /// The pod was removed, or the token is no longer needed.
    pub(crate) fn remove(&mut self, key: Key) {
        self.set_timer(key, None);
        let Some(Entry { phase, fairness_key, .. }) = self.entries.remove(&key) else { return };
        match (key, fairness_key) {
            (Key::Token(digest), FairnessKey::Address(address)) => {
                self.anonymous.remove_token(address, &digest);
            }
            _ => self.circuit.remove(fairness_key),
        }
        self.in_flight -= usize::from(!matches!(phase, Phase::Idle));
        match phase {
            Phase::Queued(position) => self.queue.remove(position),
            Phase::Running(..) => self.calling -= 1,
            Phase::Idle | Phase::Delayed(_) | Phase::AwaitingToken(_) => {}
        }
    }

    /// How many fetches are queued or running.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// How many pods have credentials below the floor that could not be refreshed, and how many have none.
    pub(crate) fn count_failing(&self, now: Timestamp) -> (usize, usize) {
        let of_pods = self.entries.iter().filter(|(key, _)| matches!(key, Key::Pod(_)));
        let failing = of_pods.filter(|(_, entry)| entry.failed.is_some()).map(|(_, entry)| entry.life);
        failing.fold((0, 0), |(below, missing), life| match life {
            Some(life) if now < life.fresh_until(Floor::Imds) => (below, missing),
            Some(life) if now < life.expiration => (below + 1, missing),
            _ => (below, missing + 1),
        })
    }

    /// Whether the circuit is open.
    pub(crate) fn eks_auth_is_unavailable(&self) -> bool {
        self.circuit.probe_at().is_some()
    }

    #[expect(clippy::expect_used, reason = "an invariant")]
    fn entry(&mut self, key: Key) -> &mut Entry {
        self.entries.get_mut(&key).expect("BUG: whatever is queued or has a timer has an entry")
    }

    fn is_idle(&self, key: Key) -> bool {
        self.entries.get(&key).is_none_or(|entry| matches!(entry.phase, Phase::Idle))
    }

    fn set_phase(&mut self, key: Key, phase: Phase) {
        let was_idle = self.is_idle(key);
        self.entry(key).phase = phase;
        self.in_flight += usize::from(was_idle);
        self.in_flight -= usize::from(self.is_idle(key));
    }

    fn set_timer(&mut self, key: Key, at: Option<Timestamp>) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if let Some(timer) = entry.timer.take() {
            self.timers.cancel(timer);
        }
        entry.timer = at.map(|at| self.timers.set(at, key));
    }

    /// The time, which never runs backwards. A clock that was set back takes the whole schedule along.
    fn tick(&mut self, now: Timestamp) -> Timestamp {
        let back = self.now.duration_since(now);
        if back > CLOCK_SKEW {
            self.timers.bring_forward(back);
            for entry in self.entries.values_mut() {
                entry.timer = entry.timer.map(|timer| timer.brought_forward(back));
                entry.refresh_at -= back;
                entry.failed.iter_mut().for_each(|failed| failed.until -= back);
            }
            self.token_turn -= back;
            self.anonymous.clock_set_back(back);
            self.rate_limit.clock_set_back(now);
            self.circuit.clock_set_back(now);
            self.now = now;
        }
        self.now = self.now.max(now);
        self.now
    }
}

#[cfg(test)]
mod tests;
