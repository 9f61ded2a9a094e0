//! What other components hold for pods and drop with them: credentials and open connections.
//!
//! Owns nothing of it; passes the life of pods on from the control flow.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::{
    control::reconcile::PodLifecycle,
    credentials::{cache::CredentialCache, source::CredentialSource},
    identity::{Pod, PodUid, tree::PodCgroup},
    serve::ConnectionLimit,
    takeover::pod_listeners::PodEvent,
};

/// The components that hold something for pods.
#[derive(Debug)]
pub(super) struct PodState<S> {
    pub(super) cache: Arc<CredentialCache<S>>,
    pub(super) connections: ConnectionLimit,
    pub(super) listeners: mpsc::UnboundedSender<PodEvent>,
}

// === impl PodState ===

impl<S> PodState<S> {
    fn tell_listeners(&self, event: PodEvent) {
        // They have ended while the agent shuts down.
        let _ = self.listeners.send(event);
    }
}

impl<S: CredentialSource> PodLifecycle for PodState<S> {
    fn on_pod_pending(&self, uid: PodUid) {
        self.cache.on_pod_pending(uid);
    }

    fn on_cgroup_created(&self, pod: PodCgroup) {
        self.cache.on_cgroup_created(pod.uid);
        self.tell_listeners(PodEvent::Created(pod.uid, pod.id));
    }

    async fn on_cgroup_removed(&self, uid: PodUid) {
        self.tell_listeners(PodEvent::Removed(uid));
        self.connections.revoke(uid);
        self.cache.on_cgroup_removed(uid).await;
    }

    async fn on_pod_deleted(&self, uid: PodUid) {
        self.tell_listeners(PodEvent::Removed(uid));
        self.connections.revoke(uid);
        self.cache.on_pod_deleted(uid).await;
    }

    fn prefetch(&self, pod: &Arc<Pod>) {
        self.cache.prefetch(pod);
    }
}
