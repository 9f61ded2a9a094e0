//! Decides what is fetched when, and in which order: the engine without its hands.
//!
//! Owns the state of every pod's credentials but for the credentials themselves. It is told what happens and what time it
//! is; it never waits, calls nobody, reads no clock and draws its jitter_source from a seed.

use std::{
    collections::{HashMap, hash_map},
    time::Duration,
};

use aws_lc_rs::digest::SHA256_OUTPUT_LEN;
use jiff::{SignedDuration, Timestamp};

#[cfg(test)]
use super::cache::planted::{Bug, planted};
use crate::identity::PodUid;
use freshness::{Failure, Floor, Life};

mod anonymous;
mod circuit;
mod completion;
pub(super) mod freshness;
mod queue;
mod rate_limit;
mod steps;
mod timers;

pub(crate) use self::queue::{Class, FairnessKey};
pub use self::rate_limit::Budget;
use self::{
    anonymous::AnonymousCallers,
    circuit::Service,
    queue::{Queue, Rank},
    rate_limit::Pace,
    timers::{JitterSource, Timer, Timers},
};

/// Clocks of two threads differ by less; what is more was set back.
const CLOCK_SKEW: SignedDuration = SignedDuration::from_secs(1);

/// SHA-256 of a token.
pub(crate) type TokenDigest = [u8; SHA256_OUTPUT_LEN];

/// What has one fetch at a time.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    /// A pod.
    Pod(PodUid),
    /// A token that EKS Auth has yet to judge.
    Token(TokenDigest),
}

/// What a caller can expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// A fetch is under way, or waits for its turn. Without `hope` it will take longer than a caller waits.
    Joined { hope: bool },
    /// The last failure still counts.
    Refused,
    /// Too many wait already at the same address.
    Busy,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Fetch.
    Fetch(Key, Class),
    /// Nothing is left to serve, and nobody asks.
    Drop(Key),
}

/// How a fetch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With credentials.
    Got(Life),
    /// EKS Auth throttles.
    Throttled(Option<Duration>),
    /// With nothing.
    Failed(Failure),
    /// With no call yet: the token that it lingered for is there.
    HasToken,
    /// EKS Auth does not take the token, and there may be another one.
    TokenRefused,
}

/// What becomes of a fetch's callers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completion {
    /// They have their answer.
    Over,
    /// It is tried again at once or when it may be; they may wait.
    GoesOn,
}

/// The plan.
#[derive(Debug)]
pub(crate) struct Scheduler {
    entries: HashMap<Key, Entry>,
    queue: Queue,
    timers: Timers,
    /// Fetches that wait for their turn or are under way.
    flights: usize,
    /// Those of them that may be calling EKS Auth.
    calling: usize,
    pace: Pace,
    service: Service,
    strangers: AnonymousCallers,
    /// When it is the next pod's turn to try again for a token.
    token_turn: Timestamp,
    now: Timestamp,
    jitter_source: JitterSource,
}

#[derive(Debug)]
struct Entry {
    fairness_key: FairnessKey,
    phase: Phase,
    timer: Option<Timer>,
    life: Option<Life>,
    refresh_at: Timestamp,
    /// Whether anybody has asked for what there is.
    asked: bool,
    /// Whether anybody waits for what is being fetched.
    waits: bool,
    /// Whether it was begun before anybody asked.
    prefetch: bool,
    /// Answers lost by what is being fetched.
    lost: u32,
    failed: Option<Failed>,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    Idle,
    Queued(Rank),
    /// Back in the queue when the timer ends.
    Delayed(Rank),
    Running(Rank, Timestamp),
    /// Under way, but its token is long in coming: others are called for meanwhile.
    Lingering(Rank),
}

#[derive(Clone, Copy, Debug)]
struct Failed {
    failure: Failure,
    times: u32,
    /// Until then callers without credentials are refused.
    until: Timestamp,
}

// === impl Scheduler ===

impl Scheduler {
    pub(crate) fn new(budget: Budget, seed: u64, now: Timestamp) -> Self {
        Self {
            entries: HashMap::new(),
            queue: Queue::default(),
            timers: Timers::default(),
            flights: 0,
            calling: 0,
            pace: Pace::new(budget, now),
            service: Service::new(),
            strangers: AnonymousCallers::default(),
            token_turn: now,
            now,
            jitter_source: JitterSource::new(seed),
        }
    }

