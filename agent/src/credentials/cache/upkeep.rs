//! Starts the cache, and runs its schedule for as long as it lives.
//!
//! Owns the upkeep task, which survives panics: without it nothing is ever refreshed. What is due is up to the scheduler.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Weak},
    time::Duration,
};

use futures::FutureExt as _;
use jiff::{SignedDuration, Timestamp};
use papaya::HashMap as ConcurrentMap;
use parking_lot::Mutex;
use tokio::{sync::Notify, time::sleep};
use tracing::error;

use super::{AbsentPods, Budget, CredentialCache, State};
use crate::credentials::{Clock, metrics::CacheMetrics, scheduler::Scheduler, source::CredentialSource};

const PANIC_RETRY_DELAY: Duration = Duration::from_secs(1);
/// Longest sleep, since the wall clock may be set meanwhile.
const MAX_SLEEP: Duration = Duration::from_mins(1);
/// Failing pods are counted less often than the schedule runs.
const COUNT_INTERVAL: SignedDuration = SignedDuration::from_secs(10);

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// An empty cache, and its upkeep task on the current runtime. `seed` is for jitter: it needs no secrecy, and should
    /// differ between nodes.
    pub fn start(source: S, budget: Budget, clock: Clock, seed: u64, metrics: CacheMetrics) -> Arc<Self> {
        let scheduler = Scheduler::new(budget, seed, clock());
        let state = State {
            scheduler,
            records: HashMap::new(),
            staged: HashMap::new(),
            fetches_begun: 0,
            outage: None,
            absent: AbsentPods::default(),
            counted_at: Timestamp::MIN,
        };
        let cache = Arc::new_cyclic(|weak_self| Self {
            source,
            clock,
            ready: ConcurrentMap::new(),
            trusted: ConcurrentMap::new(),
            state: Mutex::new(state),
            schedule_changed: Arc::new(Notify::new()),
            metrics,
            weak_self: Weak::clone(weak_self),
        });
        tokio::spawn(supervise(Arc::downgrade(&cache), Arc::clone(&cache.schedule_changed)));
        cache
    }

    /// Does what is due, and returns how long to sleep.
    fn run_due(&self) -> Duration {
        let mut state = self.lock();
        self.apply_due(&mut state);
        self.count(&mut state);
        state.scheduler.wake_at().map_or(MAX_SLEEP, |at| {
            let wait = at.duration_since(self.now()).max(SignedDuration::ZERO);
            wait.unsigned_abs().min(MAX_SLEEP)
        })
    }

    /// Counts failing pods, now and then.
    fn count(&self, state: &mut State) {
        let now = self.now();
        if (state.counted_at..state.counted_at + COUNT_INTERVAL).contains(&now) {
            return;
        }
        state.counted_at = now;
        let (below_floor, missing) = state.scheduler.count_failing(now);
        self.metrics.set_failing(below_floor, missing);
    }
}

/// Restarts the upkeep task when it panics.
pub(super) async fn supervise<S: CredentialSource>(
    cache: Weak<CredentialCache<S>>,
    schedule_changed: Arc<Notify>,
) {
    loop {
        let schedule = run_schedule(Weak::clone(&cache), Arc::clone(&schedule_changed));
        if AssertUnwindSafe(schedule).catch_unwind().await.is_ok() {
            return;
        }
        error!("BUG: the credential schedule panicked; restarting it");
        sleep(PANIC_RETRY_DELAY).await;
    }
}

/// Does what is due when it is due, until the cache is dropped.
async fn run_schedule<S: CredentialSource>(cache: Weak<CredentialCache<S>>, schedule_changed: Arc<Notify>) {
    loop {
        let Some(cache) = cache.upgrade() else { return };
        let until = cache.run_due();
        drop(cache);
        tokio::select! {
            () = sleep(until) => {}
            () = schedule_changed.notified() => {}
        }
    }
}
