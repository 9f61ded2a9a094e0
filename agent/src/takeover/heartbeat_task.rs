//! Tells the programs that this agent is alive, as long as it serves.
//!
//! Owns when that is said and for how long it may fail; never waits for a command to the programs, never decides which
//! agent is active.

use std::{fmt::Display, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::error;

/// Time between two heartbeats: a few may be late before pods are refused.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(250);
/// For how long the kernel may refuse a heartbeat: longer than any shortage that passes. Then the agent is restarted.
const FAILING_MAX: Duration = Duration::from_secs(10);

/// Calls `write` until it has failed for too long.
pub async fn run<T, E: Display>(write: impl Fn() -> Result<T, E> + Send) {
    let mut ticks = interval(HEARTBEAT_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing_since = None;
    loop {
        ticks.tick().await;
        let Err(error) = write() else {
            failing_since = None;
            continue;
        };
        error!(%error, "cannot tell the kernel that this agent is alive; pods are refused after 2 s");
        if failing_since.get_or_insert_with(Instant::now).elapsed() >= FAILING_MAX {
            return;
        }
    }
}
