//! When credentials and tokens are good for use: pure functions of their times.

use jiff::{SignedDuration, Timestamp};

/// Least life that credentials have when they are handed out. botocore stretches what has less beyond its real
/// end, and the Java SDK v1 asks again for each call below 15 minutes.
pub const FLOOR: SignedDuration = SignedDuration::from_mins(30);

/// Until when credentials are served before fresh ones are fetched: until [`FLOOR`] is left, or for half
/// of their life where a session is shorter than twice that.
pub fn serve_until(obtained_at: Timestamp, expiration: Timestamp) -> Timestamp {
    let half = expiration.duration_since(obtained_at) / 2;
    expiration - half.clamp(SignedDuration::ZERO, FLOOR)
}

/// Until when a token is used before a fresh one is asked for: four fifths of its life, as the kubelet does.
pub fn use_token_until(obtained_at: Timestamp, expiration: Timestamp) -> Timestamp {
    obtained_at + expiration.duration_since(obtained_at).max(SignedDuration::ZERO) * 4 / 5
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(minutes: i64) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_mins(minutes)
    }

    #[test]
    fn nothing_with_less_than_the_floor_is_served_while_fresher_can_be_had() {
        for (life, until) in [(360, 330), (61, 31), (60, 30), (15, 7), (0, 0), (-5, -5)] {
            let expected = at(until) + SignedDuration::from_secs(if life == 15 { 30 } else { 0 });
            assert_eq!(serve_until(at(0), at(life)), expected, "{life}");
        }
    }

    #[test]
    fn a_token_is_used_for_four_fifths_of_its_life() {
        for (life, until) in [(100, 80), (0, 0), (-5, 0)] {
            assert_eq!(use_token_until(at(0), at(life)), at(until), "{life}");
        }
    }
}
