//! Which pods are podgate's own: their agents have said so, which takes access to the maps.
//!
//! Owns a handle of its own on their map: who asks waits for nobody.

use agent_common::abi::{EXEMPT_PODGATE, map};
use aya::maps::{HashMap, MapData, MapError};

use super::{Error, maps::reading};

/// Tells which pods are podgate's.
#[derive(Debug)]
pub struct PodgatePods(HashMap<MapData, u64, u64>);

// === impl PodgatePods ===

impl PodgatePods {
    pub(super) fn new(map: HashMap<MapData, u64, u64>) -> Self {
        Self(map)
    }

    /// Whether the pod with this cgroup is one.
    pub fn contains(&self, pod_cgroup_id: u64) -> Result<bool, Error> {
        match self.0.get(&pod_cgroup_id, 0) {
            Err(MapError::KeyNotFound) => Ok(false),
            result => result.map(|why| why == EXEMPT_PODGATE).map_err(reading(map::EXEMPT)),
        }
    }
}
