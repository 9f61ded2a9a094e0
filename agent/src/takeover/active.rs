//! The time in which pods are served: from the first listener to the last answer.

use std::{
    net::{IpAddr, SocketAddr, TcpListener},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use agent_common::{
    net::{Endpoint, HTTP_PORT, POD_IDENTITY_V4, POD_IDENTITY_V6},
    target::{Target, WHEN_DOWN_DENY, WHEN_DOWN_PASS},
};
use futures::future::join_all;
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use tracing::{error, info, warn};

use super::{
    eks_agent::EksAgent,
    heartbeat,
    listeners::{Opener, Place},
};
use crate::{
    admin::Probes,
    app::{Error, Signals},
    config::{Config, TargetMode, WhenDown},
    intercept::Standing,
    tasks::Tasks,
};

/// Time between two looks at who is active.
const STANDING_INTERVAL: Duration = Duration::from_millis(250);
/// When the agent that has taken over has not beaten for so long, this one becomes active again: before pods are refused.
const TAKE_BACK_AFTER: Duration = Duration::from_secs(1);
/// For how long an agent may fail to say that it is alive, or to become active. It is longer than any lack that passes; then
/// it ends, which whoever looks after its pod sees, and is started again.
const FAILING_MAX: Duration = Duration::from_secs(10);
/// How often EKS Pod Identity's addresses are tried that somebody else still has.
const RETRY: Duration = Duration::from_secs(1);
const POD_IDENTITY: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(POD_IDENTITY_V4), HTTP_PORT),
    SocketAddr::new(IpAddr::V6(POD_IDENTITY_V6), HTTP_PORT),
];

/// The time in which pods are served.
pub(crate) struct Serving<'a> {
    config: &'a Config,
    opener: Opener,
    probes: &'a Probes,
    /// Tells the others whether this agent is active on the node.
    active: watch::Sender<bool>,
    eks_agent: EksAgent,
    /// Podgate's own pair of addresses, always open but where podgate never needs it.
    own: Option<Place>,
    /// EKS Pod Identity's, while the EKS Pod Identity Agent leaves them to podgate.
    pod_identity: Option<Place>,
    /// What this agent has last told the programs.
    effective: watch::Sender<Option<Target>>,
    /// When EKS Pod Identity's addresses may be tried again.
    retry_at: Instant,
    /// When what no agent uses any more is to be removed from the node.
    tidy_at: Option<Instant>,
}

// === impl Serving ===

impl<'a> Serving<'a> {
    pub(crate) fn new(
        config: &'a Config,
        opener: Opener,
        probes: &'a Probes,
        active: watch::Sender<bool>,
        eks_agent: EksAgent,
    ) -> Self {
        Self {
            config,
            opener,
            probes,
            active,
            eks_agent,
            own: None,
            pod_identity: None,
            effective: watch::Sender::default(),
            retry_at: Instant::now(),
            tidy_at: None,
        }
    }

    /// Listens, becomes active, and serves until the end: also while another agent is in charge, whose place this one
    /// takes again should it die.
    pub(crate) async fn run(mut self, tasks: &mut Tasks, signals: &mut Signals) -> Result<(), Error> {
        self.open(tasks).await?;
        self.become_active().await?;
        let heartbeat = self.opener.interceptor.heartbeat().clone();
        tasks.spawn("the heartbeat", heartbeat::run(heartbeat));
        self.probes.ready.store(true, Relaxed);
        info!("pods are served");

        let end = self.stay_active(tasks, signals).await;
        self.probes.ready.store(false, Relaxed);
        let is_detached = matches!(end, Err(Error::Detached));
        // Where nobody has taken over, new dials are refused at once.
        if is_detached {
            self.opener.interceptor.heartbeat().silence();
        } else if let Err(error) = self.opener.interceptor.stop().await {
            error!(%error, "cannot tell the kernel that this agent stops; its pods are refused after 2 s");
        }
        self.active.send_replace(false);
        // From here on the rules are as they are: what is in flight may take longer than `podgate detach` waits.
        let rules = self.opener.link.leave(is_detached).await;
        if let Err(error) = rules {
            error!(%error, "`ip rule`s of podgate's may be left: `podgate detach` removes them");
        }
        info!("stopping: requests in flight are finished");
        let places = [self.own.take(), self.pod_identity.take()].into_iter().flatten();
        let closed = join_all(places.map(|place| place.close(self.config.drain))).await;
        if closed.contains(&false) {
            let seconds = self.config.drain.as_secs();
            warn!(seconds, "requests were still in flight at the end of the drain time");
        }
        end
    }

