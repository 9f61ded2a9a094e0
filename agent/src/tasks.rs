//! What runs as long as the agent does.

use std::io;

use tokio::task::JoinSet;

use crate::app::Error;

/// Tasks of which none ends by itself.
#[derive(Default)]
pub(crate) struct Tasks(JoinSet<Option<&'static str>>);

// === impl Tasks ===

impl Tasks {
    /// Runs one that never ends.
    pub(crate) fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(async move {
            task.await;
            Some(name)
        });
    }

    /// Runs one that ends when it is told to, or by a failure.
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

    /// Waits for one that has ended all the same.
    pub(crate) async fn ended(&mut self) -> Error {
        loop {
            match self.0.join_next().await {
                Some(Ok(None)) => {}
                Some(Ok(Some(name))) => return Error::Ended(name),
                Some(Err(_)) | None => return Error::Ended("a part of the agent, by a panic,"),
            }
        }
    }
}
