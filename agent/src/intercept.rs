//! The kernel side as the agent sees it: load the programs, tell them what to do, attach them, read what they know.
//!
//! Owns the programs, their maps and their links; never knows a pod, a cgroup path's meaning or a request.
//!
//! Programs and maps are pinned and outlive the agent: when it dies, connections to it are refused and none reaches what
//! it protects. The next agent takes over what it finds, also from a living one: GENERATION says which agent is active.

use std::{
    fmt,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
};

use agent_common::{
    abi::{EXEMPT_EKS_AGENT, EXEMPT_PODGATE, program},
    defense::{Defense, holds},
    net::Endpoint,
    pod_listener::PodListener,
    policy::{PodPolicy, QosClass},
    target::Target,
};

mod counters;
mod error;
mod events;
mod exemptions;
mod fence;
mod handle;
mod handover_key;
mod heartbeat;
mod links;
mod load_program;
mod log;
mod maps;
pub(crate) mod metrics;
mod object;
mod origins;
mod pins;
mod settings;
mod ticket_counts;
mod wanted;

#[cfg(any(test, feature = "testing"))]
pub(crate) use self::events::decode;
pub use self::{
    counters::Counters,
    error::Error,
    events::Events,
    exemptions::PodgatePods,
    fence::{FENCE_FILTER, Fenced, Filter, Netdev, Netdevs, remove_filter},
    handle::InterceptorHandle,
    handover_key::{HandoverKey, handover_key},
    heartbeat::{Heartbeat, Standing},
    log::DebugLog,
    origins::{OriginLookup, SocketOrigins},
    settings::{Settings, TicketKey},
};
use self::{
    fence::Fence,
    links::Hooks,
    object::Object,
    pins::{Lock, Pins},
    wanted::Wanted,
};
use crate::bpf::Link;

/// The loaded programs and their maps.
pub struct Interceptor {
    object: Object,
    hooks: Hooks,
    pins: Pins,
    heartbeat: Heartbeat,
    counters: Counters,
    wanted: Wanted,
    fence: Fence,
    egress_filter: bool,
    audit_paths: bool,
    handover_key: HandoverKey,
    _passive: Link,
}

// === impl Interceptor ===

impl Interceptor {
    /// Loads the programs into the kernel, with the maps that a predecessor has left, and attaches the one that
    /// redeems tickets to the agent's own cgroup. Nothing changes for pods before [`take_over`](Self::take_over).
    pub fn load(settings: &Settings) -> Result<Self, Error> {
        let hooks = Hooks::open(&settings.kubepods, &settings.agent_cgroup)?;
        let pins = Pins::open(&settings.bpffs)?;
        if !holds(Defense::ReplacedInPlace) {
            pins.remove_links()?;
        }
        let (object, maps) = Object::load(settings, &pins)?;
        let connect4 = hooks.attachment(&pins, program::CONNECT4);
        let heartbeat = Heartbeat::new(maps.heartbeat, maps.generation, object.shared_pins(&pins), connect4);
        let handover_key = HandoverKey::random()?;
        handover_key.retain(&object)?;
        let passive = hooks.attach_passive(&object)?;
        Ok(Self {
            object,
            hooks,
            pins,
            heartbeat,
            counters: Counters::new(maps.counters),
            wanted: Wanted::default(),
            fence: Fence::default(),
            egress_filter: settings.egress_filter,
            audit_paths: settings.audit_paths,
            handover_key,
            _passive: passive,
        })
    }

    /// Applies no policy to one of podgate's pods from now on, whichever agent is active: its connections are left alone,
    /// and it may listen on reserved addresses.
    pub fn exempt(&mut self, pod_cgroup_id: u64) -> Result<(), Error> {
        self.object.exempt(pod_cgroup_id, EXEMPT_PODGATE)
    }

    /// The same for a pod of the EKS Pod Identity Agent; or no more.
    pub fn set_eks_agent(&mut self, pod_cgroup_id: u64, is_one: bool) -> Result<(), Error> {
        if is_one {
            self.wanted.eks_agents.insert(pod_cgroup_id);
            self.object.exempt(pod_cgroup_id, EXEMPT_EKS_AGENT)
        } else {
            self.wanted.eks_agents.remove(&pod_cgroup_id);
            self.object.unexempt(pod_cgroup_id)
        }
    }

