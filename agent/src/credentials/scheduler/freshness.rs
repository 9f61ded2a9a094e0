//! When credentials are fresh enough, when they are fetched again, and when after a failure: pure functions of times,
//! of how often it failed, and of jitter.
//!
//! Owns every duration of the engine's schedule; never reads a clock.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// First and longest pause after a refusal, such as a missing association.
const REFUSED: (Duration, Duration) = (Duration::from_secs(10), Duration::from_mins(5));
/// First and longest pause after a failure while somebody waits for credentials.
const WANTED: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(2));
/// First and longest pause where no token can be had while somebody waits: longer, since the API server has all nodes.
const NO_TOKEN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
/// First and longest pause after a failure while there are credentials that can be served.
const AHEAD: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(5));
/// Less life than this, and a refresh is as urgent as a caller who waits.
const URGENT: SignedDuration = SignedDuration::from_mins(15);

/// When credentials begin and end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// When they were obtained.
    pub obtained_at: Timestamp,
    /// When AWS stops accepting them.
    pub expiration: Timestamp,
}

/// Least life that credentials have when they are handed out, while fresher ones can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// 30 minutes: botocore stretches what has less beyond its real end.
    Imds,
    /// 20 minutes: the Java SDK v1 asks again for each call below 15.
    Container,
}

/// Why there are no fresh credentials, as far as it decides about the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// EKS Auth cannot be asked, or says that it cannot answer.
    Outage,
    /// There is no token to ask with.
    NoToken,
    /// EKS Auth says no, and will for a while.
    Refused,
}

/// A number from 0 to 1, drawn at random.
pub(super) type Jitter = f64;

// === impl Floor ===

impl Floor {
    const fn life(self) -> SignedDuration {
        match self {
            Self::Imds => SignedDuration::from_mins(30),
            Self::Container => SignedDuration::from_mins(20),
        }
    }
}

// === impl Life ===

impl Life {
    /// Until when they are served without a look for fresher ones: until the floor is left, or for half of their life
    /// where that is shorter than twice the floor.
    pub fn good_until(self, floor: Floor) -> Timestamp {
        self.expiration - self.left().min(floor.life())
    }

    /// Whether less than the floor is left of them.
    pub(in crate::credentials) fn is_below(self, floor: Floor, now: Timestamp) -> bool {
        self.expiration.duration_since(now) < floor.life()
    }

    /// When to fetch the next ones: between one half and three quarters of the time until the higher floor, so that
    /// what was obtained at once is not due at once.
    pub(in crate::credentials) fn refresh_at(self, jitter: Jitter) -> Timestamp {
        let span = self.good_until(Floor::Imds).duration_since(self.obtained_at);
        self.obtained_at + span.mul_f64(0.5 + 0.25 * jitter)
    }

    /// From when on a refresh is as urgent as a caller who waits.
    pub(in crate::credentials) fn urgent_at(self) -> Timestamp {
        self.expiration - (self.left() / 2).min(URGENT)
    }

    /// Half of their life.
    fn left(self) -> SignedDuration {
        (self.expiration.duration_since(self.obtained_at) / 2).max(SignedDuration::ZERO)
    }
}

/// Until when a token is used before a fresh one is asked for: four fifths of its life, as the kubelet does.
pub(crate) fn use_token_until(obtained_at: Timestamp, expiration: Timestamp) -> Timestamp {
    obtained_at + expiration.duration_since(obtained_at).max(SignedDuration::ZERO) * 4 / 5
}

/// How long after the `times`th failure in a row a caller without credentials is refused with the same words. The first
/// failure may be anybody's: it is tried again at once, unless it was a refusal.
pub(in crate::credentials) fn pause_when_wanted(failure: Failure, times: u32, jitter: Jitter) -> Duration {
    match (failure, times) {
        (Failure::Refused, _) => back_off(REFUSED, times, jitter),
        (_, 0 | 1) => Duration::ZERO,
        (Failure::NoToken, times) => back_off(NO_TOKEN, times - 1, jitter),
        (Failure::Outage, times) => back_off(WANTED, times - 1, jitter),
    }
}

