//! What the agent learns from the API server, event by event.

use std::sync::Arc;

use super::{Pod, PodUid};

/// A change of the cluster that concerns this node.
#[derive(Clone, Debug)]
pub enum ClusterEvent {
    /// A pod is new, or something that podgate caches of it changed.
    PodChanged(Arc<Pod>),
    /// The API server no longer has a pod. Its containers may still be terminating.
    PodDeleted(PodUid),
    /// Every pod of the node was reported once. Sent again after the watch was down.
    PodsSynced,
    /// A namespace is new, or its annotations changed.
    NamespaceChanged(String),
    /// Every namespace was reported once. Sent again after the watch was down.
    NamespacesSynced,
}