    /// Tells which pods are podgate's, with a map handle of its own.
    pub fn podgate_pods(&self) -> Result<PodgatePods, Error> {
        self.object.exempt_map().map(PodgatePods::new)
    }

    /// Ends the exemptions of cgroups that no longer exist.
    pub fn unexempt_removed(&mut self, is_removed: impl Fn(u64) -> bool) -> Result<(), Error> {
        for (pod, _) in self.object.exempted()? {
            if is_removed(pod) {
                self.object.unexempt(pod)?;
            }
        }
        Ok(())
    }

    /// Reserves an address: from now on no other process listens there or gets its connections.
    pub fn reserve(&mut self, address: SocketAddr) -> Result<(), Error> {
        let _lock = self.pins.lock()?;
        self.object.reserve(Endpoint::new(address.ip(), address.port()))?;
        for name in [program::BIND4, program::BIND6] {
            if !self.hooks.is_attached(&self.pins, name) {
                self.hooks.attach(&self.object, &self.pins, name)?;
            }
        }
        Ok(())
    }

    /// Ends every reservation but these, if this agent is active.
    pub fn reserve_only(&mut self, addresses: &[SocketAddr]) -> Result<(), Error> {
        let Some(_lock) = self.lock_if_active()? else { return Ok(()) };
        let stays_reserved = |endpoint: &Endpoint| {
            addresses.iter().any(|address| Endpoint::new(address.ip(), address.port()).same(endpoint))
        };
        for endpoint in self.object.reservations()? {
            if !stays_reserved(&endpoint) {
                self.object.release(endpoint)?;
            }
        }
        Ok(())
    }

    /// Takes over this node, also from another agent: its programs are replaced by this agent's, its
    /// policies by those that were set here, and connections are redirected to `target`, and there to these listeners, at
    /// most [`agent_common::abi::LISTENERS_MAX`].
    ///
    /// Also to become active again after another agent took over. When it fails, no agent is active, and the caller must
    /// try again.
    pub fn take_over(&mut self, target: Target, listeners: &[&TcpListener]) -> Result<(), Error> {
        let _lock = self.pins.lock()?;
        self.heartbeat.silence();
        self.object.pin_again(&self.pins)?;
        let generation = self.heartbeat.active_generation()? + 1;
        self.object.set_listeners(generation, listeners)?;
        self.object.set_target(target)?;
        self.heartbeat.set_active_generation(generation)?;
        self.heartbeat.set_now()?;
        if let Err(error) = self.activate() {
            // Whichever programs are attached, they must refuse connections at once.
            self.heartbeat.stop()?;
            return Err(error);
        }
        self.heartbeat.start(generation);
        Ok(())
    }

    /// Makes maps and programs those of this agent, whose generation is active already.
    fn activate(&mut self) -> Result<(), Error> {
        self.wanted.apply(&mut self.object)?;
        // Beside programs of another ABI both send tickets, and those of the first count: its own go, and at once the
        // connections come here. What begins between the two has a ticket that the agent that gets it does not know.
        let [others @ .., lookup] = program::PERMANENT;
        for name in others {
            self.hooks.attach(&self.object, &self.pins, name)?;
        }
        self.set_egress(self.wanted.needs_egress(self.egress_filter, self.audit_paths))?;
        self.apply_fence()?;
        self.pins.detach_others(program::ACTIVE)?;
        self.hooks.attach(&self.object, &self.pins, lookup)?;
        self.pins.remove_others()
    }

    /// Makes these the listeners that get new connections, if this agent is active.
    pub fn set_listeners(&mut self, listeners: &[&TcpListener]) -> Result<(), Error> {
        let Some(_lock) = self.lock_if_active()? else { return Ok(()) };
        self.object.set_listeners(self.heartbeat.generation(), listeners)
    }

    /// Says that this agent has stopped: connections are refused at once, until another takes over. Does nothing when
    /// another has.
    pub fn stop(&mut self) -> Result<(), Error> {
        let active = self.lock_if_active();
        // Also where the pins cannot be locked: then pods are refused when the last heartbeat is too old.
        self.heartbeat.silence();
        let Some(_lock) = active? else { return Ok(()) };
        self.heartbeat.stop()
    }