/// How long after the `times`th failure in a row a refresh is tried again.
pub(in crate::credentials) fn pause_ahead(failure: Failure, times: u32, jitter: Jitter) -> Duration {
    let bounds = if failure == Failure::Refused { REFUSED } else { AHEAD };
    back_off(bounds, times, jitter)
}

/// Doubles from the first to the longest, and is shortened at random by up to a fifth.
fn back_off((first, longest): (Duration, Duration), times: u32, jitter: Jitter) -> Duration {
    let doubled = first.saturating_mul(1 << times.saturating_sub(1).min(16));
    doubled.min(longest).mul_f64(1.0 - 0.2 * jitter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(minutes: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_mins(minutes)
    }

    fn life(minutes: i64) -> Life {
        Life { obtained_at: at(0), expiration: at(minutes) }
    }

    #[test]
    fn nothing_with_less_than_the_floor_is_good() {
        for (minutes, imds, container) in
            [(360, 330, 340), (61, 31, 41), (60, 30, 40), (40, 20, 20), (0, 0, 0), (-5, -5, -5)]
        {
            assert_eq!(life(minutes).good_until(Floor::Imds), at(imds), "{minutes}");
            assert_eq!(life(minutes).good_until(Floor::Container), at(container), "{minutes}");
        }
    }

    #[test]
    fn what_is_below_a_floor_is_told_by_what_is_left() {
        for (minute, imds, container) in
            [(0, false, false), (30, false, false), (31, true, false), (41, true, true)]
        {
            assert_eq!(life(60).is_below(Floor::Imds, at(minute)), imds, "{minute}");
            assert_eq!(life(60).is_below(Floor::Container, at(minute)), container, "{minute}");
        }
    }

    #[test]
    fn a_refresh_is_due_well_before_the_floor_and_not_for_all_at_once() {
        for (minutes, first, last) in [(360, 165, 247), (60, 15, 22), (0, 0, 0)] {
            let (earliest, latest) = (life(minutes).refresh_at(0.0), life(minutes).refresh_at(1.0));
            assert_eq!(earliest, at(first), "{minutes}");
            assert!(latest >= at(last) && latest < at(last + 1), "{minutes}: {latest}");
            assert!(latest <= life(minutes).good_until(Floor::Imds));
            assert!(latest <= life(minutes).urgent_at());
        }
    }

    #[test]
    fn pauses_grow_to_their_bounds_and_never_beyond() {
        let seconds = |failure, times| pause_when_wanted(failure, times, 0.0).as_secs_f64();
        let refused: Vec<_> = (1..8).map(|times| seconds(Failure::Refused, times)).collect();
        assert_eq!(refused, [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0]);
        let outage: Vec<_> = (1..7).map(|times| seconds(Failure::Outage, times)).collect();
        assert_eq!(outage, [0.0, 0.25, 0.5, 1.0, 2.0, 2.0]);
        let no_token: Vec<_> = [1, 2, 3, 7, 8, 9].map(|times| seconds(Failure::NoToken, times)).into();
        assert_eq!(no_token, [0.0, 0.25, 0.5, 8.0, 10.0, 10.0]);
        let ahead: Vec<_> =
            [1, 2, 7, 99].map(|times| pause_ahead(Failure::Outage, times, 0.0).as_secs()).into();
        assert_eq!(ahead, [5, 10, 300, 300]);
        assert_eq!(pause_ahead(Failure::Refused, 1, 1.0), Duration::from_secs(8));
    }

    #[test]
    fn a_token_is_used_for_four_fifths_of_its_life() {
        for (life, until) in [(100, 80), (0, 0), (-5, 0)] {
            assert_eq!(use_token_until(at(0), at(life)), at(until), "{life}");
        }
    }
}
