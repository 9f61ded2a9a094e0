//! How an agent leaves the node: at a signal, after a failure, or detached by an operator.

use futures::future::{join, join_all};
use tracing::{error, info, warn};

use super::{Takeover, dataplane::Dataplane};

impl<D: Dataplane> Takeover<D> {
    /// Stops being active and finishes the requests in flight. Unless podgate `is_detached`, the programs and
    /// addresses stay: connections are refused at once until another agent takes over, and none reaches what it was kept from.
    pub(super) async fn shut_down(mut self, is_detached: bool) {
        if is_detached {
            // The heartbeat is no longer podgate's to write, not even to say that it stops.
            self.dataplane.silence();
        } else if let Err(error) = self.dataplane.stop().await {
            error!(%error, "cannot tell the kernel that this agent stops; its pods are refused after 2 s");
        }
        self.active.send_replace(false);
        info!("shutting down: finishing requests in flight");
        let sets = [self.own.take(), self.pod_identity.take()].into_iter().flatten();
        let on_node = join_all(sets.map(|set| set.close(self.settings.drain)));
        let (on_node, in_pods) = join(on_node, self.pod_listeners.close(self.settings.drain)).await;
        if on_node.contains(&false) || !in_pods {
            let seconds = self.settings.drain.as_secs();
            warn!(seconds, "requests were still in flight at the end of the drain time");
        }
    }
}
