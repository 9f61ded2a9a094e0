//! How fast this node may call EKS Auth: its own budget, reduced by what EKS Auth throttles.
//!
//! Owns the rate; never decides whose call is next, never reads a clock.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::credentials::freshness::Jitter;

/// Slowest rate, in calls a second, however much is throttled.
const MIN_RATE: f64 = 0.1;
/// After so many answers since the last throttling the rate was about right, and a little less will do.
const SETTLED_ANSWERS: u32 = 5;
/// After so many it is time to find out whether EKS Auth allows more again.
const RECOVERED_ANSWERS: u32 = 60;

/// What the node allows itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Calls a second, in the long run.
    pub per_second: f64,
    /// Calls at once, in the foreground; refreshes and prefetches never come in a burst.
    pub burst: f64,
}

/// Two token buckets, one of them for refreshes and prefetches, and a rate that follows what EKS Auth allows.
#[derive(Debug)]
pub(super) struct RateLimit {
    budget: Budget,
    rate: f64,
    /// The rate to return to: just below that at which EKS Auth throttled last.
    ceiling: f64,
    tokens: f64,
    tokens_ahead: f64,
    filled_at: Timestamp,
    paused_until: Timestamp,
    throttled_at: Timestamp,
    answers: u32,
}

// === impl RateLimit ===

impl RateLimit {
    pub(super) fn new(budget: Budget, now: Timestamp) -> Self {
        Self {
            budget,
            rate: budget.per_second,
            ceiling: budget.per_second,
            tokens: budget.burst,
            tokens_ahead: 1.0,
            filled_at: now,
            paused_until: now,
            throttled_at: Timestamp::MIN,
            answers: 0,
        }
    }

    /// When the next call may be made, if nothing happens before.
    pub(super) fn ready_at(&self, ahead: bool) -> Timestamp {
        let tokens = if ahead { self.tokens.min(self.tokens_ahead) } else { self.tokens };
        let missing = Duration::from_secs_f64(((1.0 - tokens) / self.rate).max(0.0));
        (self.filled_at + missing).max(self.paused_until)
    }

    /// Takes a call, if one may be made now.
    pub(super) fn take(&mut self, ahead: bool, now: Timestamp) -> bool {
        if now < self.ready_at(ahead) {
            return false;
        }
        self.fill(now);
        self.tokens = (self.tokens - 1.0).max(0.0);
        if ahead {
            self.tokens_ahead = (self.tokens_ahead - 1.0).max(0.0);
        }
        true
    }

    /// The call was not made after all.
    pub(super) fn give_back(&mut self) {
        self.tokens = (self.tokens + 1.0).min(self.burst());
    }

    /// EKS Auth has answered, whatever it said.
    pub(super) fn answered(&mut self) {
        self.answers = self.answers.saturating_add(1);
        let gap = (self.ceiling - self.rate).max(0.0);
        let growth = if self.answers > RECOVERED_ANSWERS { 0.05 } else { 0.001 };
        self.rate = (self.rate + 0.1 * gap + growth * self.rate).min(self.budget.per_second);
    }

    /// EKS Auth throttled a call that began at `begun_at`. Concurrent ones count once.
    pub(super) fn throttled(
        &mut self,
        begun_at: Timestamp,
        retry_after: Option<Duration>,
        now: Timestamp,
        jitter: Jitter,
    ) {
        self.fill(now);
        if let Some(after) = retry_after {
            // Other nodes were told the same.
            let jitter = after.mul_f64(0.1 * jitter);
            self.paused_until = self.paused_until.max(now + after + jitter);
        }
        if begun_at <= self.throttled_at {
            return;
        }
        let settled = self.answers >= SETTLED_ANSWERS;
        self.ceiling = self.rate * 0.98;
        // Not all nodes of a cluster by the same factor.
        let factor = if settled { 0.95 } else { 0.5 };
        self.rate = (self.rate * factor * (1.0 - 0.02 * jitter)).max(MIN_RATE);
        // A throttled call costs EKS Auth nothing: after a small step it is tried again soon.
        let tokens = if settled { 0.75 } else { 0.0 };
        (self.tokens, self.tokens_ahead) = (self.tokens.min(tokens), self.tokens_ahead.min(tokens));
        (self.throttled_at, self.answers) = (now, 0);
    }

    /// A clock that was set back must not stop the calls.
    pub(super) fn clock_set_back(&mut self, now: Timestamp) {
        self.filled_at = now;
        self.paused_until = self.paused_until.min(now);
        self.throttled_at = Timestamp::MIN;
    }

    fn fill(&mut self, now: Timestamp) {
        let passed = now.duration_since(self.filled_at).max(SignedDuration::ZERO).as_secs_f64();
        self.tokens = (self.tokens + passed * self.rate).min(self.burst());
        self.tokens_ahead = (self.tokens_ahead + passed * self.rate).min(1.0);
        self.filled_at = self.filled_at.max(now);
    }

    /// No burst while EKS Auth throttles.
    fn burst(&self) -> f64 {
        if self.rate < self.budget.per_second { 1.0 } else { self.budget.burst }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Timestamp = Timestamp::UNIX_EPOCH;

    fn rate_limit() -> RateLimit {
        RateLimit::new(Budget { per_second: 10.0, burst: 4.0 }, START)
    }

    fn after(millis: i64) -> Timestamp {
        START + SignedDuration::from_millis(millis)
    }

    #[test]
    fn only_the_foreground_has_a_burst() {
        let mut rate_limit = rate_limit();
        assert_eq!((0..9).filter(|_| rate_limit.take(false, START)).count(), 4);
        assert_eq!(rate_limit.ready_at(false), after(100));
        let mut ahead = self::rate_limit();
        assert_eq!((0..9).filter(|_| ahead.take(true, START)).count(), 1);
        assert_eq!(ahead.ready_at(true), after(100));
        assert!(ahead.take(false, START), "callers need not wait for it");
        let times = (0..10_000).filter(|millis| ahead.take(true, after(*millis))).count();
        assert!((99..=101).contains(&times), "{times}");
    }

    #[test]
    fn concurrent_throttled_calls_slow_the_rate_once() {
        let mut rate_limit = rate_limit();
        for _ in 0..4 {
            rate_limit.throttled(START, None, after(50), 0.0);
        }
        let halved: Vec<_> = (50..1050).filter(|millis| rate_limit.take(false, after(*millis))).collect();
        assert!((4..=5).contains(&halved.len()), "{halved:?}");
    }

    #[test]
    fn retry_after_is_honored_and_lengthened_a_little() {
        let mut rate_limit = rate_limit();
        rate_limit.throttled(START, Some(Duration::from_secs(3)), after(0), 1.0);
        for ahead in [false, true] {
            assert!(rate_limit.ready_at(ahead) >= after(3000) && rate_limit.ready_at(ahead) <= after(3300));
        }
    }

    #[test]
    fn the_rate_comes_back_when_throttling_ends() {
        let mut rate_limit = rate_limit();
        for second in 0..4 {
            rate_limit.throttled(after(second * 1000), None, after(second * 1000 + 1), 0.5);
        }
        assert!(rate_limit.rate < 1.0);
        (0..200).for_each(|_| rate_limit.answered());
        assert!(rate_limit.rate > 9.0, "{}", rate_limit.rate);
    }
}
