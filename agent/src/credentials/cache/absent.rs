//! Pods without a cgroup on this node: those that have none yet, and those whose cgroup was removed.
//!
//! Owns that memory. It is as large as what the API server shows of the node, and bounded beyond. Pure: it is told of
//! cgroups and deletions.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::identity::PodUid;

/// Longer than any request, and than late news of a pod that the API server has deleted.
pub(super) const RETENTION: Duration = Duration::from_mins(1);
/// More than a node deletes in that time.
const MAX_ENTRIES: usize = 1024;

/// The pods. Any other may have a cgroup.
#[derive(Debug, Default)]
pub(super) struct AbsentPods(HashMap<PodUid, Absence>);

#[derive(Clone, Copy, Debug)]
enum Absence {
    /// The API server shows it, and no cgroup has been seen yet.
    Pending,
    /// Its cgroup was removed, however long the API server goes on showing the pod.
    CgroupRemoved,
    /// The API server deleted it, too; at this time of the monotonic clock.
    Deleted(Instant),
}

// === impl AbsentPods ===

impl AbsentPods {
    /// It has no cgroup, and none is known to have been removed.
    pub(super) fn pending(&mut self, uid: PodUid) {
        self.0.entry(uid).or_insert(Absence::Pending);
    }

    /// It has a cgroup, again or for the first time.
    pub(super) fn present(&mut self, uid: PodUid) {
        self.0.remove(&uid);
    }

    pub(super) fn cgroup_removed(&mut self, uid: PodUid) {
        self.0.insert(uid, Absence::CgroupRemoved);
    }

    pub(super) fn deleted(&mut self, uid: PodUid, now: Instant) {
        self.0.remove(&uid);
        self.0.retain(|_, absence| !absence.is_over(now));
        let deleted = self.0.values().filter(|absence| matches!(absence, Absence::Deleted(_)));
        if deleted.count() < MAX_ENTRIES {
            self.0.insert(uid, Absence::Deleted(now));
        }
    }

    /// Whether its cgroup was removed, or it was deleted.
    pub(super) fn is_removed(&self, uid: PodUid, now: Instant) -> bool {
        let absence = self.0.get(&uid);
        absence.is_some_and(|absence| !matches!(absence, Absence::Pending) && !absence.is_over(now))
    }

    /// Whether it may have a cgroup.
    pub(super) fn may_run(&self, uid: PodUid) -> bool {
        !self.0.contains_key(&uid)
    }
}

// === impl Absence ===

impl Absence {
    /// Whether it can be forgotten.
    fn is_over(self, now: Instant) -> bool {
        matches!(self, Self::Deleted(since) if now >= since + RETENTION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod_uid;

    #[test]
    fn a_removed_pod_is_absent_until_a_new_cgroup_or_past_retention() {
        let (mut absent, uid, now) = (AbsentPods::default(), pod_uid(), Instant::now());
        let day = Duration::from_hours(24);
        absent.pending(uid);
        assert!(!absent.is_removed(uid, now) && !absent.may_run(uid));
        absent.present(uid);
        assert!(absent.may_run(uid));
        absent.cgroup_removed(uid);
        absent.pending(uid);
        assert!(absent.is_removed(uid, now + day), "late news of it brings nothing back");
        absent.present(uid);
        assert!(!absent.is_removed(uid, now) && absent.may_run(uid), "its containers were started anew");
        absent.deleted(uid, now);
        for (after, is_removed) in [(Duration::ZERO, true), (RETENTION / 2, true), (RETENTION, false)] {
            assert_eq!(absent.is_removed(uid, now + after), is_removed, "{after:?}");
        }
    }

    #[test]
    fn deleted_pods_are_bounded_and_shown_pods_are_not() {
        let (mut absent, now) = (AbsentPods::default(), Instant::now());
        let shown: Vec<_> = (0..2 * MAX_ENTRIES).map(|_| pod_uid()).collect();
        for uid in &shown {
            absent.cgroup_removed(*uid);
            absent.deleted(pod_uid(), now);
        }
        assert!(shown.iter().all(|uid| absent.is_removed(*uid, now)));
        assert_eq!(absent.0.len(), 3 * MAX_ENTRIES);
        absent.deleted(shown[0], now + RETENTION);
        assert_eq!(absent.0.len(), 2 * MAX_ENTRIES);
    }
}
