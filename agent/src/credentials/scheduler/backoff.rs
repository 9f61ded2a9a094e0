//! How long to wait after a failure before the next attempt: pure functions of the failure, of how often it happened in a
//! row, and of jitter.

use std::time::Duration;

use crate::credentials::freshness::Jitter;

/// First and longest pause after a refusal, such as a missing association.
const REFUSAL_PAUSES: (Duration, Duration) = (Duration::from_secs(10), Duration::from_mins(5));
/// First and longest pause after a failure while a caller waits.
const FOREGROUND_PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(2));
/// First and longest pause without a token while a caller waits: longer, since the API server has all nodes to serve.
const NO_TOKEN_PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
/// First and longest pause after a failure while cached credentials can be served.
const REFRESH_PAUSES: (Duration, Duration) = (Duration::from_secs(5), Duration::from_mins(5));
/// Why a fetch failed, as far as that decides about the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// EKS Auth cannot be reached, or says that it cannot answer.
    Outage,
    /// There is no token to call it with.
    NoToken,
    /// EKS Auth refused, and will for a while.
    Refused,
}

/// How long after the `times`th failure in a row a caller without credentials is refused with the same error. The
/// first failure may be a coincidence: it is tried again at once, unless it was a refusal.
pub(super) fn foreground_pause(failure: Failure, times: u32, jitter: Jitter) -> Duration {
    match (failure, times) {
        (Failure::Refused, _) => back_off(REFUSAL_PAUSES, times, jitter),
        (_, 0 | 1) => Duration::ZERO,
        (Failure::NoToken, times) => back_off(NO_TOKEN_PAUSES, times - 1, jitter),
        (Failure::Outage, times) => back_off(FOREGROUND_PAUSES, times - 1, jitter),
    }
}

/// How long after the `times`th failure in a row a refresh is tried again.
pub(super) fn refresh_pause(failure: Failure, times: u32, jitter: Jitter) -> Duration {
    let bounds = if failure == Failure::Refused { REFUSAL_PAUSES } else { REFRESH_PAUSES };
    back_off(bounds, times, jitter)
}

/// Doubles from the first to the longest, shortened at random by up to a fifth.
fn back_off((first, longest): (Duration, Duration), times: u32, jitter: Jitter) -> Duration {
    let doubled = first.saturating_mul(1 << times.saturating_sub(1).min(16));
    doubled.min(longest).mul_f64(1.0 - 0.2 * jitter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_bounds_and_never_beyond() {
        let seconds = |failure, times| foreground_pause(failure, times, 0.0).as_secs_f64();
        let refused: Vec<_> = (1..8).map(|times| seconds(Failure::Refused, times)).collect();
        assert_eq!(refused, [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0]);
        let outage: Vec<_> = (1..7).map(|times| seconds(Failure::Outage, times)).collect();
        assert_eq!(outage, [0.0, 0.25, 0.5, 1.0, 2.0, 2.0]);
        let no_token: Vec<_> = [1, 2, 3, 7, 8, 9].map(|times| seconds(Failure::NoToken, times)).into();
        assert_eq!(no_token, [0.0, 0.25, 0.5, 8.0, 10.0, 10.0]);
        let ahead: Vec<_> =
            [1, 2, 7, 99].map(|times| refresh_pause(Failure::Outage, times, 0.0).as_secs()).into();
        assert_eq!(ahead, [5, 10, 300, 300]);
        assert_eq!(refresh_pause(Failure::Refused, 1, 1.0), Duration::from_secs(8));
    }
}
