//! What the end of a fetch means: for its entry, for EKS Auth, and for everybody else.
//!
//! Owns what an outcome does; never decides when something is fetched.

use std::time::Duration;

use jiff::Timestamp;

use super::{Completion, Entry, Failed, FairnessKey, Key, Outcome, Phase, Scheduler, queue::Rank};
use crate::credentials::scheduler::freshness::{self, Failure};

/// How long what failed is remembered when nobody asks: longer than any pause.
pub(super) const REMEMBERED: Duration = Duration::from_mins(10);
/// Lost answers after which whoever waits is told.
const LOST_MAX: u32 = 2;
/// Shortest pause after a lost answer; the longest is twice that.
const AFTER_LOST: Duration = Duration::from_millis(50);
/// A prefetch that fails so often is left to the pod itself.
const PREFETCHES: u32 = 5;
/// Pods for which there was no token try again one by one, so far apart, as long as none of them has got one.
const TOKEN_EVERY: Duration = Duration::from_secs(1);

impl Scheduler {
    /// A fetch has ended.
    pub(crate) fn completed(&mut self, key: Key, outcome: Outcome, now: Timestamp) -> Completion {
        let now = self.tick(now);
        let (rank, begun_at) = match self.entries.get(&key).map(|entry| entry.phase) {
            Some(Phase::Running(rank, begun_at)) => {
                self.calling -= 1;
                (rank, begun_at)
            }
            Some(Phase::Lingering(rank)) => (rank, now),
            _ => return Completion::Over,
        };
        if outcome == Outcome::Failed(Failure::NoToken) {
            self.has_not_called(key, now);
        } else {
            self.tokens_come(key, now);
        }
        self.set_phase(key, Phase::Idle);
        match outcome {
            Outcome::HasToken => {
                self.queue_again(key, rank);
                return Completion::GoesOn;
            }
            Outcome::Got(life) => {
                self.has_answered(now);
                let entry = self.entry(key);
                let waits = std::mem::take(&mut entry.waits);
                (entry.failed, entry.lost) = (None, 0);
                if let FairnessKey::Address(address) = entry.fairness_key {
                    self.strangers.accepted(address);
                }
                self.keep(key, life, waits);
            }
            Outcome::Throttled(retry_after) => {
                let jitter = self.jitter_source.draw();
                self.pace.throttled(begun_at, retry_after, now, jitter);
                self.service_answers(now);
                // Its turn has not been served.
                self.take_turn_again(key, rank);
                return Completion::GoesOn;
            }
            // The next call is one more.
            Outcome::TokenRefused => {
                self.has_answered(now);
                self.take_turn_again(key, rank);
                return Completion::GoesOn;
            }
            Outcome::Failed(failure) => return self.failed(key, failure, rank, begun_at, now),
        }
        Completion::Over
    }

    /// The token of a fetch is long in coming. Until it is there, others have its place.
    pub(crate) fn lingers(&mut self, key: Key, now: Timestamp) {
        let now = self.tick(now);
        let Some(&Entry { phase: Phase::Running(rank, _), .. }) = self.entries.get(&key) else { return };
        self.has_not_called(key, now);
        self.calling -= 1;
        self.set_phase(key, Phase::Lingering(rank));
    }

    fn failed(
        &mut self,
        key: Key,
        failure: Failure,
        rank: Rank,
        begun_at: Timestamp,
        now: Timestamp,
    ) -> Completion {
        let fairness_key = self.entry(key).fairness_key;
        match failure {
            Failure::Refused => {
                self.has_answered(now);
                if let FairnessKey::Address(address) = fairness_key {
                    let jitter = self.jitter_source.draw();
                    self.strangers.refused(address, begun_at, now, jitter);
                }
            }
            Failure::NoToken => {}
            // What began before EKS Auth was back says nothing of it: it goes again.
            Failure::Outage if begun_at < self.service.back_at() => {
                self.take_turn_again(key, rank);
                return Completion::GoesOn;
            }
            Failure::Outage => {
                let (jitter, was_unavailable) = (self.jitter_source.draw(), self.eks_auth_is_unavailable());
                self.service.is_silent(fairness_key, now, jitter);
                if !was_unavailable && self.try_again(key, rank, now) {
                    return Completion::GoesOn;
                }
            }
        }
        self.fail(key, failure, now);
        Completion::Over
    }

