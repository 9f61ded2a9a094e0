//! From one phase of an entry to the next.
//!
//! Owns what a timer, a failure or an answer does to an entry and to its place in the queue; what happens is told to `Plan`.

use std::time::Duration;

use jiff::Timestamp;

use super::{Class, Entry, FLIGHTS_PER_ADDRESS, Failed, Key, Payer, Phase, Plan, TOKENS_MAX, queue::Rank};
use crate::credentials::schedule::{self, Failure, Life};

/// How long what failed is remembered when nobody asks: longer than any pause.
const REMEMBERED: Duration = Duration::from_mins(10);
/// Lost answers after which whoever waits is told.
const LOST_MAX: u32 = 2;
/// Shortest pause after a lost answer; the longest is twice that.
const AFTER_LOST: Duration = Duration::from_millis(50);
/// A prefetch that fails so often is left to the pod itself.
const PREFETCHES: u32 = 5;

impl Plan {
    /// Schedules the end of a life that has just begun.
    pub(super) fn keep(&mut self, key: Key, life: Life, asked: bool) {
        let refresh_at = life.refresh_at(self.chances.draw());
        self.keep_until(key, life, refresh_at, asked);
    }

    pub(super) fn keep_until(&mut self, key: Key, life: Life, refresh_at: Timestamp, asked: bool) {
        let entry = self.entry(key);
        (entry.life, entry.refresh_at, entry.asked) = (Some(life), refresh_at, asked);
        if matches!(entry.phase, Phase::Idle) {
            self.set_timer(key, Some(refresh_at));
        }
    }

    pub(super) fn fail(&mut self, key: Key, failure: Failure, now: Timestamp) {
        let (wanted, ahead) = (self.chances.draw(), self.chances.draw());
        let entry = self.entry(key);
        let before = entry.failed.filter(|before| before.failure == failure);
        let times = before.map_or(0, |before| before.times) + 1;
        let until = now + schedule::pause_when_wanted(failure, times, wanted);
        entry.failed = Some(Failed { failure, times, until });
        (entry.waits, entry.lost) = (false, 0);
        let ahead = now + schedule::pause_ahead(failure, times, ahead);
        let again_at = match entry.life {
            Some(life) if life.expiration > now => ahead.min(life.expiration),
            _ if entry.prefetch && times < PREFETCHES => ahead,
            _ => now + REMEMBERED,
        };
        self.set_timer(key, Some(again_at));
    }

    /// A lost answer or two are not worth an error to those who wait.
    pub(super) fn try_again(&mut self, key: Key, rank: Rank, now: Timestamp) -> bool {
        let is_away = self.service.probe_at().is_some();
        let chance = self.chances.draw();
        let entry = self.entry(key);
        if is_away || !entry.waits || entry.failed.is_some() || entry.lost >= LOST_MAX {
            return false;
        }
        entry.lost += 1;
        entry.phase = Phase::Delayed(rank);
        self.set_timer(key, Some(now + AFTER_LOST.mul_f64(1.0 + chance)));
        true
    }

    /// A timer has ended. Tells whether the entry is of no use any more.
    pub(super) fn ring(&mut self, key: Key, now: Timestamp) -> bool {
        let entry = self.entry(key);
        entry.timer = None;
        match (entry.phase, entry.life) {
            (Phase::Delayed(rank), _) => self.queue_again(key, rank),
            (Phase::Queued(rank), _) => self.promote(key, rank, now),
            (Phase::Running(..), _) => {}
            (Phase::Idle, Some(life)) if now >= life.expiration => return true,
            (Phase::Idle, Some(_)) if entry.asked => self.enqueue(key, Class::Refresh, now),
            // Nobody asks any more: it may lapse.
            (Phase::Idle, Some(life)) => self.set_timer(key, Some(life.expiration)),
            (Phase::Idle, None) if entry.prefetch => self.enqueue(key, Class::Prefetch, now),
            (Phase::Idle, None) => return true,
        }
        false
    }

    pub(super) fn enqueue(&mut self, key: Key, class: Class, now: Timestamp) {
        let Entry { payer, life, .. } = *self.entry(key);
        let rank = match (class, life) {
            (Class::Prefetch, _) => self.queue.prefetch(),
            (Class::Refresh, Some(life)) if now < life.urgent_at() => self.queue.refresh(life.expiration),
            _ => self.queue.foreground(payer),
        };
        self.queue_again(key, rank);
    }

    pub(super) fn promote(&mut self, key: Key, rank: Rank, now: Timestamp) {
        self.queue.remove(rank);
        self.enqueue(key, Class::Foreground, now);
    }

    pub(super) fn queue_again(&mut self, key: Key, rank: Rank) {
        let entry = self.entry(key);
        entry.phase = Phase::Queued(rank);
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
        let chance = self.chances.draw();
        self.service.probed(now, chance);
        true
    }

    /// If EKS Auth was away, nobody need wait longer because of that.
    pub(super) fn service_answers(&mut self, now: Timestamp) {
        if !self.service.answered(now) {
            return;
        }
        let mut due = Vec::new();
        for (key, entry) in &mut self.entries {
            if let (Phase::Idle, Some(failed)) = (entry.phase, &mut entry.failed)
                && failed.failure == Failure::Outage
            {
                (failed.until, failed.times) = (now, 1);
                due.extend(entry.life.map(|_| *key));
            }
        }
        for key in due {
            self.set_timer(key, Some(now));
        }
    }

    /// Whether one more token that nobody vouches for can be looked into.
    pub(super) fn has_room(&self, payer: Payer) -> bool {
        let tokens = self.entries.iter().filter(|(key, _)| matches!(key, Key::Token(_)));
        let (mut all, mut own) = (0, 0);
        for (_, entry) in tokens {
            all += 1;
            own += usize::from(entry.payer == payer && !matches!(entry.phase, Phase::Idle));
        }
        all < TOKENS_MAX && own < FLIGHTS_PER_ADDRESS
    }
}
