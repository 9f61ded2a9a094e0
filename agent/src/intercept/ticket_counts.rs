//! How many tickets each pod has that can be redeemed.
//!
//! Owns which of these counts are there, so that a known pod never lacks room for its own; the programs count.

use agent_common::abi::map;
use aya::maps::MapError;

use super::{
    Error,
    maps::{errno, reading, remove, writing},
    object::Object,
};

/// An entry is made, and none is changed: `include/uapi/linux/bpf.h`.
const BPF_NOEXIST: u64 = 1;

// === impl Object ===

impl Object {
    /// Gives a known pod its count of tickets before it connects, so that it never depends on the room that unknown ones
    /// leave.
    pub(super) fn make_room_for(&mut self, pod_cgroup_id: u64) -> Result<(), Error> {
        if self.make_count(pod_cgroup_id)? {
            return Ok(());
        }
        self.remove_idle_counts()?;
        if self.make_count(pod_cgroup_id)? {
            return Ok(());
        }
        // So many unknown pods have connections under way. One loses its count, or a few that connect faster than this is
        // reported.
        for (unknown, _) in self.counts_of_unknown()? {
            remove(&mut self.pod_tickets, unknown).map_err(writing(map::POD_TICKETS))?;
            if self.make_count(pod_cgroup_id)? {
                break;
            }
        }
        Ok(())
    }

    /// False when there is no room. A count that is there stays.
    fn make_count(&mut self, cgroup_id: u64) -> Result<bool, Error> {
        match self.pod_tickets.insert(cgroup_id, 0, BPF_NOEXIST) {
            Err(error) if errno(&error) == Some(libc::E2BIG) => Ok(false),
            Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(true),
            result => result.map(|()| true).map_err(writing(map::POD_TICKETS)),
        }
    }

    /// How many tickets can be redeemed, of all pods.
    pub(super) fn live_tickets(&self) -> Result<u64, Error> {
        let count = self.tickets.keys().try_fold(0, |count, key| key.map(|_| count + 1));
        count.map_err(reading(map::TICKETS))
    }

    /// How many of them count for this pod.
    pub(super) fn live_tickets_of(&self, pod_cgroup_id: u64) -> Result<Option<u64>, Error> {
        match self.pod_tickets.get(&pod_cgroup_id, 0) {
            Err(MapError::KeyNotFound) => Ok(None),
            result => result.map(Some).map_err(reading(map::POD_TICKETS)),
        }
    }

    /// Removes the counts of those that are no known pods and have no ticket: removed pods, and what was counted
    /// while nothing was known of its pod.
    ///
    /// A count that is removed while its pod connects leaves that one ticket uncounted, no more.
    pub(super) fn remove_idle_counts(&mut self) -> Result<(), Error> {
        for (cgroup_id, count) in self.counts_of_unknown()? {
            if count == 0 {
                remove(&mut self.pod_tickets, cgroup_id).map_err(writing(map::POD_TICKETS))?;
            }
        }
        Ok(())
    }

    /// The counts of those that are no known pods, by cgroup.
    fn counts_of_unknown(&self) -> Result<Vec<(u64, u64)>, Error> {
        let counts = self.pod_tickets.iter().collect::<Result<Vec<_>, _>>();
        let mut counts = counts.map_err(reading(map::POD_TICKETS))?;
        counts.retain(|(cgroup, _)| matches!(self.policies.get(cgroup, 0), Err(MapError::KeyNotFound)));
        Ok(counts)
    }
}
