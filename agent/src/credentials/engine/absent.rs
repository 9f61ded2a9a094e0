//! Pods that have no cgroup on this node: those that have none yet, and those that have none any more.
//!
//! Owns that memory, which is as large as what the API server shows of the node, and bounded beyond; never learns by
//! itself that a cgroup comes or goes.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use crate::identity::PodUid;

/// Longer than any request, and than news of a pod take that the API server has no more.
pub(super) const REMEMBERED: Duration = Duration::from_mins(1);
/// More than a node loses in that time.
const MOST: usize = 1024;

/// The pods. Whoever is not among them may have a cgroup.
#[derive(Debug, Default)]
pub(super) struct Absent(HashMap<PodUid, Absence>);

#[derive(Clone, Copy, Debug)]
enum Absence {
    /// The API server has shown it, and no cgroup has been seen.
    Awaited,
    /// Its cgroup is gone, for however long the API server goes on to show the pod.
    Gone,
    /// The API server has it no more either, since then. By a clock that nobody sets.
    Deleted(Instant),
}

// === impl Absent ===

impl Absent {
    /// It has no cgroup, and none of it is known to be gone.
    pub(super) fn awaits(&mut self, uid: PodUid) {
        self.0.entry(uid).or_insert(Absence::Awaited);
    }

    /// It has a cgroup, again or for the first time.
    pub(super) fn came(&mut self, uid: PodUid) {
        self.0.remove(&uid);
    }

    pub(super) fn gone(&mut self, uid: PodUid) {
        self.0.insert(uid, Absence::Gone);
    }

    pub(super) fn deleted(&mut self, uid: PodUid, now: Instant) {
        self.0.remove(&uid);
        self.0.retain(|_, absence| !absence.is_over(now));
        let deleted = self.0.values().filter(|absence| matches!(absence, Absence::Deleted(_)));
        if deleted.count() < MOST {
            self.0.insert(uid, Absence::Deleted(now));
        }
    }

    /// Whether it had a cgroup, or is no more.
    pub(super) fn is_gone(&self, uid: PodUid, now: Instant) -> bool {
        let absence = self.0.get(&uid);
        absence.is_some_and(|absence| !matches!(absence, Absence::Awaited) && !absence.is_over(now))
    }

    /// Whether it may have a cgroup.
    pub(super) fn may_run(&self, uid: PodUid) -> bool {
        !self.0.contains_key(&uid)
    }
}

// === impl Absence ===

impl Absence {
    /// Whether nobody speaks of it any more.
    fn is_over(self, now: Instant) -> bool {
        matches!(self, Self::Deleted(since) if now >= since + REMEMBERED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod_uid;

    #[test]
    fn who_is_gone_stays_so_until_a_cgroup_comes_or_a_minute_after_its_deletion() {
        let (mut absent, uid, now) = (Absent::default(), pod_uid(), Instant::now());
        let day = Duration::from_hours(24);
        absent.awaits(uid);
        assert!(!absent.is_gone(uid, now) && !absent.may_run(uid));
        absent.came(uid);
        assert!(absent.may_run(uid));
        absent.gone(uid);
        absent.awaits(uid);
        assert!(absent.is_gone(uid, now + day), "late news of it bring nothing back");
        absent.came(uid);
        assert!(!absent.is_gone(uid, now) && absent.may_run(uid), "its containers were started anew");
        absent.deleted(uid, now);
        for (after, is_gone) in [(Duration::ZERO, true), (REMEMBERED / 2, true), (REMEMBERED, false)] {
            assert_eq!(absent.is_gone(uid, now + after), is_gone, "{after:?}");
        }
    }

    #[test]
    fn those_that_nobody_shows_are_bounded_and_those_that_the_api_server_shows_are_all_kept() {
        let (mut absent, now) = (Absent::default(), Instant::now());
        let shown: Vec<_> = (0..2 * MOST).map(|_| pod_uid()).collect();
        for uid in &shown {
            absent.gone(*uid);
            absent.deleted(pod_uid(), now);
        }
        assert!(shown.iter().all(|uid| absent.is_gone(*uid, now)));
        assert_eq!(absent.0.len(), 3 * MOST);
        absent.deleted(shown[0], now + REMEMBERED);
        assert_eq!(absent.0.len(), 2 * MOST);
    }
}
