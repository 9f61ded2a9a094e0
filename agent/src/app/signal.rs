//! The signals that shut the agent down.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// `SIGTERM` and `SIGINT`, from the moment this is made: none that comes later is lost.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// Signals cannot be watched.
#[derive(Debug, thiserror::Error)]
#[error("cannot watch for signals: {0}")]
pub struct Error(#[from] io::Error);

// === impl Signals ===

impl Signals {
    pub(super) fn watch() -> Result<Self, Error> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Returns once one has come.
    pub(super) async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
