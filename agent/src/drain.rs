//! Graceful shutdown: a trigger, its watchers, and a deadline.
//!
//! Owns the signal and the wait; never knows what is shut down.

use std::time::Duration;

use tokio::sync::watch;

/// Begins the shutdown and waits for it. Dropping it begins it too.
#[derive(Debug)]
pub(crate) struct Drain {
    begun: watch::Sender<bool>,
}

/// Learns that the shutdown has begun. Whatever must be finished first holds one.
#[derive(Clone, Debug)]
pub struct DrainWatch {
    begun: watch::Receiver<bool>,
}

/// A drain that has not begun, and its first watcher.
pub(crate) fn drain() -> (Drain, DrainWatch) {
    let (sender, begun) = watch::channel(false);
    (Drain { begun: sender }, DrainWatch { begun })
}

// === impl Drain ===

impl Drain {
    /// Begins, and waits at most `limit` until every watcher is dropped. Whether all were.
    pub(crate) async fn run(self, limit: Duration) -> bool {
        self.begun.send_replace(true);
        tokio::time::timeout(limit, self.begun.closed()).await.is_ok()
    }
}

// === impl DrainWatch ===

impl DrainWatch {
    /// Returns once the shutdown has begun.
    pub async fn begun(&mut self) {
        // An error means that the sender was dropped, which begins the shutdown as well.
        let _ = self.begun.wait_for(|begun| *begun).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn shutdown_waits_for_work_that_is_not_done() {
        let (drain, mut watch) = drain();
        let work = tokio::spawn(async move {
            watch.begun().await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        });
        assert!(drain.run(Duration::from_secs(2)).await);
        work.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn shutdown_does_not_wait_longer_than_its_limit() {
        let (drain, watch) = drain();
        assert!(!drain.run(Duration::from_secs(2)).await);
        drop(watch);
    }
}
