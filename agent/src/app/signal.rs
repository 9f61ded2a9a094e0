//! The signals that end the agent.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Error;

/// `SIGTERM` and `SIGINT`, from the moment it is made: none that comes later is lost.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

// === impl Signals ===

impl Signals {
    pub(crate) fn watch() -> Result<Self, Error> {
        let terminate = signal(SignalKind::terminate()).map_err(Error::Signal)?;
        let interrupt = signal(SignalKind::interrupt()).map_err(Error::Signal)?;
        Ok(Self { terminate, interrupt })
    }

    /// Returns when one has come.
    pub(crate) async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
