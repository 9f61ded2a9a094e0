//! How many connections a caller may have open, so that none takes the agent's descriptors and memory from the others.
//!
//! Owns the counts; never closes a connection, never asks whose it is.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use agent_common::defence::{Defence, holds};

use crate::identity::PodUid;

/// Most connections of one caller. An SDK has one or two for each process, and for some milliseconds.
const CONNECTIONS_MAX: u32 = 256;

/// Whose connections are counted together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Whose {
    /// A pod that the kernel vouches for.
    Pod(PodUid),
    /// Everybody else at an address.
    Address(IpAddr),
}

/// Counts open connections. Clones share the counts.
#[derive(Clone, Debug, Default)]
pub struct ConnectionLimit(Arc<Mutex<HashMap<Whose, u32>>>);

/// One connection's place; it is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    limit: ConnectionLimit,
    whose: Whose,
}

// === impl ConnectionLimit ===

impl ConnectionLimit {
    /// Takes a place; `None` when all are taken.
    pub(super) fn enter(&self, whose: Whose) -> Option<Place> {
        let mut counts = self.counts();
        let count = counts.entry(whose).or_default();
        if *count >= CONNECTIONS_MAX && holds(Defence::ConnectionLimit) {
            return None;
        }
        *count += 1;
        Some(Place { limit: self.clone(), whose })
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<Whose, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Place ===

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.limit.counts();
        if let Some(count) = counts.get_mut(&self.whose) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.whose);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> Whose {
        Whose::Address([10, 0, 0, last].into())
    }

    #[test]
    fn each_caller_has_so_many_places_and_a_free_one_is_taken_again() {
        let limit = ConnectionLimit::default();
        let mut places: Vec<_> = (0..CONNECTIONS_MAX).map(|_| limit.enter(address(1)).unwrap()).collect();
        assert!(limit.enter(address(1)).is_none());
        let other = limit.enter(address(2));
        assert!(other.is_some(), "another's");
        places.pop();
        let again = limit.enter(address(1));
        assert!(again.is_some());
        assert!(limit.enter(address(1)).is_none());
        drop((places, other, again));
        assert!(limit.counts().is_empty(), "nothing is kept of who is gone");
    }
}
