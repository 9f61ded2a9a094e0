//! What a caller may take of the agent: connections, and lines of its log.
//!
//! Owns the counts, and whose connections are nobody's any more; never closes one, never asks whose it is.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use agent_common::defense::{Defense, holds};

use crate::{identity::PodUid, log_limit::LogLimit};

/// Most connections of one caller. An SDK has one or two for each process, and for some milliseconds.
const CONNECTIONS_MAX: u32 = 256;
/// Most lines of one caller per interval in the access log, and as many in the audit log.
const LINES_MAX: u32 = 20;
const LOG_INTERVAL: Duration = Duration::from_secs(1);
/// Callers without connections that are remembered, so that what they have logged counts when they come again.
const REMEMBERED: usize = 2048;

/// Whose connections are counted together.
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

#[derive(Debug)]
struct Caller {
    connections: AtomicU32,
    /// Whether the pod's cgroup was removed: a process that still holds one of its connections is not the pod's.
    is_removed: AtomicBool,
    access: Mutex<LogLimit>,
    audit: Mutex<LogLimit>,
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
            caller.is_removed.store(true, Relaxed);
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
        self.0.is_removed.load(Relaxed) && holds(Defense::GonePods)
    }

    /// Whether a line may be logged, and how many were not since the last one.
    pub(super) fn may_log(&self) -> Option<u64> {
        admit(&self.0.access)
    }

    /// The same for the audit, apart from the rest: nobody hides in what else it does.
    pub(super) fn may_audit(&self) -> Option<u64> {
        admit(&self.0.audit)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Relaxed);
    }
}

// === impl Caller ===

impl Default for Caller {
    fn default() -> Self {
        let lines = || Mutex::new(LogLimit::new(LINES_MAX, LOG_INTERVAL));
        Self {
            connections: AtomicU32::new(0),
            is_removed: AtomicBool::new(false),
            access: lines(),
            audit: lines(),
        }
    }
}

fn admit(limit: &Mutex<LogLimit>) -> Option<u64> {
    limit.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now())
}

#[cfg(test)]
mod tests {
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
    fn a_pod_that_is_removed_is_forgotten_and_what_it_leaves_open_harms_nobody() {
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
}
