//! What is kept for pods, and goes with them.
//!
//! Owns nothing of it; passes on that a pod comes or is gone.

use std::sync::Arc;

use crate::{
    credentials::{engine::Engine, source::CredentialSource},
    enforce::Forget,
    identity::{Pod, PodUid},
    serve::ConnectionLimit,
};

/// Credentials and limits.
#[derive(Debug)]
pub(super) struct Kept<S> {
    pub(super) engine: Arc<Engine<S>>,
    pub(super) connections: ConnectionLimit,
}

// === impl Kept ===

impl<S: CredentialSource> Forget for Kept<S> {
    fn awaits_cgroup(&self, uid: PodUid) {
        self.engine.awaits_cgroup(uid);
    }

    fn has_cgroup(&self, uid: PodUid) {
        self.engine.has_cgroup(uid);
    }

    async fn gone(&self, uid: PodUid) {
        self.connections.end(uid);
        self.engine.gone(uid).await;
    }

    async fn forget(&self, uid: PodUid) {
        self.connections.end(uid);
        self.engine.forget(uid).await;
    }

    fn prefetch(&self, pod: &Arc<Pod>) {
        self.engine.prefetch(pod);
    }
}
