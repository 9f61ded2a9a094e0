//! Bugs that the tests plant, to show that the model finds them. Not part of a build that is no test.

use std::cell::Cell;

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::credentials) enum Bug {
    /// A caller who comes while a fetch is under way gets another one.
    TwoFlights,
    /// What is at hand is never looked at for its end.
    ExpiredOut,
    /// What is fetched for a pod is kept for another one too.
    Mixed,
    /// Whoever waits is not told.
    LostWakeUp,
}

thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// Plants a bug in everything on this thread, or none.
pub(super) fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this bug is planted.
pub(in crate::credentials) fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}
