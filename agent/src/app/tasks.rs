//! What runs as long as the agent does.

use tokio::task::JoinSet;

use super::Error;

/// Tasks that never end by themselves.
#[derive(Default)]
pub(super) struct Tasks(JoinSet<&'static str>);

// === impl Tasks ===

impl Tasks {
    pub(super) fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.0.spawn(async move {
            task.await;
            name
        });
    }

    /// Waits for one that has ended all the same.
    pub(super) async fn ended(&mut self) -> Error {
        match self.0.join_next().await {
            Some(Ok(name)) => Error::Ended(name),
            Some(Err(_)) | None => Error::Ended("a part of the agent, by a panic,"),
        }
    }
}
