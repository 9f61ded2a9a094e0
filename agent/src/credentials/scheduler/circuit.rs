//! Whether EKS Auth answers at all, and how carefully it is asked again once it does.
//!
//! Owns that judgement over the whole node; never knows a single pod's failures beyond that there were some.

use std::{collections::HashSet, time::Duration};

use jiff::Timestamp;

use super::FairnessKey;
use crate::credentials::scheduler::freshness::Jitter;

/// So many calls without an answer, none in between that has one, and by so many who pay for them, or by all who have
/// called since: it is not their fault.
const LOST: usize = 3;
/// While there is no answer, it is asked for one pod in this time.
const PROBE_EVERY: Duration = Duration::from_secs(2);
/// Calls under way at once when EKS Auth is back; each answer allows for one more.
const FIRST: usize = 4;
/// As many as that are no limit any more.
const PLENTY: usize = 512;

/// What is known of EKS Auth.
#[derive(Debug)]
pub(super) struct Service {
    /// Who has called since it answered last, and who in vain; as many as matter.
    tried: HashSet<FairnessKey>,
    failing: HashSet<FairnessKey>,
    lost: usize,
    probe_at: Option<Timestamp>,
    /// When it was back the last time.
    back_at: Timestamp,
    limit: usize,
}

// === impl Service ===

impl Service {
    pub(super) fn new() -> Self {
        Self {
            tried: HashSet::new(),
            failing: HashSet::new(),
            lost: 0,
            probe_at: None,
            back_at: Timestamp::MIN,
            limit: PLENTY,
        }
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
    pub(super) fn probed(&mut self, now: Timestamp, jitter: Jitter) {
        if let Some(at) = &mut self.probe_at {
            *at = now + PROBE_EVERY.mul_f64(1.0 - 0.25 * jitter);
        }
    }

    /// Whoever was to ask whether it is back has not asked.
    pub(super) fn probe_now(&mut self, now: Timestamp) {
        self.probe_at = self.probe_at.map(|_| now);
    }

    /// It is called.
    pub(super) fn tries(&mut self, fairness_key: FairnessKey) {
        if self.tried.len() < LOST {
            self.tried.insert(fairness_key);
        }
    }

    /// It has not answered.
    pub(super) fn is_silent(&mut self, fairness_key: FairnessKey, now: Timestamp, jitter: Jitter) {
        self.tries(fairness_key);
        if self.failing.len() < LOST {
            self.failing.insert(fairness_key);
        }
        self.lost += 1;
        let is_unavailable = self.lost >= LOST && self.failing.len() >= self.tried.len();
        if is_unavailable && self.probe_at.is_none() {
            self.probe_at = Some(now);
            self.probed(now, jitter);
        }
    }

    /// When it was back the last time.
    pub(super) fn back_at(&self) -> Timestamp {
        self.back_at
    }

    /// It has answered. Tells whether it was away.
    pub(super) fn answered(&mut self, now: Timestamp) -> bool {
        (self.tried, self.failing, self.lost) = (HashSet::new(), HashSet::new(), 0);
        if self.probe_at.take().is_some() {
            (self.limit, self.back_at) = (FIRST, now);
            return true;
        }
        self.limit = (self.limit + 1).min(PLENTY);
        false
    }

    pub(super) fn forget(&mut self, fairness_key: FairnessKey) {
        self.tried.remove(&fairness_key);
        self.failing.remove(&fairness_key);
    }

    pub(super) fn clock_set_back(&mut self, now: Timestamp) {
        self.probe_at = self.probe_at.map(|at| at.min(now));
        self.back_at = self.back_at.min(now);
    }
}
