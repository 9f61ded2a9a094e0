//! Coexistence with the EKS Pod Identity Agent: its addresses are left to it while it is on the node.
//!
//! Owns when podgate listens at EKS Pod Identity's addresses; what is known of the other agent is `eks_agent`'s.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use agent_common::net::{HTTP_PORT, POD_IDENTITY_V4, POD_IDENTITY_V6};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Error, Takeover, dataplane::Dataplane, listeners::ListenerSet};
use crate::{
    config::{TargetMode, WhenDown},
    tasks::Tasks,
};

/// EKS Pod Identity's addresses.
pub(super) const POD_IDENTITY: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(POD_IDENTITY_V4), HTTP_PORT),
    SocketAddr::new(IpAddr::V6(POD_IDENTITY_V6), HTTP_PORT),
];
/// How often EKS Pod Identity's addresses are tried while another process has them.
const RETRY_DELAY: Duration = Duration::from_secs(1);

impl<D: Dataplane> Takeover<D> {
    /// Listens wherever pods are to be served.
    pub(super) async fn open(&mut self, tasks: &mut Tasks) -> Result<(), Error> {
        if self.settings.target != TargetMode::PodIdentity {
            let v4 = self.settings.target_v4.map(SocketAddr::V4);
            let v6 = self.settings.target_v6.map(SocketAddr::V6);
            let own: Vec<_> = v4.into_iter().chain(v6).collect();
            self.own = Some(self.acceptor.listen(&own, &self.effective.subscribe(), tasks).await?);
        }
        if self.wants_pod_identity() {
            match self.acceptor.listen(&POD_IDENTITY, &self.effective.subscribe(), tasks).await {
                Ok(set) => self.pod_identity = Some(set),
                Err(error) if self.own.is_some() => self.retry_later(&error),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether EKS Pod Identity's addresses should be podgate's.
    pub(super) fn wants_pod_identity(&self) -> bool {
        match self.settings.target {
            TargetMode::Auto => !self.eks_agent.is_here(),
            TargetMode::PodIdentity => true,
            TargetMode::Own => false,
        }
    }

    /// Leaves EKS Pod Identity's addresses when the EKS Pod Identity Agent comes, and takes them when it is removed.
    pub(super) async fn follow_eks_agent(&mut self, tasks: &mut Tasks) -> Result<(), Error> {
        let wants_pod_identity = self.wants_pod_identity();
        if self.pod_identity.is_some() && !wants_pod_identity {
            self.leave_pod_identity().await?;
        } else if self.pod_identity.is_none() && wants_pod_identity && Instant::now() >= self.retry_at {
            self.take_pod_identity(tasks).await?;
        }
        let may_pass = self.settings.when_down == WhenDown::Auto && self.eks_agent.is_here();
        self.eks_agent.ask(may_pass && self.pod_identity.is_none());
        self.activate(self.target()).await?;
        self.tidy().await
    }

    /// Pods are sent to podgate's own addresses before these are given up.
    async fn leave_pod_identity(&mut self) -> Result<(), Error> {
        self.add_addresses(self.own.as_ref()).await?;
        self.activate(self.target_at(self.own.as_ref())).await?;
        info!("the EKS Pod Identity Agent is on the node: EKS Pod Identity's addresses are left to it");
        // Dropped, it accepts no more, and finishes its requests in flight.
        self.pod_identity = None;
        let own = self.own.iter().flat_map(ListenerSet::addresses).collect();
        self.dataplane.reserve_only(own).await?;
        self.tidy_later();
        Ok(())
    }

    /// Pods are sent there only once this agent listens.
    async fn take_pod_identity(&mut self, tasks: &mut Tasks) -> Result<(), Error> {
        if !*self.active.borrow() {
            return Ok(());
        }
        match self.acceptor.listen(&POD_IDENTITY, &self.effective.subscribe(), tasks).await {
            Ok(set) => self.pod_identity = Some(set),
            Err(error) => {
                self.retry_later(&error);
                return Ok(());
            }
        }
        self.dataplane.set_listeners(self.listeners()).await?;
        info!("the EKS Pod Identity Agent is not on the node: podgate has EKS Pod Identity's addresses");
        Ok(())
    }

    fn retry_later(&mut self, error: &Error) {
        self.retry_at = Instant::now() + RETRY_DELAY;
        warn!(%error, "cannot have EKS Pod Identity's addresses yet; pods are sent to podgate's own");
    }
}
