//! Pods that are gone, for as long as somebody may still speak of them.
//!
//! Owns that memory, which is bounded; never learns by itself that a pod is gone.

use std::collections::HashMap;

use jiff::{SignedDuration, Timestamp};

use crate::identity::PodUid;

/// Longer than any request, and than news of a pod take.
pub(super) const REMEMBERED: SignedDuration = SignedDuration::from_mins(1);
/// More than a node loses in that time.
const MOST: usize = 1024;

/// The pods, and since when.
#[derive(Debug, Default)]
pub(super) struct Gone(HashMap<PodUid, Timestamp>);

// === impl Gone ===

impl Gone {
    pub(super) fn insert(&mut self, uid: PodUid, now: Timestamp) {
        self.0.retain(|_, since| is_recent(*since, now));
        if self.0.len() < MOST {
            self.0.insert(uid, now);
        }
    }

    pub(super) fn contains(&self, uid: PodUid, now: Timestamp) -> bool {
        self.0.get(&uid).is_some_and(|since| is_recent(*since, now))
    }
}

fn is_recent(since: Timestamp, now: Timestamp) -> bool {
    (since..since + REMEMBERED).contains(&now)
}
