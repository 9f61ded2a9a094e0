//! A limit on log lines whose number somebody else decides: a pod, or whoever finds a socket.
//!
//! Owns the count of a window and of what was suppressed; never reads a clock, never writes a line.

use std::{
    mem,
    time::{Duration, Instant},
};

/// Admits `burst` lines per interval, and counts the rest for the next line that is admitted.
#[derive(Debug)]
pub(crate) struct LogLimit {
    burst: u32,
    interval: Duration,
    /// When the current window began; a window begins with a line.
    begun_at: Option<Instant>,
    admitted: u32,
    suppressed: u64,
}

// === impl LogLimit ===

impl LogLimit {
    pub(crate) const fn new(burst: u32, interval: Duration) -> Self {
        Self { burst, interval, begun_at: None, admitted: 0, suppressed: 0 }
    }

    /// Whether a line may be written now: then, how many were suppressed since the last one.
    pub(crate) fn admit(&mut self, now: Instant) -> Option<u64> {
        if self.begun_at.is_none_or(|begun_at| now.duration_since(begun_at) >= self.interval) {
            self.begun_at = Some(now);
            self.admitted = 0;
        }
        if self.admitted < self.burst {
            self.admitted += 1;
            return Some(mem::take(&mut self.suppressed));
        }
        self.suppressed += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);

    #[test]
    fn a_burst_is_admitted_and_the_rest_is_counted() {
        let (mut limit, begun) = (LogLimit::new(3, INTERVAL), Instant::now());
        let after = |secs| begun + Duration::from_secs(secs);
        let admitted: Vec<_> = (0..6).map(|secs| limit.admit(after(secs))).collect();
        assert_eq!(admitted, [Some(0), Some(0), Some(0), None, None, None]);
        assert_eq!(limit.admit(after(9)), None);
        assert_eq!(limit.admit(after(10)), Some(4), "a new window");
        assert_eq!(limit.admit(after(11)), Some(0));
    }

    #[test]
    fn a_window_begins_with_its_first_line() {
        let (mut limit, begun) = (LogLimit::new(1, INTERVAL), Instant::now());
        assert_eq!(limit.admit(begun), Some(0));
        assert_eq!(limit.admit(begun + INTERVAL * 3 / 2), Some(0));
        assert_eq!(limit.admit(begun + INTERVAL * 2), None, "half an interval after the last line");
    }
}
