//! While another agent is active: this one keeps its listeners and takes back when the other falls silent.

use std::time::Duration;

use tracing::{info, warn};

use super::{Error, Takeover, dataplane::Dataplane};
use crate::intercept::Standing;

/// After so long without a heartbeat of the active agent this one becomes active again: before pods are refused, which is
/// after [`HEARTBEAT_LIMIT_NS`](agent_common::target::HEARTBEAT_LIMIT_NS).
const TAKE_BACK_AFTER: Duration = Duration::from_secs(1);

impl<D: Dataplane> Takeover<D> {
    /// Stands by when another agent has taken over, and becomes active again when that one is silent.
    pub(super) async fn follow_standing(&mut self) -> Result<(), Error> {
        match self.dataplane.standing()? {
            Standing::Active => {}
            Standing::Detached => return Err(Error::Detached),
            Standing::Superseded { silent } if silent >= TAKE_BACK_AFTER => {
                warn!(?silent, "the podgate that took over is silent: becoming active again");
                self.become_active().await?;
            }
            Standing::Superseded { .. } => {
                if self.active.send_replace(false) {
                    info!("another podgate has taken over: this one is on standby");
                }
            }
        }
        Ok(())
    }
}
