//! What the result of a fetch means: for its entry, for the circuit, and for all other keys.
//!
//! Owns what an outcome changes; never decides when something is fetched.

use std::time::Duration;

use jiff::Timestamp;

use super::{
    Completion, Outcome, Scheduler,
    backoff::{self, Failure},
    entry::{Entry, Failed, Phase, RETENTION},
    key::{FairnessKey, Key},
    queue::Position,
};

/// A fetch that lost so many answers fails.
const MAX_LOST: u32 = 2;
/// Shortest delay after a lost answer; the longest is twice that.
const LOST_RETRY_DELAY: Duration = Duration::from_millis(50);
/// A prefetch that failed so often waits for the pod to ask.
const MAX_PREFETCHES: u32 = 5;
/// Pods without a token retry one at a time, this far apart, until one of them obtains one.
const TOKEN_INTERVAL: Duration = Duration::from_secs(1);

impl Scheduler {
    /// A fetch has completed.
    pub(crate) fn completed(&mut self, key: Key, outcome: Outcome, now: Timestamp) -> Completion {
        let now = self.tick(now);
        let (position, begun_at) = match self.entries.get(&key).map(|entry| entry.phase) {
            Some(Phase::Running(position, begun_at)) => {
                self.calling -= 1;
                (position, begun_at)
            }
            Some(Phase::AwaitingToken(position)) => (position, now),
            _ => return Completion::Done,
        };
        if outcome == Outcome::Failed(Failure::NoToken) {
            self.on_call_skipped(key, now);
        } else {
            self.on_token_obtained(key, now);
        }
        self.set_phase(key, Phase::Idle);
        match outcome {
            Outcome::HasToken => {
                self.queue_again(key, position);
                return Completion::Retrying;
            }
            Outcome::Received(life) => {
                self.on_answer(now);
                let entry = self.entry(key);
                let waits = std::mem::take(&mut entry.waits);
                (entry.failed, entry.lost) = (None, 0);
                if let FairnessKey::Address(address) = entry.fairness_key {
                    self.anonymous.accepted(address);
                }
                self.schedule_refresh(key, life, waits);
            }
            Outcome::Throttled(retry_after) => {
                let jitter = self.jitter_source.draw();
                self.rate_limit.throttled(begun_at, retry_after, now, jitter);
                self.close_circuit(now);
                // It has not had its turn.
                self.take_turn_again(key, position);
                return Completion::Retrying;
            }
            // The call with the next token counts against the rate limit, too.
            Outcome::TokenRefused => {
                self.on_answer(now);
                self.take_turn_again(key, position);
                return Completion::Retrying;
            }
            Outcome::Failed(failure) => return self.failed(key, failure, position, begun_at, now),
        }
        Completion::Done
    }

    /// The token of a fetch takes long: until it arrives, its slot is free for others.
    pub(crate) fn awaits_token(&mut self, key: Key, now: Timestamp) {
        let now = self.tick(now);
        let Some(&Entry { phase: Phase::Running(position, _), .. }) = self.entries.get(&key) else { return };
        self.on_call_skipped(key, now);
        self.calling -= 1;
        self.set_phase(key, Phase::AwaitingToken(position));
    }

    fn failed(
        &mut self,
        key: Key,
        failure: Failure,
        position: Position,
        begun_at: Timestamp,
        now: Timestamp,
    ) -> Completion {
        let fairness_key = self.entry(key).fairness_key;
        match failure {
            Failure::Refused => {
                self.on_answer(now);
                if let FairnessKey::Address(address) = fairness_key {
                    let jitter = self.jitter_source.draw();
                    self.anonymous.refused(address, begun_at, now, jitter);
                }
            }
            Failure::NoToken => {}
            // What started before the circuit closed says nothing of the present: try again.
            Failure::Outage if begun_at < self.circuit.closed_at() => {
                self.take_turn_again(key, position);
                return Completion::Retrying;
            }
            Failure::Outage => {
                let (jitter, was_unavailable) = (self.jitter_source.draw(), self.eks_auth_is_unavailable());
                self.circuit.call_failed(fairness_key, now, jitter);
                if !was_unavailable && self.try_again(key, position, now) {
                    return Completion::Retrying;
                }
            }
        }
        self.fail(key, failure, now);
        Completion::Done
    }

