//! What is done without anybody asking: whatever is due, when it is.
//!
//! Owns the task of the schedule, which nothing ends but the engine's end; what is due is the plan's.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, Weak},
    time::Duration,
};

use futures::FutureExt as _;
use jiff::SignedDuration;
use tokio::{sync::Notify, time::sleep};
use tracing::error;

#[cfg(test)]
use super::planted;
use super::{CredentialCache, State};
use crate::credentials::source::CredentialSource;

const AFTER_PANIC: Duration = Duration::from_secs(1);
/// Longest sleep: the clock may be set meanwhile.
const SLEEP_MAX: Duration = Duration::from_mins(1);
/// Pods are counted less often than the schedule is looked at.
const COUNT_EVERY: SignedDuration = SignedDuration::from_secs(10);

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// Does what is due, and tells how long there is nothing to do.
    fn act_when_due(&self) -> Duration {
        let mut state = self.lock();
        #[cfg(test)]
        planted::panic_once();
        self.act_for_now(&mut state);
        self.count(&mut state);
        state.plan.wake_at().map_or(SLEEP_MAX, |at| {
            let left = at.duration_since(self.now()).max(SignedDuration::ZERO);
            left.unsigned_abs().min(SLEEP_MAX)
        })
    }

    /// Counts the pods in need, now and then.
    fn count(&self, state: &mut State) {
        let now = self.now();
        if (state.counted_at..state.counted_at + COUNT_EVERY).contains(&now) {
            return;
        }
        state.counted_at = now;
        let (below_floor, without) = state.plan.in_need(now);
        self.metrics.in_need(below_floor, without);
    }
}

/// Without the schedule nothing is ever refreshed: whatever happens in it, it goes on.
pub(super) async fn supervise<S: CredentialSource>(engine: Weak<CredentialCache<S>>, planned: Arc<Notify>) {
    loop {
        let schedule = keep_schedule(Weak::clone(&engine), Arc::clone(&planned));
        if AssertUnwindSafe(schedule).catch_unwind().await.is_ok() {
            return;
        }
        error!("BUG: the schedule of credentials has panicked; it goes on");
        sleep(AFTER_PANIC).await;
    }
}

/// Does what is due when it is due, for as long as there is an engine.
async fn keep_schedule<S: CredentialSource>(engine: Weak<CredentialCache<S>>, planned: Arc<Notify>) {
    loop {
        let Some(engine) = engine.upgrade() else { return };
        let until = engine.act_when_due();
        drop(engine);
        tokio::select! {
            () = sleep(until) => {}
            () = planned.notified() => {}
        }
    }
}
