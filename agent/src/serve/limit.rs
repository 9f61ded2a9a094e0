//! What a caller may take of the agent: connections, and lines of its log.
//!
//! Owns the counts, and whose connections are nobody's any more; never closes one, never asks whose it is.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use agent_common::defense::{Defense, holds};

use crate::identity::PodUid;

/// Most connections of one caller. An SDK has one or two for each process, and for some milliseconds.
const CONNECTIONS_MAX: u32 = 256;
/// Most lines of one caller in a second, and most of them in its audit.
const LINES_MAX: u32 = 20;
/// Callers without connections that are remembered, so that what they have logged counts when they come again.
const REMEMBERED: usize = 2048;

/// LimitKey connections are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum LimitKey {
    /// A pod that the kernel vouches for.
    Pod(PodUid),
    /// Everybody else at an address.
    Address(IpAddr),
}

/// Counts what callers take. Clones share the counts.
#[derive(Clone, Debug, Default)]
pub struct ConnectionLimit(Arc<Mutex<HashMap<LimitKey, Arc<Caller>>>>);

/// One connection's place; it is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place(Arc<Caller>);

#[derive(Debug, Default)]
struct Caller {
    connections: AtomicU32,
    /// Whether it is a pod whose cgroup is gone: whoever has its connections now is somebody else.
    is_gone: AtomicBool,
    log: Lines,
    audit: Lines,
}

/// Lines of one second.
#[derive(Debug)]
struct Lines {
    since: Instant,
    /// The second since then, and how many lines it has: 32 bits each.
    window: AtomicU64,
    /// Lines that were not written.
    left_out: AtomicU64,
}

// === impl ConnectionLimit ===

impl ConnectionLimit {
    /// Takes a place; `None` when all are taken.
    pub(super) fn enter(&self, whose: LimitKey) -> Option<Place> {
        let mut callers = self.callers();
        if callers.len() >= REMEMBERED && !callers.contains_key(&whose) {
            callers.retain(|_, caller| caller.connections.load(Relaxed) > 0);
        }
        let caller = callers.entry(whose).or_default();
        // Others only give back meanwhile: places are taken under the lock.
        if caller.connections.load(Relaxed) >= CONNECTIONS_MAX && holds(Defense::ConnectionLimit) {
            return None;
        }
        caller.connections.fetch_add(1, Relaxed);
        Some(Place(Arc::clone(caller)))
    }

    /// The pod is gone, and its connections are nobody's from now on. One of the same UID that comes again has others.
    pub fn end(&self, uid: PodUid) {
        if let Some(caller) = self.callers().remove(&LimitKey::Pod(uid)) {
            caller.is_gone.store(true, Relaxed);
        }
    }

    fn callers(&self) -> MutexGuard<'_, HashMap<LimitKey, Arc<Caller>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Place ===

impl Place {
    /// Whether the connection is that of a pod which is gone.
    pub(super) fn is_revoked(&self) -> bool {
        self.0.is_gone.load(Relaxed) && holds(Defense::GonePods)
    }

    /// Whether a line may be logged, and how many were not since the last one.
    pub(super) fn may_log(&self) -> Option<u64> {
        self.0.log.one_more(Instant::now())
    }

    /// The same for the audit, apart from the rest: nobody hides in what else it does.
    pub(super) fn may_audit(&self) -> Option<u64> {
        self.0.audit.one_more(Instant::now())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}

// === impl Lines ===

impl Default for Lines {
    fn default() -> Self {
        Self { since: Instant::now(), window: AtomicU64::new(0), left_out: AtomicU64::new(0) }
    }
}

impl Lines {
    fn one_more(&self, now: Instant) -> Option<u64> {
        let second = now.duration_since(self.since).as_secs() << 32;
        let count = |window: u64| if window & !u64::from(u32::MAX) == second { window } else { second };
        let before =
            self.window.fetch_update(Relaxed, Relaxed, |window| Some(count(window).saturating_add(1)));
        let lines = count(before.unwrap_or_else(|window| window)) & u64::from(u32::MAX);
        if lines < u64::from(LINES_MAX) {
            return Some(self.left_out.swap(0, Relaxed));
        }
        self.left_out.fetch_add(1, Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn address(last: u8) -> LimitKey {
        LimitKey::Address([10, 0, 0, last].into())
    }

    #[test]
    fn each_caller_has_so_many_places_and_a_free_one_is_taken_again() {
        let limit = ConnectionLimit::default();
        let mut places: Vec<_> = (0..CONNECTIONS_MAX).map(|_| limit.enter(address(1)).unwrap()).collect();
        assert!(limit.enter(address(1)).is_none());
        let other = limit.enter(address(2));
        assert!(other.is_some(), "another's");
        places.pop();
        let again = limit.enter(address(1));
        assert!(again.is_some());
        assert!(limit.enter(address(1)).is_none());
    }

    #[test]
    fn a_pod_that_is_gone_is_forgotten_and_what_it_leaves_open_harms_nobody() {
        let (limit, uid) = (ConnectionLimit::default(), crate::testing::pod_uid());
        let left_open = limit.enter(LimitKey::Pod(uid)).unwrap();
        assert!(!left_open.is_revoked());
        limit.end(uid);
        assert!(left_open.is_revoked() && limit.callers().is_empty());
        let again = limit.enter(LimitKey::Pod(uid)).unwrap();
        drop(left_open);
        assert!(!again.is_revoked(), "its containers were started anew");
    }

    #[test]
    fn callers_who_are_gone_are_forgotten_before_there_are_too_many() {
        let limit = ConnectionLimit::default();
        let staying = limit.enter(address(1)).unwrap();
        for number in 0..2 * u32::try_from(REMEMBERED).unwrap() {
            limit.enter(LimitKey::Address(IpAddr::from(number.to_be_bytes()))).unwrap();
        }
        assert!(limit.callers().len() <= REMEMBERED);
        assert!(limit.callers().contains_key(&address(1)));
        drop(staying);
    }

    #[test]
    fn a_caller_has_so_many_lines_a_second_and_those_left_out_are_told() {
        let lines = Lines::default();
        let at = |millis| lines.since + Duration::from_millis(millis);
        for millis in 0..u64::from(LINES_MAX) {
            assert_eq!(lines.one_more(at(millis)), Some(0));
        }
        for _ in 0..3 {
            assert_eq!(lines.one_more(at(900)), None);
        }
        assert_eq!(lines.one_more(at(1000)), Some(3));
        assert_eq!(lines.one_more(at(1001)), Some(0));
    }
}
