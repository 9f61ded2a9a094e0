//! What becomes of a pod's credentials as its cgroup and its API object come and go.
//!
//! Never learns of that by itself.

use agent_common::defense::{Defense, holds};
use tokio::time::Instant;

use super::{CredentialCache, State, absent::AbsentPods, in_flight::POD_REMOVED};
use crate::{
    credentials::{Error, scheduler::Key, source::CredentialSource},
    identity::PodUid,
};

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// The pod has no cgroup yet. Its credentials may be fetched, but none can have been served.
    pub fn on_pod_pending(&self, uid: PodUid) {
        self.lock().absent.pending(uid);
    }

    /// The pod has a cgroup, perhaps again: as when the kubelet restarts its containers.
    pub fn on_cgroup_created(&self, uid: PodUid) {
        self.lock().absent.present(uid);
    }

    /// The pod's cgroup was removed. Evicts everything about it, aborts its fetch, and caches nothing for it until it has a
    /// cgroup again, whatever the API server shows.
    pub async fn on_cgroup_removed(&self, uid: PodUid) {
        self.evict_pod(uid, |absent| absent.cgroup_removed(uid)).await;
    }

    /// The API server has deleted the pod, and it has no cgroup. Evicts everything about it; whatever is still in flight is
    /// discarded.
    pub async fn on_pod_deleted(&self, uid: PodUid) {
        self.evict_pod(uid, |absent| absent.deleted(uid, Instant::now())).await;
    }

    async fn evict_pod(&self, uid: PodUid, record: impl FnOnce(&mut AbsentPods)) {
        {
            let mut state = self.lock();
            record(&mut state.absent);
            state.staged.remove(&uid);
            self.cancel(&mut state, Key::Pod(uid));
        }
        self.source.remove_pod(uid).await;
    }
}

impl State {
    /// # Errors
    /// When the pod was removed.
    pub(super) fn ensure_present(&self, uid: PodUid) -> Result<(), Error> {
        if self.absent.is_removed(uid, Instant::now()) && holds(Defense::RemovedPods) {
            return Err(Error::Token { reason: POD_REMOVED.to_owned() });
        }
        Ok(())
    }
}
