//! The background tasks that run as long as the agent does.
//!
//! Owns their set; never restarts one. A task that ends although none should is a bug, and the agent stops.

use std::io;

use tokio::task::JoinSet;

/// Tasks of which none ends by itself.
#[derive(Debug, Default)]
pub(crate) struct Tasks(JoinSet<Option<&'static str>>);

/// A task that should have run forever has ended.
#[derive(Debug, thiserror::Error)]
#[error("BUG: {0} has ended; the agent stops rather than serve without it")]
pub struct TaskEnded(&'static str);

// === impl Tasks ===

impl Tasks {
    /// Runs a task that never ends.
    pub(crate) fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(async move {
            task.await;
            Some(name)
        });
    }

    /// Runs a task that ends when it is told to, or by a failure.
    pub(crate) fn spawn_finite(
        &mut self,
        name: &'static str,
        task: impl Future<Output = io::Result<()>> + Send + 'static,
    ) {
        self.0.spawn(async move {
            let error = task.await.err()?;
            tracing::error!(%error, "{name} has failed");
            Some(name)
        });
    }

    /// Waits for a task that ends although it should not.
    pub(crate) async fn ended(&mut self) -> TaskEnded {
        loop {
            match self.0.join_next().await {
                Some(Ok(None)) => {}
                Some(Ok(Some(name))) => return TaskEnded(name),
                Some(Err(_)) | None => return TaskEnded("a part of the agent, by a panic,"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_task_that_ends_or_fails_is_named_and_one_that_is_done_is_not() {
        let mut tasks = Tasks::default();
        tasks.spawn_finite("a listener that was closed", async { Ok(()) });
        tasks.spawn("a watch", async {});
        assert!(tasks.ended().await.to_string().contains("a watch"));
        tasks.spawn_finite("a listener", async { Err(io::ErrorKind::AddrInUse.into()) });
        assert!(tasks.ended().await.to_string().contains("a listener"));
    }
}
