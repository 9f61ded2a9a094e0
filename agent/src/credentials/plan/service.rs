//! Whether EKS Auth answers at all, and how carefully it is asked again once it does.
//!
//! Owns that judgement over the whole node; never knows a single pod's failures beyond that there were some.

use std::{collections::HashSet, time::Duration};

use jiff::Timestamp;

use super::Key;
use crate::credentials::schedule::Chance;

/// So many pods that get no answer, one after the other and none in between who does: it is not their fault.
const PODS: usize = 3;
/// While there is no answer, it is asked for one pod in this time.
const PROBE_EVERY: Duration = Duration::from_secs(2);
/// Calls under way at once when EKS Auth is back; each answer allows for one more.
const FIRST: usize = 4;
/// As many as that are no limit any more.
const PLENTY: usize = 512;

/// What is known of EKS Auth.
#[derive(Debug)]
pub(super) struct Service {
    failing: HashSet<Key>,
    probe_at: Option<Timestamp>,
    /// When it was back the last time.
    back_at: Timestamp,
    limit: usize,
}

// === impl Service ===

impl Service {
    pub(super) fn new() -> Self {
        Self { failing: HashSet::new(), probe_at: None, back_at: Timestamp::MIN, limit: PLENTY }
    }

    /// When to ask whether it is back; `None` while it is there.
    pub(super) fn probe_at(&self) -> Option<Timestamp> {
        self.probe_at
    }

    /// How many calls may be under way.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// Asks whether it is back; the next one to ask comes later.
    pub(super) fn probed(&mut self, now: Timestamp, chance: Chance) {
        if let Some(at) = &mut self.probe_at {
            *at = now + PROBE_EVERY.mul_f64(1.0 - 0.25 * chance);
        }
    }

    /// It has not answered.
    pub(super) fn is_silent(&mut self, key: Key, now: Timestamp, chance: Chance) {
        self.failing.insert(key);
        if self.failing.len() >= PODS && self.probe_at.is_none() {
            self.probe_at = Some(now);
            self.probed(now, chance);
        }
    }

    /// When it was back the last time.
    pub(super) fn back_at(&self) -> Timestamp {
        self.back_at
    }

    /// It has answered. Tells whether it was away.
    pub(super) fn answered(&mut self, now: Timestamp) -> bool {
        self.failing.clear();
        if self.probe_at.take().is_some() {
            (self.limit, self.back_at) = (FIRST, now);
            return true;
        }
        self.limit = (self.limit + 1).min(PLENTY);
        false
    }

    pub(super) fn forget(&mut self, key: Key) {
        self.failing.remove(&key);
    }

    pub(super) fn clock_set_back(&mut self, now: Timestamp) {
        self.probe_at = self.probe_at.map(|at| at.min(now));
    }
}
