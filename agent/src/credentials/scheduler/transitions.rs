//! How an entry moves from one phase to the next.
//!
//! Owns what a timer does to an entry and to its place in the queue, and whether a call may be made now.

use std::net::IpAddr;

use jiff::Timestamp;

use super::{
    Scheduler,
    backoff::Failure,
    entry::{Entry, Phase, RETENTION},
    key::{Key, Priority},
    queue::Position,
};
use crate::credentials::{TokenDigest, freshness::Life};

impl Scheduler {
    /// Schedules the refresh of credentials that have just been obtained.
    pub(super) fn schedule_refresh(&mut self, key: Key, life: Life, asked: bool) {
        let refresh_at = life.refresh_at(self.jitter_source.draw());
        self.schedule_refresh_at(key, life, refresh_at, asked);
    }

    pub(super) fn schedule_refresh_at(&mut self, key: Key, life: Life, refresh_at: Timestamp, asked: bool) {
        let entry = self.entry(key);
        (entry.life, entry.refresh_at, entry.asked) = (Some(life), refresh_at, asked);
        if matches!(entry.phase, Phase::Idle) {
            self.set_timer(key, Some(refresh_at));
        }
    }

    /// A timer has fired. Returns whether the entry can be removed.
    pub(super) fn on_timer(&mut self, key: Key, now: Timestamp) -> bool {
        let entry = self.entry(key);
        entry.timer = None;
        match (entry.phase, entry.life) {
            (Phase::Delayed(position), _) => self.queue_again(key, position),
            (Phase::Queued(position), _) => self.promote(key, position, now),
            (Phase::Running(..) | Phase::AwaitingToken(_), _) => {}
            (Phase::Idle, Some(life)) if now >= life.expiration => {
                return !self.outlives_expiration(key, now);
            }
            (Phase::Idle, Some(_)) if entry.asked => self.enqueue(key, Priority::Refresh, now),
            // Unused credentials are left to expire.
            (Phase::Idle, Some(life)) => self.set_timer(key, Some(life.expiration)),
            (Phase::Idle, None) if entry.prefetch => self.enqueue(key, Priority::Prefetch, now),
            (Phase::Idle, None) => return true,
        }
        false
    }

    /// Credentials that expire in an outage leave their entry behind, so that callers are refused at once.
    fn outlives_expiration(&mut self, key: Key, now: Timestamp) -> bool {
        let entry = self.entry(key);
        let is_out = entry.failed.is_some_and(|failed| failed.failure == Failure::Outage);
        if is_out {
            entry.life = None;
            self.set_timer(key, Some(now + RETENTION));
        }
        is_out
    }

    pub(super) fn enqueue(&mut self, key: Key, priority: Priority, now: Timestamp) {
        let Entry { fairness_key, life, .. } = *self.entry(key);
        let position = match (priority, life) {
            (Priority::Prefetch, _) => self.queue.prefetch(),
            // Its callers can be served meanwhile, so it queues behind those who cannot.
            (_, Some(life)) if now < life.urgent_at() => self.queue.refresh(life.expiration),
            _ => self.queue.foreground(fairness_key),
        };
        self.queue_again(key, position);
    }

    pub(super) fn promote(&mut self, key: Key, position: Position, now: Timestamp) {
        self.queue.remove(position);
        self.enqueue(key, Priority::Foreground, now);
    }

    /// The position of a fetch that runs again: in the foreground, if a caller has joined it meanwhile.
    pub(super) fn next_position(&mut self, key: Key, position: Position) -> Position {
        let Entry { fairness_key, waits, life, .. } = *self.entry(key);
        let is_needed = waits && life.is_none() && position.priority != Priority::Foreground;
        if is_needed { self.queue.foreground(fairness_key) } else { position }
    }

    pub(super) fn queue_again(&mut self, key: Key, position: Position) {
        self.set_phase(key, Phase::Queued(position));
        let entry = self.entry(key);
        let urgent_at = entry.life.map(Life::urgent_at).filter(|_| position.priority == Priority::Refresh);
        self.queue.insert(position, key);
        self.set_timer(key, urgent_at);
    }

    /// Takes a call from the budget, if one may be made now.
    pub(super) fn may_call(&mut self, priority: Priority, now: Timestamp) -> bool {
        let Some(probe_at) = self.circuit.probe_at() else {
            return self.rate_limit.take(priority != Priority::Foreground, now);
        };
        if now < probe_at {
            return false;
        }
        let jitter = self.jitter_source.draw();
        self.circuit.probed(now, jitter);
        true
    }

    /// Whether a token of an anonymous caller can be tried now. Where there are too many, an idle one is removed for it.
    pub(super) fn admit(&mut self, address: IpAddr, digest: TokenDigest, now: Timestamp) -> bool {
        let tokens = self.anonymous.tokens_of(address);
        let in_flight = tokens.iter().filter(|token| !self.is_idle(Key::Token(**token))).count();
        if !self.anonymous.may_try(address, in_flight, now) {
            return false;
        }
        if self.entries.contains_key(&Key::Token(digest)) {
            return true;
        }
        if let Some(full) = self.anonymous.full_address(address) {
            let mut oldest_first = self.anonymous.tokens_of(full).iter().copied().map(Key::Token);
            let Some(oldest) = oldest_first.find(|token| self.is_idle(*token)) else { return false };
            self.set_timer(oldest, Some(now));
        }
        self.anonymous.add_token(address, digest);
        true
    }
}