    /// Redirects connections to `target` from now on, if this agent is active.
    pub fn set_target(&mut self, target: Target) -> Result<(), Error> {
        let Some(_lock) = self.lock_if_active()? else { return Ok(()) };
        self.object.set_target(target)
    }

    /// What pods get that have no policy of their own yet: those that connect through a socket in a pod's network, and
    /// those that connect through one in the host's.
    pub fn set_unknown_pods(
        &mut self,
        in_pod_network: PodPolicy,
        on_host_network: PodPolicy,
    ) -> Result<(), Error> {
        self.wanted.unknown_in_pod_network = Some(in_pod_network);
        self.wanted.unknown_on_host_network = Some(on_host_network);
        let Some(_lock) = self.lock_if_active()? else { return Ok(()) };
        self.wanted.apply_unknown_pods(&mut self.object)?;
        self.attach_egress_where_needed()
    }

    /// Tells that a quality-of-service class has this cgroup, so that none of its pods is taken for the others.
    pub fn set_class(&mut self, class: QosClass, cgroup_id: u64) -> Result<(), Error> {
        self.wanted.classes.insert(class, cgroup_id);
        let Some(_lock) = self.lock_if_active()? else { return Ok(()) };
        self.object.set_class(class, cgroup_id)
    }

    /// Sends a pod that connects in the network with this cookie to the listeners that the agent has there.
    pub fn set_pod_listener(&mut self, netns_cookie: u64, listener: PodListener) -> Result<(), Error> {
        self.wanted.pod_listeners.insert(netns_cookie, listener);
        let Some(_lock) = self.lock_if_active()? else { return Ok(()) };
        self.object.set_pod_listener(netns_cookie, listener)
    }

    /// Sends it to the target on the node again.
    pub fn remove_pod_listener(&mut self, netns_cookie: u64) -> Result<(), Error> {
        self.wanted.pod_listeners.remove(&netns_cookie);
        let Some(_lock) = self.lock_if_active()? else { return Ok(()) };
        self.object.remove_pod_listener(netns_cookie)
    }

    /// Gives `policy` to the pod with this cgroup, from its next connection on.
    pub fn set_policy(&mut self, pod_cgroup_id: u64, policy: PodPolicy) -> Result<(), Error> {
        self.wanted.policies.insert(pod_cgroup_id, policy);
        let Some(_lock) = self.lock_if_active()? else { return Ok(()) };
        self.object.set_policy(pod_cgroup_id, policy)?;
        self.attach_egress_where_needed()
    }

    /// Removes the policy of the pod with this cgroup, which no longer exists. One that is not known is fine.
    pub fn remove_policy(&mut self, pod_cgroup_id: u64) -> Result<(), Error> {
        self.wanted.policies.remove(&pod_cgroup_id);
        self.wanted.eks_agents.remove(&pod_cgroup_id);
        let Some(_lock) = self.lock_if_active()? else { return Ok(()) };
        self.object.remove_policy(pod_cgroup_id)?;
        self.object.unexempt(pod_cgroup_id)?;
        self.attach_egress_where_needed()
    }

    /// Makes these the node's netdevs: the second fence is where packets leave the node, and knows which are pods'. What came
    /// of it; `None` if this agent is not active, and will do so when it is.
    pub fn set_netdevs(&mut self, netdevs: Netdevs) -> Result<Option<Fenced>, Error> {
        self.wanted.netdevs = Some(netdevs);
        let Some(_lock) = self.lock_if_active()? else { return Ok(None) };
        self.apply_fence().map(Some)
    }

    fn apply_fence(&mut self) -> Result<Fenced, Error> {
        match &self.wanted.netdevs {
            Some(netdevs) => self.fence.apply(netdevs, &mut self.object, &self.pins),
            None => Ok(Fenced::default()),
        }
    }

    /// The key of IMDS tokens, the same for every agent on this node since it was started.
    pub fn imds_key(&mut self) -> Result<[u8; 32], Error> {
        let _lock = self.pins.lock()?;
        let mut key = self.object.imds_key()?;
        if key == [0; 32] {
            getrandom::fill(&mut key).map_err(Error::Randomness)?;
            self.object.set_imds_key(key)?;
        }
        Ok(key)
    }