    fn fail(&mut self, key: Key, failure: Failure, now: Timestamp) {
        let (wanted, ahead) = (self.jitter_source.draw(), self.jitter_source.draw());
        let turn = self.turn_for_token(key, failure, now);
        let entry = self.entry(key);
        let before = entry.failed.filter(|before| before.failure == failure);
        let times = before.map_or(0, |before| before.times) + 1;
        let until = turn.max(now + freshness::pause_when_wanted(failure, times, wanted));
        entry.failed = Some(Failed { failure, times, until });
        (entry.waits, entry.lost) = (false, 0);
        entry.life = entry.life.filter(|life| life.expiration > now);
        let ahead = now + freshness::pause_ahead(failure, times, ahead);
        let again_at = match entry.life {
            Some(life) => ahead.min(life.expiration),
            _ if entry.prefetch && times < PREFETCHES => ahead.max(turn),
            _ => now + REMEMBERED,
        };
        self.set_timer(key, Some(again_at));
    }

    /// A lost answer or two are not worth an error to those who wait.
    fn try_again(&mut self, key: Key, rank: Rank, now: Timestamp) -> bool {
        let jitter = self.jitter_source.draw();
        let entry = self.entry(key);
        if !entry.waits || entry.failed.is_some() || entry.lost >= LOST_MAX {
            return false;
        }
        entry.lost += 1;
        let rank = self.rank_again(key, rank);
        self.set_phase(key, Phase::Delayed(rank));
        self.set_timer(key, Some(now + AFTER_LOST.mul_f64(1.0 + jitter)));
        true
    }

    fn take_turn_again(&mut self, key: Key, rank: Rank) {
        let rank = self.rank_again(key, rank);
        self.queue_again(key, rank);
    }

    /// A fetch without a token has cost EKS Auth nothing, and told nothing of it.
    fn has_not_called(&mut self, key: Key, now: Timestamp) {
        if !matches!(self.entry(key).phase, Phase::Running(..)) {
            return;
        }
        if self.eks_auth_is_unavailable() {
            self.service.probe_now(now);
        } else {
            self.pace.give_back();
        }
    }

    /// When a pod for which there was no token may try again, whatever its own pause.
    fn turn_for_token(&mut self, key: Key, failure: Failure, now: Timestamp) -> Timestamp {
        if failure != Failure::NoToken || !matches!(key, Key::Pod(_)) {
            return now;
        }
        let everybody = TOKEN_EVERY * u32::try_from(self.entries.len()).unwrap_or(u32::MAX);
        let turn = self.token_turn.clamp(now, now + everybody);
        self.token_turn = turn + TOKEN_EVERY;
        turn
    }

    /// Where there was no token there is one now: others may have theirs, too.
    fn tokens_come(&mut self, key: Key, now: Timestamp) {
        let had_none = self.entry(key).failed.is_some_and(|failed| failed.failure == Failure::NoToken);
        if had_none {
            self.token_turn = now;
            self.may_ask_again(Failure::NoToken, now);
            self.entry(key).failed = None;
        }
    }

    /// EKS Auth has answered, and not that it is asked too much.
    fn has_answered(&mut self, now: Timestamp) {
        self.pace.answered();
        self.service_answers(now);
    }

    /// If EKS Auth was away, nobody need wait longer because of that.
    fn service_answers(&mut self, now: Timestamp) {
        if self.service.answered(now) {
            self.may_ask_again(Failure::Outage, now);
        }
    }

    /// What these have failed for is over.
    fn may_ask_again(&mut self, failure: Failure, now: Timestamp) {
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
