//! Ends work in order: a trigger, its watchers, and a deadline.
//!
//! Knows nothing of what is ended.

use std::time::Duration;

use tokio::sync::watch;

/// Begins the end, and waits for it. Dropping it begins it too.
#[derive(Debug)]
pub struct Drain {
    begun: watch::Sender<bool>,
}

/// Learns that the end has begun; what is still to be finished holds one.
#[derive(Clone, Debug)]
pub struct DrainWatch {
    begun: watch::Receiver<bool>,
}

/// A drain that has not begun, and its first watcher.
pub fn drain() -> (Drain, DrainWatch) {
    let (sender, begun) = watch::channel(false);
    (Drain { begun: sender }, DrainWatch { begun })
}

// === impl Drain ===

impl Drain {
    /// Begins, and waits until every watcher is gone, at most for `limit`. Whether all were.
    pub async fn run(self, limit: Duration) -> bool {
        self.begun.send_replace(true);
        tokio::time::timeout(limit, self.begun.closed()).await.is_ok()
    }
}

// === impl DrainWatch ===

impl DrainWatch {
    /// Returns when the end begins.
    pub async fn begun(&mut self) {
        // An error means that the sender was dropped: that begins the end as well.
        let _ = self.begun.wait_for(|begun| *begun).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_end_waits_for_those_who_are_not_done() {
        let (drain, mut watch) = drain();
        let work = tokio::spawn(async move {
            watch.begun().await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        });
        assert!(drain.run(Duration::from_secs(2)).await);
        work.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn but_not_for_ever() {
        let (drain, watch) = drain();
        assert!(!drain.run(Duration::from_secs(2)).await);
        drop(watch);
    }
}
