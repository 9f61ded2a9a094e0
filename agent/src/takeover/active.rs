//! Becoming active, and what the active agent keeps right: the target, the addresses, and nothing left over.

use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use agent_common::{
    net::Endpoint,
    target::{Target, WHEN_DOWN_DENY, WHEN_DOWN_PASS},
};
use tokio::time::Instant;

use super::{Error, Takeover, coexistence::POD_IDENTITY, dataplane::Dataplane, listeners::ListenerSet};

impl<D: Dataplane> Takeover<D> {
    /// Takes over from the agent that is active now, if any: pods are sent here from now on.
    pub(super) async fn become_active(&mut self) -> Result<(), Error> {
        let target = self.target();
        self.add_addresses(self.target_set()).await?;
        self.dataplane.take_over(target, self.listeners()).await?;
        self.effective.send_replace(Some(target));
        self.active.send_replace(true);
        self.tidy_later();
        Ok(())
    }

    /// Sends pods to `target`, unless they are sent there already.
    pub(super) async fn activate(&self, target: Target) -> Result<(), Error> {
        if *self.effective.borrow() != Some(target) {
            self.dataplane.set_target(target).await?;
            self.effective.send_replace(Some(target));
        }
        Ok(())
    }

    /// An agent with other settings may have removed them.
    pub(super) async fn add_addresses(&self, set: Option<&ListenerSet>) -> Result<(), Error> {
        for address in set.into_iter().flat_map(ListenerSet::addresses) {
            self.dataplane.add_address(address.ip()).await?;
        }
        Ok(())
    }

    /// The listeners to which pods are sent.
    fn target_set(&self) -> Option<&ListenerSet> {
        self.pod_identity.as_ref().or(self.own.as_ref())
    }

    pub(super) fn listeners(&self) -> Vec<Arc<TcpListener>> {
        self.listener_sets().flat_map(ListenerSet::listeners).collect()
    }

    pub(super) fn target(&self) -> Target {
        self.target_at(self.target_set())
    }

    /// The target as the programs read it.
    pub(super) fn target_at(&self, set: Option<&ListenerSet>) -> Target {
        let (v4, v6) = set.map_or((Endpoint::NONE, Endpoint::NONE), ListenerSet::endpoints);
        let when_down = if self.eks_agent.answers() { WHEN_DOWN_PASS } else { WHEN_DOWN_DENY };
        Target { v4, v6, when_down }
    }

    /// Tidies up once the connections have ended that a predecessor, or this agent, has at other addresses.
    pub(super) fn tidy_later(&mut self) {
        self.tidy_at = Some(Instant::now() + self.settings.drain);
    }

    /// Removes addresses from the node that the active agent does not use.
    pub(super) async fn tidy(&mut self) -> Result<(), Error> {
        if !*self.active.borrow() || self.tidy_at.is_none_or(|at| at > Instant::now()) {
            return Ok(());
        }
        self.tidy_at = None;
        let mut used: Vec<_> = self.addresses().collect();
        if self.wants_pod_identity() {
            used.extend(POD_IDENTITY);
        }
        let ips = used.iter().map(SocketAddr::ip).collect();
        self.dataplane.reserve_only(used).await?;
        self.dataplane.remove_other_addresses(ips).await
    }
}
