//! From one phase of an entry to the next.
//!
//! Owns what a timer, a failure or an answer does to an entry and to its place in the queue; what happens is told to `Scheduler`.

use std::net::IpAddr;

use jiff::Timestamp;

use super::{Class, Entry, Key, Phase, Scheduler, TokenDigest, completion::REMEMBERED, queue::Rank};
use crate::credentials::scheduler::freshness::{Failure, Life};

impl Scheduler {
    /// Schedules the end of a life that has just begun.
    pub(super) fn keep(&mut self, key: Key, life: Life, asked: bool) {
        let refresh_at = life.refresh_at(self.jitter_source.draw());
        self.keep_until(key, life, refresh_at, asked);
    }

    pub(super) fn keep_until(&mut self, key: Key, life: Life, refresh_at: Timestamp, asked: bool) {
        let entry = self.entry(key);
        (entry.life, entry.refresh_at, entry.asked) = (Some(life), refresh_at, asked);
        if matches!(entry.phase, Phase::Idle) {
            self.set_timer(key, Some(refresh_at));
        }
    }

    /// A timer has ended. Tells whether the entry is of no use any more.
    pub(super) fn ring(&mut self, key: Key, now: Timestamp) -> bool {
        let entry = self.entry(key);
        entry.timer = None;
        match (entry.phase, entry.life) {
            (Phase::Delayed(rank), _) => self.queue_again(key, rank),
            (Phase::Queued(rank), _) => self.promote(key, rank, now),
            (Phase::Running(..) | Phase::Lingering(_), _) => {}
            (Phase::Idle, Some(life)) if now >= life.expiration => return !self.outlives(key, now),
            (Phase::Idle, Some(_)) if entry.asked => self.enqueue(key, Class::Refresh, now),
            // Nobody asks any more: it may lapse.
            (Phase::Idle, Some(life)) => self.set_timer(key, Some(life.expiration)),
            (Phase::Idle, None) if entry.prefetch => self.enqueue(key, Class::Prefetch, now),
            (Phase::Idle, None) => return true,
        }
        false
    }

    /// Whoever asks for what has expired in an outage is told so at once: that is remembered.
    fn outlives(&mut self, key: Key, now: Timestamp) -> bool {
        let entry = self.entry(key);
        let is_out = entry.failed.is_some_and(|failed| failed.failure == Failure::Outage);
        if is_out {
            entry.life = None;
            self.set_timer(key, Some(now + REMEMBERED));
        }
        is_out
    }

    pub(super) fn enqueue(&mut self, key: Key, class: Class, now: Timestamp) {
        let Entry { fairness_key, life, .. } = *self.entry(key);
        let rank = match (class, life) {
            (Class::Prefetch, _) => self.queue.prefetch(),
            // Who asks can be served meanwhile, and comes after those who cannot.
            (_, Some(life)) if now < life.urgent_at() => self.queue.refresh(life.expiration),
            _ => self.queue.foreground(fairness_key),
        };
        self.queue_again(key, rank);
    }

    pub(super) fn promote(&mut self, key: Key, rank: Rank, now: Timestamp) {
        self.queue.remove(rank);
        self.enqueue(key, Class::Foreground, now);
    }

    /// The place of what has been under way already: a caller's, if one has joined it meanwhile.
    pub(super) fn rank_again(&mut self, key: Key, rank: Rank) -> Rank {
        let Entry { fairness_key, waits, life, .. } = *self.entry(key);
        let is_needed = waits && life.is_none() && rank.class != Class::Foreground;
        if is_needed { self.queue.foreground(fairness_key) } else { rank }
    }

    pub(super) fn queue_again(&mut self, key: Key, rank: Rank) {
        self.set_phase(key, Phase::Queued(rank));
        let entry = self.entry(key);
        let urgent_at = entry.life.map(Life::urgent_at).filter(|_| rank.class == Class::Refresh);
        self.queue.insert(rank, key);
        self.set_timer(key, urgent_at);
    }

    /// Whether a call may be made now; if so, it counts.
    pub(super) fn may_call(&mut self, class: Class, now: Timestamp) -> bool {
        let Some(probe_at) = self.service.probe_at() else {
            return self.pace.take(class != Class::Foreground, now);
        };
        if now < probe_at {
            return false;
        }
        let jitter = self.jitter_source.draw();
        self.service.probed(now, jitter);
        true
    }

    /// Whether a token that nobody vouches for can be looked into now. Where there are too many, another one is dropped for it.
    pub(super) fn admit(&mut self, address: IpAddr, digest: TokenDigest, now: Timestamp) -> bool {
        let tokens = self.strangers.tokens_of(address);
        let under_way = tokens.iter().filter(|token| !self.is_idle(Key::Token(**token))).count();
        if !self.strangers.may_try(address, under_way, now) {
            return false;
        }
        if self.entries.contains_key(&Key::Token(digest)) {
            return true;
        }
        if let Some(crowd) = self.strangers.without_room(address) {
            let mut oldest_first = self.strangers.tokens_of(crowd).iter().copied().map(Key::Token);
            let Some(oldest) = oldest_first.find(|token| self.is_idle(*token)) else { return false };
            self.set_timer(oldest, Some(now));
        }
        self.strangers.remember(address, digest);
        true
    }
}
