//! The circuit breaker: whether EKS Auth answers at all, and how carefully it is called again once it does.
//!
//! Owns that judgment for the whole node; never knows more of a single key than that it failed.

use std::{collections::HashSet, time::Duration};

use jiff::Timestamp;

use super::key::FairnessKey;
use crate::credentials::freshness::Jitter;

/// So many calls without an answer, and none answered in between, open the circuit: if they are of as many fairness keys,
/// or of all that have called since, so that it is no single pod's fault.
const OPEN_AFTER: usize = 3;
/// While the circuit is open, one call is made in this time.
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// Concurrent calls when the circuit closes; each answer allows for one more.
const HALF_OPEN_CALLS: usize = 4;
/// No limit in practice.
const UNLIMITED: usize = 512;

/// What is known of EKS Auth.
#[derive(Debug)]
pub(super) struct Circuit {
    /// Who has called since the last answer, and who got none; no more than matter.
    callers: HashSet<FairnessKey>,
    failed_callers: HashSet<FairnessKey>,
    lost: usize,
    probe_at: Option<Timestamp>,
    /// When the circuit last closed.
    closed_at: Timestamp,
    limit: usize,
}

// === impl Circuit ===

impl Circuit {
    pub(super) fn new() -> Self {
        Self {
            callers: HashSet::new(),
            failed_callers: HashSet::new(),
            lost: 0,
            probe_at: None,
            closed_at: Timestamp::MIN,
            limit: UNLIMITED,
        }
    }

    /// When to probe; `None` while the circuit is closed.
    pub(super) fn probe_at(&self) -> Option<Timestamp> {
        self.probe_at
    }

    /// How many calls may run concurrently.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// A probe starts; the next one comes later.
    pub(super) fn probed(&mut self, now: Timestamp, jitter: Jitter) {
        if let Some(at) = &mut self.probe_at {
            *at = now + PROBE_INTERVAL.mul_f64(1.0 - 0.25 * jitter);
        }
    }

    /// The probe has made no call after all.
    pub(super) fn probe_now(&mut self, now: Timestamp) {
        self.probe_at = self.probe_at.map(|_| now);
    }

    /// A call starts.
    pub(super) fn called(&mut self, fairness_key: FairnessKey) {
        if self.callers.len() < OPEN_AFTER {
            self.callers.insert(fairness_key);
        }
    }

    /// A call was not answered.
    pub(super) fn call_failed(&mut self, fairness_key: FairnessKey, now: Timestamp, jitter: Jitter) {
        self.called(fairness_key);
        if self.failed_callers.len() < OPEN_AFTER {
            self.failed_callers.insert(fairness_key);
        }
        self.lost += 1;
        let opens = self.lost >= OPEN_AFTER && self.failed_callers.len() >= self.callers.len();
        if opens && self.probe_at.is_none() {
            self.probe_at = Some(now);
            self.probed(now, jitter);
        }
    }

    /// When the circuit last closed.
    pub(super) fn closed_at(&self) -> Timestamp {
        self.closed_at
    }

    /// A call was answered. Returns whether that closed the circuit.
    pub(super) fn answered(&mut self, now: Timestamp) -> bool {
        (self.callers, self.failed_callers, self.lost) = (HashSet::new(), HashSet::new(), 0);
        if self.probe_at.take().is_some() {
            (self.limit, self.closed_at) = (HALF_OPEN_CALLS, now);
            return true;
        }
        self.limit = (self.limit + 1).min(UNLIMITED);
        false
    }

    pub(super) fn remove(&mut self, fairness_key: FairnessKey) {
        self.callers.remove(&fairness_key);
        self.failed_callers.remove(&fairness_key);
    }

    pub(super) fn clock_set_back(&mut self, now: Timestamp) {
        self.probe_at = self.probe_at.map(|at| at.min(now));
        self.closed_at = self.closed_at.min(now);
    }
}
