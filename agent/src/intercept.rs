//! The kernel side as the agent sees it: load the programs, tell them what to do, attach them, read what they know.
//!
//! Owns the programs, their maps and their links; never knows a pod, a cgroup path's meaning or a request. The
//! programs work as long as the [`Interceptor`] lives: dropping it detaches them.

use std::{error::Error as StdError, fmt, io, path::PathBuf};

use agent_common::{
    counter::Counter,
    policy::{PodPolicy, UNKNOWN_IN_POD_NETWORK, UNKNOWN_ON_HOST_NETWORK},
    target::Target,
};
use aya::programs::cgroup_skb::CgroupSkbLinkId;

mod events;
mod links;
pub mod metrics;
mod object;
mod origins;

pub use self::{
    events::Events,
    origins::{OriginLookup, SocketOrigins},
};
use self::{links::Cgroups, object::Object};
use crate::error::chain;

/// What the programs need to know for as long as they live.
#[derive(Debug)]
pub struct Settings {
    /// Directory of the kubepods cgroup on the cgroup2 mount.
    pub kubepods: PathBuf,
    /// Directory of the agent's own cgroup, where its listeners are made.
    pub agent_cgroup: PathBuf,
    /// Ancestor level of the kubepods cgroup; the root of the hierarchy is 0.
    pub kubepods_level: u32,
    /// Cgroup id of the kubepods cgroup.
    pub kubepods_id: u64,
    /// Cookie of the host's network namespace, as [`crate::netns::own_cookie`] gives it; 0 for none.
    pub host_netns_cookie: u64,
    /// Whether pods in `intercept` and `deny` are kept from IMDS and the target where `connect` does not see it.
    pub guard: bool,
    /// Whether what pods in `audit` ask IMDS for is told.
    pub audit_paths: bool,
    /// Makes the tickets unguessable.
    pub ticket_key: TicketKey,
}

/// The 128-bit key from which the programs derive tickets.
pub struct TicketKey([u64; 2]);

/// The loaded programs and their maps.
pub struct Interceptor {
    object: Object,
    cgroups: Cgroups,
    egress: Option<CgroupSkbLinkId>,
    slot: u32,
}

/// Why the kernel side does not work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The build had no eBPF toolchain.
    #[error(
        "this podgate was built without the eBPF object and cannot run: build it with `cargo xtask build-ebpf`, or \
         with PODGATE_EBPF_OBJECT naming the object"
    )]
    NoObject,
    /// No randomness for the key.
    #[error("getting randomness for the ticket key: {0}")]
    Randomness(#[source] getrandom::Error),
    /// The kernel or aya does not take the object.
    #[error("loading the eBPF object: {}; the agent must run privileged on Linux 6.1 or later", chain(source.as_ref()))]
    Load {
        /// What aya says.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The object lacks something the agent expects.
    #[error("BUG: the eBPF object has no usable {what}: it was built from other sources than this agent")]
    Mismatch {
        /// The program or map.
        what: &'static str,
    },
    /// The kernel does not take a program.
    #[error(
        "loading the eBPF program {program}: {source}; the agent must run privileged on Linux 6.1 or later{}",
        verifier(log_tail)
    )]
    Rejected {
        /// Name of the program.
        program: &'static str,
        /// The kernel's error.
        source: Box<dyn StdError + Send + Sync>,
        /// The last lines of the verifier's log, if it got that far.
        log_tail: String,
    },
    /// A cgroup directory cannot be opened.
    #[error("opening the cgroup {}: {source}; is it on the cgroup2 mount of the host?", path.display())]
    Cgroup {
        /// The directory.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A program cannot be attached.
    #[error(
        "attaching the eBPF program {program} to the cgroup {}: {}; it must be on a cgroup2 mount, and no other \
         program may be attached there or above exclusively (`bpftool cgroup tree` shows them)",
        cgroup.display(),
        chain(source.as_ref())
    )]
    Attach {
        /// Name of the program.
        program: &'static str,
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// What aya says.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A program cannot be detached.
    #[error("detaching the eBPF program {program} from the cgroup {}: {}", cgroup.display(), chain(source.as_ref()))]
    Detach {
        /// Name of the program.
        program: &'static str,
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// What aya says.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// Only one can read the events.
    #[error("BUG: somebody else reads the events of the eBPF programs already")]
    EventsTaken,
    /// A map cannot be read or written.
    #[error("{action} the eBPF map {map}: {}", chain(source.as_ref()))]
    Map {
        /// "reading" or "writing".
        action: &'static str,
        /// Name of the map.
        map: &'static str,
        /// What aya says.
        source: Box<dyn StdError + Send + Sync>,
    },
}

// === impl TicketKey ===

impl TicketKey {
    /// A fresh key from the kernel's random numbers.
    pub fn random() -> Result<Self, Error> {
        let word = || getrandom::u64().map_err(Error::Randomness);
        Ok(Self([word()?, word()?]))
    }
}

impl fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketKey(redacted)")
    }
}

// === impl Interceptor ===

