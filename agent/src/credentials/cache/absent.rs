//! Pods that have no cgroup on this node: those that have none yet, and those that have none any more.
//!
//! Owns that memory, and what the engine makes of it. It is as large as what the API server shows of the node, and bounded
//! beyond. Never learns by itself that a cgroup comes or goes.

use std::{collections::HashMap, time::Duration};

use agent_common::defense::{Defense, holds};
use tokio::time::Instant;

use super::{CredentialCache, State};
use crate::{
    credentials::{Error, scheduler::Key, source::CredentialSource},
    identity::PodUid,
};

/// Longer than any request, and than news of a pod take that the API server has no more.
pub(super) const REMEMBERED: Duration = Duration::from_mins(1);
/// More than a node loses in that time.
const MOST: usize = 1024;
/// What callers are told.
pub(super) const POD_IS_GONE: &str = "the pod is gone";

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

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// The pod has no cgroup yet. Its credentials may be fetched, but nobody can have had any.
    pub fn on_pod_pending(&self, uid: PodUid) {
        self.lock().absent.awaits(uid);
    }

    /// The pod has a cgroup, perhaps again: as when the kubelet starts its containers anew.
    pub fn on_cgroup_created(&self, uid: PodUid) {
        self.lock().absent.came(uid);
    }

    /// The pod's cgroup is gone. Drops everything about it, a fetch under way included, and nothing is kept for it until it
    /// has a cgroup again, whatever the API server shows.
    pub async fn gone(&self, uid: PodUid) {
        self.drop_pod(uid, |absent| absent.gone(uid)).await;
    }

    /// The API server has the pod no more, and it has no cgroup. Drops everything about it; what is still on its way counts
    /// for nothing.
    pub async fn forget(&self, uid: PodUid) {
        self.drop_pod(uid, |absent| absent.deleted(uid, Instant::now())).await;
    }

    async fn drop_pod(&self, uid: PodUid, note: impl FnOnce(&mut Absent)) {
        {
            let mut state = self.lock();
            note(&mut state.absent);
            state.held.remove(&uid);
            self.give_up(&mut state, Key::Pod(uid));
        }
        self.source.forget(uid).await;
    }
}

impl State {
    /// # Errors
    /// When the pod is gone.
    pub(super) fn is_here(&self, uid: PodUid) -> Result<(), Error> {
        if self.absent.is_gone(uid, Instant::now()) && holds(Defense::GonePods) {
            return Err(Error::Token { reason: POD_IS_GONE.to_owned() });
        }
        Ok(())
    }
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
