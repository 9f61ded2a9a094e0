//! What other components hold for pods and drop with them: credentials and open connections.
//!
//! Owns nothing of it; passes the life of pods on from the control flow.

use std::sync::Arc;

use crate::{
    control::reconcile::PodLifecycle,
    credentials::{cache::CredentialCache, source::CredentialSource},
    identity::{Pod, PodUid},
    serve::ConnectionLimit,
};

/// The components that hold something for pods.
#[derive(Debug)]
pub(super) struct PodState<S> {
    pub(super) cache: Arc<CredentialCache<S>>,
    pub(super) connections: ConnectionLimit,
}

// === impl PodState ===

impl<S: CredentialSource> PodLifecycle for PodState<S> {
    fn on_pod_pending(&self, uid: PodUid) {
        self.cache.on_pod_pending(uid);
    }

    fn on_cgroup_created(&self, uid: PodUid) {
        self.cache.on_cgroup_created(uid);
    }

    async fn on_cgroup_removed(&self, uid: PodUid) {
        self.connections.revoke(uid);
        self.cache.on_cgroup_removed(uid).await;
    }

    async fn on_pod_deleted(&self, uid: PodUid) {
        self.connections.revoke(uid);
        self.cache.on_pod_deleted(uid).await;
    }

    fn prefetch(&self, pod: &Arc<Pod>) {
        self.cache.prefetch(pod);
    }
}