    /// By which another agent knows this one while its programs are effective.
    pub fn handover_key(&self) -> HandoverKey {
        self.handover_key.clone()
    }

    /// Locks the pins if this agent is active: it stays active while the lock is held.
    fn lock_if_active(&self) -> Result<Option<Lock>, Error> {
        if !self.heartbeat.is_active()? {
            return Ok(None);
        }
        let lock = self.pins.lock()?;
        Ok(self.heartbeat.is_active()?.then_some(lock))
    }

    fn attach_egress_where_needed(&self) -> Result<(), Error> {
        let is_needed = self.wanted.needs_egress(self.egress_filter, self.audit_paths);
        if is_needed == self.hooks.is_attached(&self.pins, program::EGRESS) {
            return Ok(());
        }
        self.set_egress(is_needed)
    }

    fn set_egress(&self, is_needed: bool) -> Result<(), Error> {
        if is_needed {
            self.hooks.attach(&self.object, &self.pins, program::EGRESS)
        } else {
            self.hooks.detach(&self.pins, program::EGRESS)
        }
    }

    /// The origins of accepted sockets. Works on its own, also after the programs are gone.
    pub fn origins(&mut self) -> Result<SocketOrigins, Error> {
        self.object.accepted().map(SocketOrigins::new)
    }

    /// The events, for one reader. Needs a tokio runtime. What happened before waits there.
    pub fn events(&mut self) -> Result<Events, Error> {
        Events::new(self.object.events().ok_or(Error::EventsTaken)?)
    }

    /// The programs' debugging log, for one reader; `None` unless the log's target `kernel` was at debug when they were
    /// loaded.
    pub fn debug_log(&mut self) -> Result<Option<DebugLog>, Error> {
        self.object.debug_log()
    }

    /// How many tickets can be redeemed: connection attempts under way. Walks them all.
    pub fn live_tickets(&self) -> Result<u64, Error> {
        self.object.live_tickets()
    }

    /// How many of them count for this pod, at most [`agent_common::abi::TICKETS_PER_POD`]; `None` where it has not
    /// connected, or was removed since.
    pub fn live_tickets_of(&self, pod_cgroup_id: u64) -> Result<Option<u64>, Error> {
        self.object.live_tickets_of(pod_cgroup_id)
    }

    /// The heartbeat of this agent, which nothing that is done here delays.
    pub fn heartbeat(&self) -> Heartbeat {
        self.heartbeat.clone()
    }

    /// What the programs have counted.
    pub fn counters(&self) -> Counters {
        self.counters.clone()
    }
}

impl fmt::Debug for Interceptor {
    /// Leaves the object out: the ticket key is in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interceptor")
            .field("hooks", &self.hooks)
            .field("heartbeat", &self.heartbeat)
            .finish_non_exhaustive()
    }
}

/// Everything that is pinned, by agents of any ABI, each directory after what is in it. In this order it may be removed:
/// links come first, and with them the programs are detached.
pub fn pinned(bpffs: &Path) -> Result<Vec<PathBuf>, Error> {
    pins::all(bpffs).map_err(|source| Error::Pin { path: bpffs.to_owned(), source })
}

/// Removes one of those; what was removed already is fine.
pub fn unpin(path: &Path) -> Result<(), Error> {
    pins::remove(path).map_err(|source| Error::Pin { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_missing_cgroup_is_named() {
        let error = Interceptor::load(&settings::fake("/nowhere/kubepods")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/kubepods"), "{error}");
        assert!(error.contains("cgroup2"), "{error}");
    }

    #[test]
    fn a_rejected_program_comes_with_the_last_words_of_the_verifier() {
        let error = Error::Rejected {
            program: "connect4",
            source: Box::new(io::Error::from_raw_os_error(13)),
            log_tail: "R1 invalid mem access 'scalar'".to_owned(),
        };
        let text = error.to_string();
        assert!(text.starts_with("loading the eBPF program connect4: Permission denied"), "{text}");
        assert!(text.ends_with("R1 invalid mem access 'scalar'"), "{text}");
    }
}
