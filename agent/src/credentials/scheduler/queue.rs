//! What is fetched next: callers who wait before refreshes before prefetches, and fair between those who pay.
//!
//! Owns the order; never decides when.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use jiff::Timestamp;

use super::Key;
use crate::identity::PodUid;

/// For whom something is fetched, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// A caller waits, or soon nothing is left to serve.
    Foreground,
    /// What is served will be too old some day.
    Refresh,
    /// Somebody is going to ask.
    Prefetch,
}

/// LimitKey turn a fetch costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum FairnessKey {
    /// The pod's.
    Pod(PodUid),
    /// That of whoever is at an address, for callers whose pod nobody vouches for.
    Address(IpAddr),
}

/// A place in the queue; the least is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    pub(super) class: Class,
    order: i64,
    ticket: u64,
}

/// The queue. Callers take turns by fairness_key (start-time fair queueing): whoever has a hundred fetches waits with all but the
/// first behind everybody who has one. Refreshes go by expiration.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: BTreeMap<Rank, Key>,
    /// The turn that is being served, and each fairness_key's next one.
    turn: i64,
    next_turns: HashMap<FairnessKey, i64>,
    tickets: u64,
}

// === impl Queue ===

impl Queue {
    /// A place for a caller.
    pub(super) fn foreground(&mut self, fairness_key: FairnessKey) -> Rank {
        let next = self.next_turns.entry(fairness_key).or_default();
        let order = self.turn.max(*next);
        *next = order + 1;
        self.rank(Class::Foreground, order)
    }

    /// A place for a refresh.
    pub(super) fn refresh(&mut self, expiration: Timestamp) -> Rank {
        self.rank(Class::Refresh, expiration.as_millisecond())
    }

    /// A place for a prefetch.
    pub(super) fn prefetch(&mut self) -> Rank {
        self.rank(Class::Prefetch, 0)
    }

    pub(super) fn insert(&mut self, rank: Rank, key: Key) {
        self.waiting.insert(rank, key);
    }

    pub(super) fn remove(&mut self, rank: Rank) {
        self.waiting.remove(&rank);
        self.rest();
    }

    /// The class of what is next.
    pub(super) fn first(&self) -> Option<Class> {
        self.waiting.first_key_value().map(|(rank, _)| rank.class)
    }

    /// Takes what is next.
    pub(super) fn pop(&mut self) -> Option<(Rank, Key)> {
        let first = self.waiting.pop_first()?;
        if first.0.class == Class::Foreground {
            self.turn = self.turn.max(first.0.order);
        }
        self.rest();
        Some(first)
    }

    fn rank(&mut self, class: Class, order: i64) -> Rank {
        self.tickets += 1;
        Rank { class, order, ticket: self.tickets }
    }

    /// Nobody owes a turn to an empty queue.
    fn rest(&mut self) {
        if self.waiting.is_empty() {
            self.turn = 0;
            self.next_turns.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod_uid;

    #[test]
    fn who_has_a_hundred_waits_behind_those_who_have_one() {
        let mut queue = Queue::default();
        let greedy = FairnessKey::Address([10, 0, 0, 1].into());
        for digest in 0..100 {
            let rank = queue.foreground(greedy);
            queue.insert(rank, Key::Token([digest; 32]));
        }
        let modest: Vec<_> = (0..3).map(|_| pod_uid()).collect();
        for uid in &modest {
            let rank = queue.foreground(FairnessKey::Pod(*uid));
            queue.insert(rank, Key::Pod(*uid));
        }
        let first: Vec<_> = (0..4).map(|_| queue.pop().unwrap().1).collect();
        assert!(modest.iter().all(|uid| first.contains(&Key::Pod(*uid))), "{first:?}");
    }

    #[test]
    fn callers_come_before_refreshes_by_expiration_before_prefetches() {
        let mut queue = Queue::default();
        let at = |second| Timestamp::from_second(second).unwrap();
        let [caller, soon, late, ahead] = std::array::from_fn(|_| pod_uid());
        for (rank, uid) in [
            (queue.prefetch(), ahead),
            (queue.refresh(at(200)), late),
            (queue.refresh(at(100)), soon),
            (queue.foreground(FairnessKey::Pod(caller)), caller),
        ] {
            queue.insert(rank, Key::Pod(uid));
        }
        for uid in [caller, soon, late, ahead] {
            assert_eq!(queue.pop().unwrap().1, Key::Pod(uid));
        }
        assert!(queue.pop().is_none());
    }
}
