//! What a caller may take of the agent: connections, and log lines.
//!
//! Owns the counts, and the revocation of a removed pod's connections; never closes one, never resolves a caller.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use agent_common::defense::{Defense, holds};
use parking_lot::{Mutex, MutexGuard};

use crate::{identity::PodUid, log_limit::LogLimit};

/// Most connections of one caller. An SDK opens one or two per process, for some milliseconds.
const CONNECTIONS_MAX: u32 = 256;
/// Most lines of one caller per interval in the access log, and as many in the audit log.
const LINES_MAX: u32 = 20;
const LOG_INTERVAL: Duration = Duration::from_secs(1);
/// Past so many callers, those without connections are evicted. Until then their log lines count when they come back.
const MAX_ENTRIES: usize = 2048;

/// What connections are counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum LimitKey {
    /// A pod that the kernel attests.
    Pod(PodUid),
    /// Every anonymous caller at an address.
    Address(IpAddr),
}

/// Counts what callers take. Clones share the counts.
///
/// Behind one lock, unlike the tables of pods: a permit looks at the count and takes from it in one step, and the eviction
/// looks at every caller.
#[derive(Clone, Debug, Default)]
pub struct ConnectionLimit(Arc<Mutex<HashMap<LimitKey, Arc<Caller>>>>);

/// The permit for one open connection, given back when dropped.
#[derive(Debug)]
pub(super) struct ConnectionPermit(Arc<Caller>);

#[derive(Debug)]
struct Caller {
    connections: AtomicU32,
    /// Set when the pod's cgroup is removed: a process that still holds one of its connections is not the pod's.
    is_revoked: AtomicBool,
    access: Mutex<LogLimit>,
    audit: Mutex<LogLimit>,
}

// === impl ConnectionLimit ===

impl ConnectionLimit {
    /// A permit for one more connection; `None` when the caller has as many as it may.
    pub(super) fn permit(&self, key: LimitKey) -> Option<ConnectionPermit> {
        let mut callers = self.callers();
        if callers.len() >= MAX_ENTRIES && !callers.contains_key(&key) {
            callers.retain(|_, caller| caller.connections.load(Relaxed) > 0);
        }
        let caller = callers.entry(key).or_default();
        // Permits are taken under the lock and given back without it, so the count can only fall meanwhile.
        if caller.connections.load(Relaxed) >= CONNECTIONS_MAX && holds(Defense::ConnectionLimit) {
            return None;
        }
        caller.connections.fetch_add(1, Relaxed);
        Some(ConnectionPermit(Arc::clone(caller)))
    }

    /// Revokes the connections of a pod whose cgroup was removed. A pod of the same UID that comes back starts anew.
    pub fn revoke(&self, uid: PodUid) {
        if let Some(caller) = self.callers().remove(&LimitKey::Pod(uid)) {
            caller.is_revoked.store(true, Relaxed);
        }
    }

    fn callers(&self) -> MutexGuard<'_, HashMap<LimitKey, Arc<Caller>>> {
        self.0.lock()
    }
}

// === impl ConnectionPermit ===

impl ConnectionPermit {
    /// Whether the pod that opened the connection has lost its cgroup.
    pub(super) fn is_revoked(&self) -> bool {
        self.0.is_revoked.load(Relaxed) && holds(Defense::RemovedPods)
    }

    /// Whether a line may be logged: then, how many were suppressed since the last one.
    pub(super) fn may_log(&self) -> Option<u64> {
        admit(&self.0.access)
    }

    /// The same for the audit log, with a limit of its own: no caller hides an incident behind its other requests.
    pub(super) fn may_audit(&self) -> Option<u64> {
        admit(&self.0.audit)
    }
}

impl Drop for ConnectionPermit {
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
            is_revoked: AtomicBool::new(false),
            access: lines(),
            audit: lines(),
        }
    }
}

fn admit(limit: &Mutex<LogLimit>) -> Option<u64> {
    limit.lock().admit(Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> LimitKey {
        LimitKey::Address([10, 0, 0, last].into())
    }

    #[test]
    fn each_caller_has_a_limit_and_a_returned_permit_is_given_again() {
        let limit = ConnectionLimit::default();
        let mut permits: Vec<_> = (0..CONNECTIONS_MAX).map(|_| limit.permit(address(1)).unwrap()).collect();
        assert!(limit.permit(address(1)).is_none());
        let other = limit.permit(address(2));
        assert!(other.is_some(), "another's");
        permits.pop();
        let again = limit.permit(address(1));
        assert!(again.is_some());
        assert!(limit.permit(address(1)).is_none());
    }

    #[test]
    fn connections_of_a_removed_pod_are_revoked_and_later_ones_are_not() {
        let (limit, uid) = (ConnectionLimit::default(), crate::testing::pod_uid());
        let left_open = limit.permit(LimitKey::Pod(uid)).unwrap();
        assert!(!left_open.is_revoked());
        limit.revoke(uid);
        assert!(left_open.is_revoked() && limit.callers().is_empty());
        let again = limit.permit(LimitKey::Pod(uid)).unwrap();
        drop(left_open);
        assert!(!again.is_revoked(), "its containers were started anew");
    }

    #[test]
    fn callers_without_connections_are_evicted_past_the_limit() {
        let limit = ConnectionLimit::default();
        let staying = limit.permit(address(1)).unwrap();
        for number in 0..2 * u32::try_from(MAX_ENTRIES).unwrap() {
            limit.permit(LimitKey::Address(IpAddr::from(number.to_be_bytes()))).unwrap();
        }
        assert!(limit.callers().len() <= MAX_ENTRIES);
        assert!(limit.callers().contains_key(&address(1)));
        drop(staying);
    }
}