    /// Somebody asks for whom nothing fresh enough is cached.
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
            // Nobody had asked for what failed.
            entry.failed = None;
        }
        if let (Phase::Idle, Some(failed)) = (entry.phase, entry.failed)
            && now < failed.until
        {
            return Answer::Refused;
        }
        entry.waits = true;
        let tried_in_vain =
            entry.failed.is_some_and(|failed| failed.failure == Failure::Outage && failed.times >= 2);
        match entry.phase {
            Phase::Idle => self.enqueue(key, Class::Foreground, now),
            Phase::Queued(rank) if rank.class != Class::Foreground => self.promote(key, rank, now),
            #[cfg(test)]
            Phase::Running(..) if planted(Bug::TwoFlights) => self.enqueue(key, Class::Foreground, now),
            Phase::Queued(_) | Phase::Delayed(_) | Phase::Running(..) | Phase::Lingering(_) => {}
        }
        // Who comes when it is time to ask whether EKS Auth is back waits for what it says.
        let may_answer = self.service.probe_at().is_none_or(|probe_at| now >= probe_at);
        Answer::Joined { hope: !tried_in_vain && may_answer }
    }

    /// Somebody was served for the first time from what there is.
    pub(crate) fn asked(&mut self, key: Key, now: Timestamp) {
        let now = self.tick(now);
        let Some(entry) = self.entries.get_mut(&key) else { return };
        entry.asked = true;
        let has_lapsed = entry.life.is_some() && entry.failed.is_none() && now >= entry.refresh_at;
        if has_lapsed && matches!(entry.phase, Phase::Idle) {
            self.enqueue(key, Class::Refresh, now);
        }
    }

    /// Somebody is going to ask.
    pub(crate) fn prefetch(&mut self, uid: PodUid, now: Timestamp) {
        let now = self.tick(now);
        let key = Key::Pod(uid);
        if let hash_map::Entry::Vacant(vacant) = self.entries.entry(key) {
            vacant.insert(Entry { prefetch: true, ..Entry::new(FairnessKey::Pod(uid), now) });
            self.enqueue(key, Class::Prefetch, now);
        }
    }

    /// A pod's credentials have come in another way: with a token that EKS Auth has accepted. A fetch that has not begun is
    /// not needed any more.
    pub(crate) fn learn(&mut self, uid: PodUid, life: Life, now: Timestamp) {
        let now = self.tick(now);
        let key = Key::Pod(uid);
        let entry = self.entries.entry(key).or_insert_with(|| Entry::new(FairnessKey::Pod(uid), now));
        (entry.failed, entry.lost) = (None, 0);
        if let Phase::Queued(rank) | Phase::Delayed(rank) = entry.phase {
            entry.waits = false;
            self.queue.remove(rank);
            self.set_phase(key, Phase::Idle);
        }
        self.keep(key, life, true);
    }

    /// A pod's credentials are those of the predecessor, with what that had planned for them.
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
        // Never later than this agent would have it.
        self.keep_until(key, life, refresh_at.min(life.refresh_at(1.0)), asked);
    }

    /// When a pod's next credentials are due, and whether anybody asks for what there is.
    pub(crate) fn standing(&self, uid: PodUid) -> Option<(Timestamp, bool)> {
        self.entries.get(&Key::Pod(uid)).map(|entry| (entry.refresh_at, entry.asked))
    }

    /// What is to be done now; to be asked until there is nothing.
    pub(crate) fn next(&mut self, now: Timestamp) -> Option<Action> {
        let now = self.tick(now);
        while let Some(key) = self.timers.ended(now) {
            if self.ring(key, now) {
                self.forget(key);
                return Some(Action::Drop(key));
            }
        }
        let class = self.queue.first()?;
        if self.calling >= self.service.limit() || !self.may_call(class, now) {
            return None;
        }
        let (rank, key) = self.queue.pop()?;
        self.set_timer(key, None);
        let fairness_key = self.entry(key).fairness_key;
        self.service.tries(fairness_key);
        self.set_phase(key, Phase::Running(rank, now));
        self.calling += 1;
        Some(Action::Fetch(key, rank.class))
    }

    /// When there may be something to be done again, if nothing happens before.
    pub(crate) fn wake_at(&self) -> Option<Timestamp> {
        let class = self.queue.first().filter(|_| self.calling < self.service.limit());
        let call = class.map(|class| {
            self.service.probe_at().unwrap_or_else(|| self.pace.ready_at(class != Class::Foreground))
        });
        [self.timers.next_at(), call].into_iter().flatten().min()
    }

    /// The pod is gone, or the token of no interest any more.
    pub(crate) fn forget(&mut self, key: Key) {
        self.set_timer(key, None);
        let Some(Entry { phase, fairness_key, .. }) = self.entries.remove(&key) else { return };
        match (key, fairness_key) {
            (Key::Token(digest), FairnessKey::Address(address)) => self.strangers.forget(address, &digest),
            _ => self.service.forget(fairness_key),
        }
        self.flights -= usize::from(!matches!(phase, Phase::Idle));
        match phase {
            Phase::Queued(rank) => self.queue.remove(rank),
            Phase::Running(..) => self.calling -= 1,
            Phase::Idle | Phase::Delayed(_) | Phase::Lingering(_) => {}
        }
    }

    /// How many fetches wait for their turn or are under way.
    pub(crate) fn flights(&self) -> usize {
        self.flights
    }

    /// How many pods cannot be given fresh credentials: those that are served what is below the floor, and those that have
    /// none.
    pub(crate) fn in_need(&self, now: Timestamp) -> (usize, usize) {
        let of_pods = self.entries.iter().filter(|(key, _)| matches!(key, Key::Pod(_)));
        let failing = of_pods.filter(|(_, entry)| entry.failed.is_some()).map(|(_, entry)| entry.life);
        failing.fold((0, 0), |(below, without), life| match life {
            Some(life) if now < life.good_until(Floor::Imds) => (below, without),
            Some(life) if now < life.expiration => (below + 1, without),
            _ => (below, without + 1),
        })
    }

    /// Whether EKS Auth does not answer.
    pub(crate) fn eks_auth_is_unavailable(&self) -> bool {
        self.service.probe_at().is_some()
    }

    #[expect(clippy::expect_used, reason = "an invariant")]
    fn entry(&mut self, key: Key) -> &mut Entry {
        self.entries.get_mut(&key).expect("BUG: what is in the queue or has a timer has an entry")
    }

    fn is_idle(&self, key: Key) -> bool {
        self.entries.get(&key).is_none_or(|entry| matches!(entry.phase, Phase::Idle))
    }

    fn set_phase(&mut self, key: Key, phase: Phase) {
        let was_idle = self.is_idle(key);
        self.entry(key).phase = phase;
        self.flights += usize::from(was_idle);
        self.flights -= usize::from(self.is_idle(key));
    }

    fn set_timer(&mut self, key: Key, at: Option<Timestamp>) {
        let Some(entry) = self.entries.get_mut(&key) else { return };
        if let Some(timer) = entry.timer.take() {
            self.timers.cancel(timer);
        }
        entry.timer = at.map(|at| self.timers.set(at, key));
    }

    /// The time, which does not run backwards. A clock that was set back takes everything planned with it.
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
            self.strangers.clock_set_back(back);
            self.pace.clock_set_back(now);
            self.service.clock_set_back(now);
            self.now = now;
        }
        self.now = self.now.max(now);
        self.now
    }
}

// === impl Key ===

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pod(uid) => uid.fmt(f),
            Self::Token(_) => f.write_str("a token"),
        }
    }
}

// === impl Entry ===

impl Entry {
    fn new(fairness_key: FairnessKey, now: Timestamp) -> Self {
        Self {
            fairness_key,
            phase: Phase::Idle,
            timer: None,
            life: None,
            refresh_at: now,
            asked: false,
            waits: false,
            prefetch: false,
            lost: 0,
            failed: None,
        }
    }
}

#[cfg(test)]
mod tests;
