//! Timers, and the source of the jitter that keeps them from firing all at once.
//!
//! Owns the one timer queue; never waits, never reads a clock.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};

use super::key::Key;
use crate::credentials::freshness::Jitter;

/// The timers; each key has at most one.
#[derive(Debug, Default)]
pub(super) struct Timers {
    queue: BTreeMap<Timer, Key>,
    set: u64,
}

/// When a timer fires, and its number among those that fire with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Timer {
    at: Timestamp,
    number: u64,
}

/// `SplitMix64`: jitter needs no secrecy, and tests need the same values each time.
#[derive(Debug)]
pub(super) struct JitterSource(u64);

// === impl Timers ===

impl Timers {
    pub(super) fn set(&mut self, at: Timestamp, key: Key) -> Timer {
        self.set += 1;
        let timer = Timer { at, number: self.set };
        self.queue.insert(timer, key);
        timer
    }

    pub(super) fn cancel(&mut self, timer: Timer) {
        self.queue.remove(&timer);
    }

    /// Takes one that is due.
    pub(super) fn pop_due(&mut self, now: Timestamp) -> Option<Key> {
        let first = self.queue.first_entry()?;
        (first.key().at <= now).then(|| first.remove())
    }

    /// When the next one fires.
    pub(super) fn next_at(&self) -> Option<Timestamp> {
        self.queue.first_key_value().map(|(timer, _)| timer.at)
    }

    /// Makes all of them fire that much earlier.
    pub(super) fn bring_forward(&mut self, by: SignedDuration) {
        let queue = std::mem::take(&mut self.queue);
        self.queue = queue.into_iter().map(|(timer, key)| (timer.brought_forward(by), key)).collect();
    }
}

// === impl Timer ===

impl Timer {
    pub(super) fn brought_forward(self, by: SignedDuration) -> Self {
        Self { at: self.at - by, ..self }
    }
}

// === impl JitterSource ===

impl JitterSource {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn draw(&mut self) -> Jitter {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        #[expect(clippy::cast_possible_truncation, reason = "32 bits are jitter enough")]
        let drawn = (mixed ^ (mixed >> 31)) as u32;
        f64::from(drawn) / f64::from(u32::MAX)
    }
}
