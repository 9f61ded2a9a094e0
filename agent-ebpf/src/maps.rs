//! Every map, with the reason for its size. BTF definitions, so that `bpftool map dump` prints field names.
//!
//! Owns the maps' types and names (`agent_common::abi::map`); never looks anything up.

use agent_common::{
    abi::{
        COUNTERS_MAX, EVENTS_BYTES, EXEMPT_MAX, LISTENERS_MAX, NETDEVS_MAX, POLICIES_MAX, RESERVED_MAX,
        TICKETS_MAX,
    },
    event::Event,
    net::Endpoint,
    origin::{Origin, PendingOrigin},
    pod_listener::PodListener,
    policy::PodPolicy,
    target::Target,
};
use aya_ebpf::{
    btf_maps::{Array, HashMap, PerCpuArray, RingBuf, SkStorage, SockMap},
    macros::btf_map,
};

/// The origin of a connecting socket; freed with it.
#[btf_map]
pub(crate) static ORIGINS: SkStorage<PendingOrigin> = SkStorage::new();

/// The origin of an accepted socket. Apart from `ORIGINS`, because the agent's accepted sockets have no pending origin.
#[btf_map]
pub(crate) static ACCEPTED: SkStorage<Origin> = SkStorage::new();

/// Ticket to origin, from the SYN until the accept. A plain hash: it never evicts somebody else's ticket.
#[btf_map]
pub(crate) static TICKETS: HashMap<u64, PendingOrigin, { TICKETS_MAX as usize }> = HashMap::new();

/// Pod cgroup id to how many entries of `TICKETS` are the pod's. Made here when a pod first connects, removed by the agent.
#[btf_map]
pub(crate) static POD_TICKETS: HashMap<u64, u64, { POLICIES_MAX as usize }> = HashMap::new();

/// Pod cgroup id to policy, written by the agent.
#[btf_map]
pub(crate) static POLICIES: HashMap<u64, PodPolicy, { POLICIES_MAX as usize }> = HashMap::new();

/// What a pod gets that is not in `POLICIES` yet: one for pods' own networks, one for the host's.
#[btf_map]
pub(crate) static UNKNOWN_POD: Array<PodPolicy, 2> = Array::new();

/// The cgroups between kubepods and pods that are not Guaranteed, written by the agent as they appear.
#[btf_map]
pub(crate) static QOS_CLASSES: Array<u64, 2> = Array::new();

/// Cgroups of pods that no policy applies to, written by the agent before it connects or listens.
#[btf_map]
pub(crate) static EXEMPT: HashMap<u64, u64, { EXEMPT_MAX as usize }> = HashMap::new();

/// The active generation.
#[btf_map]
pub(crate) static GENERATION: Array<u64, 1> = Array::new();

/// When the active agent was last alive, in nanoseconds of `CLOCK_MONOTONIC`; 0 when it has stopped.
#[btf_map]
pub(crate) static HEARTBEAT: Array<u64, 1> = Array::new();

/// The listeners of the active generation and of its predecessor. The kernel removes those that are closed.
#[btf_map]
pub(crate) static LISTENERS: SockMap<{ 2 * LISTENERS_MAX as usize }> = SockMap::new();

/// Netns cookie to the agent's listeners in that network, written by the agent once they answer.
#[btf_map]
pub(crate) static POD_LISTENERS: HashMap<u64, PodListener, { POLICIES_MAX as usize }> = HashMap::new();

/// Addresses where only exempt pods may listen, written by the agent before it listens there.
#[btf_map]
pub(crate) static RESERVED: HashMap<Endpoint, u32, { RESERVED_MAX as usize }> = HashMap::new();

/// The key of IMDS tokens. No program reads it: it is a map to outlive the agent.
#[btf_map]
pub(crate) static IMDS_KEY: Array<[u8; 32], 1> = Array::new();

/// Two slots, so that a reader never sees half of a change.
#[btf_map]
pub(crate) static TARGETS: Array<Target, 2> = Array::new();

/// Which slot of `TARGETS` is effective.
#[btf_map]
pub(crate) static TARGET_INDEX: Array<u32, 1> = Array::new();

/// What `egress` does, written by the agent whose program it is. Not pinned: the successor has its own.
#[btf_map]
pub(crate) static EGRESS_JOBS: Array<u32, 1> = Array::new();

/// Index of a netdev on the node to the cgroup of the pod whose packets come in there, written by the agent.
#[btf_map]
pub(crate) static NETDEVS: HashMap<u32, u64, { NETDEVS_MAX as usize }> = HashMap::new();

/// Marks sockets of which `egress` has reported what they request from IMDS: once is enough. Freed with the socket.
#[btf_map]
pub(crate) static AUDITED: SkStorage<u32> = SkStorage::new();

/// One slot per `agent_common::counter::Counter`.
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<u64, { COUNTERS_MAX as usize }> = PerCpuArray::new();

/// Events for the agent. When it is full, new events are lost and counted.
#[btf_map]
pub(crate) static EVENTS: RingBuf<Event, { EVENTS_BYTES as usize }> = RingBuf::new();
