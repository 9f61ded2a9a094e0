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
    async fn forget(&self, uid: PodUid) {
        self.connections.forget(uid);
        self.engine.forget(uid).await;
    }

    fn prefetch(&self, pod: &Arc<Pod>) {
        self.engine.prefetch(pod);
    }
}