    fn fail(&mut self, key: Key, failure: Failure, now: Timestamp) {
        let (wanted, ahead) = (self.jitter_source.draw(), self.jitter_source.draw());
        let turn = self.next_token_turn(key, failure, now);
        let entry = self.entry(key);
        let before = entry.failed.filter(|before| before.failure == failure);
        let times = before.map_or(0, |before| before.times) + 1;
        let until = turn.max(now + backoff::foreground_pause(failure, times, wanted));
        entry.failed = Some(Failed { failure, times, until });
        (entry.waits, entry.lost) = (false, 0);
        entry.life = entry.life.filter(|life| life.expiration > now);
        let ahead = now + backoff::refresh_pause(failure, times, ahead);
        let again_at = match entry.life {
            Some(life) => ahead.min(life.expiration),
            _ if entry.prefetch && times < MAX_PREFETCHES => ahead.max(turn),
            _ => now + RETENTION,
        };
        self.set_timer(key, Some(again_at));
    }

    /// One or two lost answers are retried before waiters see an error.
    fn try_again(&mut self, key: Key, position: Position, now: Timestamp) -> bool {
        let jitter = self.jitter_source.draw();
        let entry = self.entry(key);
        if !entry.waits || entry.failed.is_some() || entry.lost >= MAX_LOST {
            return false;
        }
        entry.lost += 1;
        let position = self.next_position(key, position);
        self.set_phase(key, Phase::Delayed(position));
        self.set_timer(key, Some(now + LOST_RETRY_DELAY.mul_f64(1.0 + jitter)));
        true
    }

    fn take_turn_again(&mut self, key: Key, position: Position) {
        let position = self.next_position(key, position);
        self.queue_again(key, position);
    }

    /// A fetch without a token made no call: it costs no budget, and says nothing about EKS Auth.
    fn on_call_skipped(&mut self, key: Key, now: Timestamp) {
        if !matches!(self.entry(key).phase, Phase::Running(..)) {
            return;
        }
        if self.eks_auth_is_unavailable() {
            self.circuit.probe_now(now);
        } else {
            self.rate_limit.give_back();
        }
    }

    /// When a pod without a token may try again, regardless of its own pause.
    fn next_token_turn(&mut self, key: Key, failure: Failure, now: Timestamp) -> Timestamp {
        if failure != Failure::NoToken || !matches!(key, Key::Pod(_)) {
            return now;
        }
        let all_pods = TOKEN_INTERVAL * u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        let turn = self.token_turn.clamp(now, now + all_pods);
        self.token_turn = turn + TOKEN_INTERVAL;
        turn
    }

    /// A pod that had no token now has one: the others may try at once, too.
    fn on_token_obtained(&mut self, key: Key, now: Timestamp) {
        let had_none = self.entry(key).failed.is_some_and(|failed| failed.failure == Failure::NoToken);
        if had_none {
            self.token_turn = now;
            self.retry_failed(Failure::NoToken, now);
            self.entry(key).failed = None;
        }
    }

    /// EKS Auth has answered, and did not throttle.
    fn on_answer(&mut self, now: Timestamp) {
        self.rate_limit.answered();
        self.close_circuit(now);
    }

    /// If the circuit was open, nobody needs to wait any longer because of that.
    fn close_circuit(&mut self, now: Timestamp) {
        if self.circuit.answered(now) {
            self.retry_failed(Failure::Outage, now);
        }
    }

    /// The reason why these failed is gone: they may try again now.
    fn retry_failed(&mut self, failure: Failure, now: Timestamp) {
        let mut due = Vec::new();
        for (key, entry) in &mut self.entries {
            if let (Phase::Idle, Some(failed)) = (entry.phase, &mut entry.failed)
                && failed.failure == failure
            {
                (failed.until, failed.times) = (now, 1);
                due.extend(entry.life.map(|_| *key));
            }
        }
        for key in due {
            self.set_timer(key, Some(now));
        }
    }
}
