//! What is fetched next: by priority, and fairly between fairness keys.
//!
//! Owns the order; never decides when.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;

use super::key::{FairnessKey, Key, Priority};

/// A place in the queue; the least is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) priority: Priority,
    order: i64,
    sequence: u64,
}

/// The queue. Foreground fetches take turns by fairness key (start-time fair queueing): all but the first of a hundred
/// fetches of one key wait behind everybody who has one. Refreshes are ordered by expiration.
#[derive(Debug, Default)]
pub(super) struct Queue {
    waiting: BTreeMap<Position, Key>,
    /// The turn that is being served, and the next one of each fairness key.
    turn: i64,
    next_turns: HashMap<FairnessKey, i64>,
    last_sequence: u64,
}

// === impl Queue ===

impl Queue {
    /// A position for a fetch that a caller waits for.
    pub(super) fn foreground(&mut self, fairness_key: FairnessKey) -> Position {
        let next = self.next_turns.entry(fairness_key).or_default();
        let order = self.turn.max(*next);
        *next = order + 1;
        self.position(Priority::Foreground, order)
    }

    /// A position for a refresh.
    pub(super) fn refresh(&mut self, expiration: Timestamp) -> Position {
        self.position(Priority::Refresh, expiration.as_millisecond())
    }

    /// A position for a prefetch.
    pub(super) fn prefetch(&mut self) -> Position {
        self.position(Priority::Prefetch, 0)
    }

    pub(super) fn insert(&mut self, position: Position, key: Key) {
        self.waiting.insert(position, key);
    }

    pub(super) fn remove(&mut self, position: Position) {
        self.waiting.remove(&position);
        self.reset_if_empty();
    }

    /// The priority of the next fetch.
    pub(super) fn first(&self) -> Option<Priority> {
        self.waiting.first_key_value().map(|(position, _)| position.priority)
    }

    /// Takes the next fetch.
    pub(super) fn pop(&mut self) -> Option<(Position, Key)> {
        let first = self.waiting.pop_first()?;
        if first.0.priority == Priority::Foreground {
            self.turn = self.turn.max(first.0.order);
        }
        self.reset_if_empty();
        Some(first)
    }

    fn position(&mut self, priority: Priority, order: i64) -> Position {
        self.last_sequence += 1;
        Position { priority, order, sequence: self.last_sequence }
    }

    /// With nobody waiting, past turns no longer matter.
    fn reset_if_empty(&mut self) {
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
    fn a_key_with_a_hundred_fetches_waits_behind_those_with_one() {
        let mut queue = Queue::default();
        let greedy = FairnessKey::Address([10, 0, 0, 1].into());
        for digest in 0..100 {
            let position = queue.foreground(greedy);
            queue.insert(position, Key::Token([digest; 32]));
        }
        let modest: Vec<_> = (0..3).map(|_| pod_uid()).collect();
        for uid in &modest {
            let position = queue.foreground(FairnessKey::Pod(*uid));
            queue.insert(position, Key::Pod(*uid));
        }
        let first: Vec<_> = (0..4).map(|_| queue.pop().unwrap().1).collect();
        assert!(modest.iter().all(|uid| first.contains(&Key::Pod(*uid))), "{first:?}");
    }

    #[test]
    fn callers_precede_refreshes_by_expiration_then_prefetches() {
        let mut queue = Queue::default();
        let at = |second| Timestamp::from_second(second).unwrap();
        let [caller, soon, late, ahead] = std::array::from_fn(|_| pod_uid());
        for (position, uid) in [
            (queue.prefetch(), ahead),
            (queue.refresh(at(200)), late),
            (queue.refresh(at(100)), soon),
            (queue.foreground(FairnessKey::Pod(caller)), caller),
        ] {
            queue.insert(position, Key::Pod(uid));
        }
        for uid in [caller, soon, late, ahead] {
            assert_eq!(queue.pop().unwrap().1, Key::Pod(uid));
        }
        assert!(queue.pop().is_none());
    }
}