impl Interceptor {
    /// Loads the programs into the kernel. They do nothing before [`attach`](Self::attach).
    ///
    /// Until they are told otherwise there is no target, no pod is known, and unknown pods are left alone.
    pub fn load(settings: &Settings) -> Result<Self, Error> {
        let cgroups = Cgroups::open(&settings.kubepods, &settings.agent_cgroup)?;
        Ok(Self { object: Object::load(settings)?, cgroups, egress: None, slot: 0 })
    }

    /// Sends intercepted dials to `target` from now on. Programs see the former target or this one, never a mixture.
    pub fn set_target(&mut self, target: Target) -> Result<(), Error> {
        let other = 1 - self.slot;
        self.object.set_target(other, target)?;
        self.object.set_target_index(other)?;
        self.slot = other;
        Ok(())
    }

    /// What pods get that have no policy of their own yet: those that dial through a socket in a pod's network, and
    /// those that dial through one in the host's.
    pub fn set_unknown_pods(
        &mut self,
        in_pod_network: PodPolicy,
        on_host_network: PodPolicy,
    ) -> Result<(), Error> {
        self.object.set_unknown_pod(UNKNOWN_IN_POD_NETWORK, in_pod_network)?;
        self.object.set_unknown_pod(UNKNOWN_ON_HOST_NETWORK, on_host_network)
    }

    /// Gives `policy` to the pod with this cgroup, from its next dial on.
    pub fn set_policy(&mut self, pod_cgroup_id: u64, policy: PodPolicy) -> Result<(), Error> {
        self.object.set_policy(pod_cgroup_id, policy)
    }

    /// Forgets the pod with this cgroup. One that is not known is fine.
    pub fn remove_policy(&mut self, pod_cgroup_id: u64) -> Result<(), Error> {
        self.object.remove_policy(pod_cgroup_id)
    }

    /// Attaches the programs to the cgroups, but for the one on outgoing packets: those that redeem tickets before those
    /// that send them, and these before those that redirect.
    pub fn attach(&mut self) -> Result<(), Error> {
        links::attach(&mut self.object, &self.cgroups)
    }

    /// Attaches the program on outgoing packets, if it is not attached. Having it costs every packet of every pod some
    /// 100 ns, and it is of use only while some pod is guarded or its requests are to be told.
    pub fn attach_egress(&mut self) -> Result<(), Error> {
        if self.egress.is_none() {
            self.egress = Some(links::attach_egress(&mut self.object, &self.cgroups)?);
        }
        Ok(())
    }

    /// Detaches it, if it is attached.
    pub fn detach_egress(&mut self) -> Result<(), Error> {
        match self.egress.take() {
            Some(link) => links::detach_egress(&mut self.object, &self.cgroups, link),
            None => Ok(()),
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

    /// How many tickets can be redeemed: dials under way. Walks them all.
    pub fn live_tickets(&self) -> Result<u64, Error> {
        self.object.live_tickets()
    }

    /// How many of them count for this pod, at most [`agent_common::abi::TICKETS_PER_POD`]; `None` where it has not
    /// dialled, or was forgotten since.
    pub fn live_tickets_of(&self, pod_cgroup_id: u64) -> Result<Option<u64>, Error> {
        self.object.live_tickets_of(pod_cgroup_id)
    }

    /// Every counter, summed over the processors.
    pub fn counters(&self) -> Result<Vec<(Counter, u64)>, Error> {
        Counter::ALL.iter().map(|&counter| Ok((counter, self.object.counter(counter)?))).collect()
    }
}

impl fmt::Debug for Interceptor {
    /// Leaves the object out: the ticket key is in it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interceptor")
            .field("cgroups", &self.cgroups)
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}

fn verifier(log_tail: &str) -> String {
    if log_tail.is_empty() { String::new() } else { format!("; the verifier's last words:\n{log_tail}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(kubepods: &str) -> Settings {
        Settings {
            kubepods: kubepods.into(),
            agent_cgroup: "/".into(),
            kubepods_level: 1,
            kubepods_id: 1,
            host_netns_cookie: 1,
            guard: true,
            audit_paths: false,
            ticket_key: TicketKey([0x1122_3344, 0x5566_7788]),
        }
    }

    #[test]
    fn the_ticket_key_is_not_printed() {
        let text = format!("{:?}", settings("/"));
        assert!(text.contains("redacted"), "{text}");
        for secret in ["287454020", "11223344", "1432778632", "55667788"] {
            assert!(!text.contains(secret), "{text}");
        }
    }

    #[test]
    fn random_keys_differ() {
        assert_ne!(TicketKey::random().unwrap().0, TicketKey::random().unwrap().0);
    }

    #[test]
    fn a_missing_cgroup_is_named() {
        let error = Interceptor::load(&settings("/nowhere/kubepods")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/kubepods"), "{error}");
        assert!(error.contains("cgroup2"), "{error}");
    }

    #[test]
    fn a_rejected_program_comes_with_the_verifier_s_last_words() {
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
