//! When credentials are fresh enough to serve, and when they are refreshed: pure functions of times and jitter.
//!
//! Never reads a clock.

use jiff::{SignedDuration, Timestamp};

/// With less life than this, a refresh is as urgent as a caller who waits.
const URGENT: SignedDuration = SignedDuration::from_mins(15);

/// When credentials were obtained, and when they expire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Life {
    /// When they were obtained.
    pub obtained_at: Timestamp,
    /// When AWS stops accepting them.
    pub expiration: Timestamp,
}

/// The least remaining life of served credentials, as long as fresher ones can be obtained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Floor {
    /// 30 minutes: botocore stretches what has less beyond its real end.
    Imds,
    /// 20 minutes: the Java SDK v1 asks again for each call below 15.
    Container,
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
    /// Until when they are served without asking for fresher ones: down to the floor, or for half of their life where that
    /// is shorter than twice the floor.
    pub fn fresh_until(self, floor: Floor) -> Timestamp {
        self.expiration - self.half_life().min(floor.life())
    }

    /// Whether their remaining life is less than the floor.
    pub(super) fn is_below(self, floor: Floor, now: Timestamp) -> bool {
        self.expiration.duration_since(now) < floor.life()
    }

    /// When to fetch the next ones: between one half and three quarters of the time until the higher floor, so that what
    /// was obtained together is not due together.
    pub(super) fn refresh_at(self, jitter: Jitter) -> Timestamp {
        let span = self.fresh_until(Floor::Imds).duration_since(self.obtained_at);
        self.obtained_at + span.mul_f64(0.5 + 0.25 * jitter)
    }

    /// From when on a refresh is as urgent as a caller who waits.
    pub(super) fn urgent_at(self) -> Timestamp {
        self.expiration - (self.half_life() / 2).min(URGENT)
    }

    /// Half of their life.
    fn half_life(self) -> SignedDuration {
        (self.expiration.duration_since(self.obtained_at) / 2).max(SignedDuration::ZERO)
    }
}

/// Until when a token is used before another is requested: four fifths of its life, as the kubelet does.
pub(super) fn use_token_until(obtained_at: Timestamp, expiration: Timestamp) -> Timestamp {
    obtained_at + expiration.duration_since(obtained_at).max(SignedDuration::ZERO) * 4 / 5
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
    fn nothing_below_the_floor_is_fresh() {
        for (minutes, imds, container) in
            [(360, 330, 340), (61, 31, 41), (60, 30, 40), (40, 20, 20), (0, 0, 0), (-5, -5, -5)]
        {
            assert_eq!(life(minutes).fresh_until(Floor::Imds), at(imds), "{minutes}");
            assert_eq!(life(minutes).fresh_until(Floor::Container), at(container), "{minutes}");
        }
    }

    #[test]
    fn remaining_life_decides_what_is_below_a_floor() {
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
            assert!(latest <= life(minutes).fresh_until(Floor::Imds));
            assert!(latest <= life(minutes).urgent_at());
        }
    }

    #[test]
    fn a_token_is_used_for_four_fifths_of_its_life() {
        for (life, until) in [(100, 80), (0, 0), (-5, 0)] {
            assert_eq!(use_token_until(at(0), at(life)), at(until), "{life}");
        }
    }
}
