//! Bugs that the tests plant, to show that they are found. Not part of a build that is no test.

use std::cell::Cell;

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::credentials) enum Bug {
    /// A caller who comes while a fetch is under way gets another one.
    TwoFlights,
    /// What is cached is never looked at for its end.
    ExpiredOut,
    /// What is fetched for a pod is kept for another one too.
    Mixed,
    /// Whoever waits is not told.
    LostWakeUp,
    /// Whoever waits for a turn that comes no more is not told.
    QueueNotTold,
    /// Who has not found anything does not look again when nobody else can put anything there.
    OneLook,
    /// A token that nobody has judged opens what is kept for the pod that it names.
    ForgedOpens,
    /// The schedule is not told of what is planned.
    NotifyLost,
    /// Whoever waits is not told of an error.
    ErrorNotTold,
    /// What is kept for a pod that is gone stays.
    ForgetLeaves,
    /// The schedule panics, once.
    Panic,
}

thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// Plants a bug in everything on this thread, or none. Where an engine runs on several, each has to be planted.
pub(super) fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Panics if that is planted, and then no more.
pub(super) fn panic_once() {
    if planted(Bug::Panic) {
        plant(None);
        panic!("planted");
    }
}

/// Whether this bug is planted.
pub(in crate::credentials) fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}