    /// Listens wherever pods are to be served.
    async fn open(&mut self, tasks: &mut Tasks) -> Result<(), Error> {
        if self.config.target != TargetMode::PodIdentity {
            let v4 = self.config.target_v4.map(SocketAddr::V4);
            let v6 = self.config.target_v6.map(SocketAddr::V6);
            let own: Vec<_> = v4.into_iter().chain(v6).collect();
            self.own = Some(self.opener.open(&own, &self.effective.subscribe(), tasks).await?);
        }
        if self.wants_pod_identity() {
            match self.opener.open(&POD_IDENTITY, &self.effective.subscribe(), tasks).await {
                Ok(place) => self.pod_identity = Some(place),
                Err(error) if self.own.is_some() => self.postpone(&error),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether EKS Pod Identity's addresses are to be podgate's.
    fn wants_pod_identity(&self) -> bool {
        match self.config.target {
            TargetMode::Auto => !self.eks_agent.is_here(),
            TargetMode::PodIdentity => true,
            TargetMode::Own => false,
        }
    }

    fn postpone(&mut self, error: &Error) {
        self.retry_at = Instant::now() + RETRY;
        warn!(%error, "cannot have EKS Pod Identity's addresses yet; pods are sent to podgate's own");
    }

    /// Becomes active again when the agent that took it falls silent, and follows the EKS Pod Identity Agent. Until the end is
    /// asked for.
    async fn stay_active(&mut self, tasks: &mut Tasks, signals: &mut Signals) -> Result<(), Error> {
        let mut looks = interval(STANDING_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing_since = None;
        loop {
            match self.follow_standing().await {
                Err(Error::Detached) => return Err(Error::Detached),
                // Charge is not left for one failure: what pods get without a heartbeat is a refusal.
                Err(error) => {
                    if failing_since.get_or_insert_with(Instant::now).elapsed() >= FAILING_MAX {
                        return Err(error);
                    }
                    error!(%error, "cannot see which agent is active, or become active; trying again");
                }
                Ok(()) => failing_since = None,
            }
            if let Err(error) = self.follow_eks_agent(tasks).await {
                error!(%error, "cannot send pods where they are to be sent; trying again");
            }
            tokio::select! {
                () = signals.end() => return Ok(()),
                ended = tasks.ended() => return Err(ended),
                () = self.eks_agent.changed() => {}
                _ = looks.tick() => {}
            }
        }
    }

    async fn follow_standing(&mut self) -> Result<(), Error> {
        match self.opener.interceptor.heartbeat().standing()? {
            Standing::Active => {}
            Standing::Detached => return Err(Error::Detached),
            Standing::Superseded { silent } if silent >= TAKE_BACK_AFTER => {
                warn!(?silent, "the podgate that took over is silent: becoming active again");
                self.become_active().await?;
            }
            Standing::Superseded { .. } => {
                if self.active.send_replace(false) {
                    info!("another podgate has taken over; this one is ready to become active again");
                }
            }
        }
        Ok(())
    }

    async fn become_active(&mut self) -> Result<(), Error> {
        let target = self.target();
        self.add_addresses(self.place()).await?;
        self.opener.interceptor.take_over(target, self.listeners()).await?;
        self.effective.send_replace(Some(target));
        self.active.send_replace(true);
        self.tidy_later();
        Ok(())
    }

    /// Leaves EKS Pod Identity's addresses to the EKS Pod Identity Agent while that is on the node, and takes them when it is gone.
    async fn follow_eks_agent(&mut self, tasks: &mut Tasks) -> Result<(), Error> {
        let wants_pod_identity = self.wants_pod_identity();
        if self.pod_identity.is_some() && !wants_pod_identity {
            self.leave_pod_identity().await?;
        } else if self.pod_identity.is_none() && wants_pod_identity && Instant::now() >= self.retry_at {
            self.take_pod_identity(tasks).await?;
        }
        let may_pass = self.config.when_down == WhenDown::Auto && self.eks_agent.is_here();
        self.eks_agent.ask(may_pass && self.pod_identity.is_none());
        self.activate(self.target()).await?;
        self.tidy().await
    }

    /// Pods are sent to podgate's own addresses before these are given up.
    async fn leave_pod_identity(&mut self) -> Result<(), Error> {
        self.add_addresses(self.own.as_ref()).await?;
        self.activate(self.target_at(self.own.as_ref())).await?;
        info!("the EKS Pod Identity Agent is on the node: EKS Pod Identity's addresses are left to it");
        // Connections that are under way are finished.
        self.pod_identity = None;
        let own: Vec<_> = self.own.iter().flat_map(Place::addresses).collect();
        self.opener.interceptor.reserve_only(own).await?;
        self.tidy_later();
        Ok(())
    }

    /// Pods are sent there once this agent listens.
    async fn take_pod_identity(&mut self, tasks: &mut Tasks) -> Result<(), Error> {
        if !*self.active.borrow() {
            return Ok(());
        }
        match self.opener.open(&POD_IDENTITY, &self.effective.subscribe(), tasks).await {
            Ok(place) => self.pod_identity = Some(place),
            Err(error) => {
                self.postpone(&error);
                return Ok(());
            }
        }
        self.opener.interceptor.set_listeners(self.listeners()).await?;
        info!("the EKS Pod Identity Agent is not on the node: podgate has EKS Pod Identity's addresses");
        Ok(())
    }

    /// Where pods are sent.
    fn place(&self) -> Option<&Place> {
        self.pod_identity.as_ref().or(self.own.as_ref())
    }

    fn places(&self) -> impl Iterator<Item = &Place> {
        self.own.iter().chain(&self.pod_identity)
    }

    fn listeners(&self) -> Vec<Arc<TcpListener>> {
        self.places().flat_map(Place::listeners).collect()
    }

    fn target(&self) -> Target {
        self.target_at(self.place())
    }

    /// The target as the programs read it.
    fn target_at(&self, place: Option<&Place>) -> Target {
        let (v4, v6) = place.map_or((Endpoint::NONE, Endpoint::NONE), Place::endpoints);
        let when_down = if self.eks_agent.answers() { WHEN_DOWN_PASS } else { WHEN_DOWN_DENY };
        Target { v4, v6, when_down }
    }

    async fn activate(&mut self, target: Target) -> Result<(), Error> {
        if *self.effective.borrow() != Some(target) {
            self.opener.interceptor.set_target(target).await?;
            self.effective.send_replace(Some(target));
        }
        Ok(())
    }

    /// Another agent, with other settings, may have removed them.
    async fn add_addresses(&self, place: Option<&Place>) -> Result<(), Error> {
        for address in place.into_iter().flat_map(Place::addresses) {
            self.opener.link.add(address.ip()).await?;
        }
        Ok(())
    }

    /// Once connections have ended that a predecessor, or this one, has there.
    fn tidy_later(&mut self) {
        self.tidy_at = Some(Instant::now() + self.config.drain);
    }

    /// Removes from the node what the active agent does not use.
    async fn tidy(&mut self) -> Result<(), Error> {
        if !*self.active.borrow() || self.tidy_at.is_none_or(|at| at > Instant::now()) {
            return Ok(());
        }
        self.tidy_at = None;
        let mut kept: Vec<_> = self.places().flat_map(Place::addresses).collect();
        if self.wants_pod_identity() {
            kept.extend(POD_IDENTITY);
        }
        let ips: Vec<_> = kept.iter().map(SocketAddr::ip).collect();
        self.opener.interceptor.reserve_only(kept).await?;
        Ok(self.opener.link.keep_only(&ips).await?)
    }
}
