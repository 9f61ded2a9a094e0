//! What the agent learns from the API server, as it happens.

use std::sync::Arc;

use super::{Pod, PodUid};

/// Annotations that podgate reads begin with this; others are not kept.
pub(super) const ANNOTATION_PREFIX: &str = "podgate.dev/";

/// A change of the cluster that concerns this node.
#[derive(Clone, Debug)]
pub enum ClusterEvent {
    /// A pod is new, or something that podgate remembers of it changed.
    PodChanged(Arc<Pod>),
    /// The API server has a pod no more. Its containers may still be terminating.
    PodDeleted(PodUid),
    /// Every pod of the node has been told of once. Comes again after the watch was away.
    PodsSynced,
    /// A namespace is new, or its annotations changed.
    NamespaceChanged(String),
    /// Every namespace has been told of once. Comes again after the watch was away.
    NamespacesSynced,
}
