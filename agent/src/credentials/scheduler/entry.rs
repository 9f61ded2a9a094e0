//! What the scheduler knows of one key.

use std::time::Duration;

use jiff::Timestamp;

use super::{backoff::Failure, key::FairnessKey, queue::Position, timers::Timer};
use crate::credentials::freshness::Life;

/// How long a failure is remembered when nobody asks: longer than any pause.
pub(super) const RETENTION: Duration = Duration::from_mins(10);

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) fairness_key: FairnessKey,
    pub(super) phase: Phase,
    pub(super) timer: Option<Timer>,
    /// Of the cached credentials.
    pub(super) life: Option<Life>,
    pub(super) refresh_at: Timestamp,
    /// Whether the cached credentials have been served: those that nobody uses are not refreshed.
    pub(super) asked: bool,
    /// Whether a caller waits for the fetch.
    pub(super) waits: bool,
    /// Whether the entry was created before anybody asked.
    pub(super) prefetch: bool,
    /// Answers that the current fetch has lost.
    pub(super) lost: u32,
    pub(super) failed: Option<Failed>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Phase {
    Idle,
    Queued(Position),
    /// Queued again when the timer fires.
    Delayed(Position),
    Running(Position, Timestamp),
    /// Running, but without a slot: its token takes so long that others are fetched meanwhile.
    AwaitingToken(Position),
}

/// The last failures in a row, all of one kind.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failed {
    pub(super) failure: Failure,
    pub(super) times: u32,
    /// Callers without credentials are refused until then.
    pub(super) until: Timestamp,
}

// === impl Entry ===

impl Entry {
    pub(super) fn new(fairness_key: FairnessKey, now: Timestamp) -> Self {
        Self {
            fairness_key,
            phase: Phase::Idle,
            timer: None,
            life: None,
            refresh_at: now,
            asked: false,
            waits: false,
            prefetch: false,
            lost: 0,
            failed: None,
        }
    }
}
