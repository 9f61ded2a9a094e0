//! The version of the binary interface, every name in it, and proof that its records have no hidden padding.

use core::{
    mem::{align_of, offset_of, size_of},
    time::Duration,
};

use crate::{
    event::Event,
    net::Endpoint,
    origin::{Origin, PendingOrigin},
    pod_listener::PodListener,
    policy::PodPolicy,
    target::Target,
};

/// Counts up whenever a record or the meaning of a map changes; part of the pins' path.
pub const ABI_VERSION: u32 = 1;

/// Directory of all pins below the bpffs mount. Each ABI has one of its own in it, `v1` for version 1: a dot in a bpffs
/// name is `EPERM`.
pub const PIN_DIRECTORY: &str = "podgate";
/// Directory in it of what every ABI shares.
pub const SHARED_DIRECTORY: &str = "shared";

/// TCP option kind for experiments, RFC 4727.
pub const TICKET_OPTION_KIND: u8 = 254;
/// Experiment identifier that marks the option as podgate's, RFC 6994.
pub const TICKET_OPTION_EXID: [u8; 2] = *b"pg";
/// Length of the whole option: kind, length, `ExID` and the ticket.
pub const TICKET_OPTION_LEN: u8 = 12;

/// Most pods on a node: what EKS allows on the largest instances.
pub const PODS_MAX: u32 = 737;
/// How long a ticket may be redeemed after its handshake has begun. An unanswered SYN is sent again after 1, 3, 7 and
/// 15 s, with the ticket that it had; the next would come after 31 s, and clients give up sooner.
pub const TICKET_LIFE: Duration = Duration::from_secs(30);
/// A handshake that ends without an answer sooner than this tells of a client in a hurry, and not of a way that is
/// blocked: on the node an answer takes microseconds.
pub const UNANSWERED_AFTER: Duration = Duration::from_millis(200);
/// Most tickets that a pod may have alive. A ticket lives for one round trip on the node, so an honest pod has one for
/// each process that starts at this very moment; one that does not complete its handshakes keeps each for two minutes.
pub const TICKETS_PER_POD: u32 = 64;
/// Most tickets alive at a time: every pod at its limit at once, 47,168. With 112 bytes of value, 8 of key and 48 of the
/// kernel's own, some 8 MiB, all allocated at load.
pub const TICKETS_MAX: u32 = PODS_MAX * TICKETS_PER_POD;
/// Most pods with a policy, and most with a count of tickets: cgroups outlive their pod for some seconds.
pub const POLICIES_MAX: u32 = 4_096;
/// Most netdevs of pods at a time: each pod has one, those of pods that ended a moment ago included.
pub const NETDEVS_MAX: u32 = POLICIES_MAX;
/// A value of `EXEMPT`: a pod of podgate's.
pub const EXEMPT_PODGATE: u64 = 0;
/// A value of `EXEMPT`: a pod of the EKS Pod Identity Agent.
pub const EXEMPT_EKS_AGENT: u64 = 1;
/// Most cgroups that are exempt at a time: pods of podgate and of the EKS Pod Identity Agent, those that were killed
/// included.
pub const EXEMPT_MAX: u32 = 64;
/// Most listeners of one generation: an IPv4 and an IPv6 one at podgate's own pair of addresses, and at EKS Pod
/// Identity's.
pub const LISTENERS_MAX: u32 = 4;
/// Most addresses that only podgate may listen at: those of one generation, and of some before it with other settings.
pub const RESERVED_MAX: u32 = 16;
/// Slots of `COUNTERS`: room for those to come, which go to the end, so that an agent finds its predecessor's.
pub const COUNTERS_MAX: u32 = 64;
/// Bytes of the ring buffer, a power of two: some 2,900 events of 80 bytes and 8 of header.
pub const EVENTS_BYTES: u32 = 256 * 1024;

/// Names of the programs, as in the object's symbols.
pub mod program {
    /// `cgroup/connect4` on kubepods.
    pub const CONNECT4: &str = "connect4";
    /// `cgroup/connect6` on kubepods.
    pub const CONNECT6: &str = "connect6";
    /// `sock_ops` on kubepods: sends the ticket.
    pub const ACTIVE: &str = "active";
    /// `sock_ops` on the agent's cgroup: redeems the ticket.
    pub const PASSIVE: &str = "passive";
    /// `cgroup/getpeername4` on kubepods.
    pub const GETPEERNAME4: &str = "getpeername4";
    /// `cgroup/getpeername6` on kubepods.
    pub const GETPEERNAME6: &str = "getpeername6";
    /// `cgroup/bind4` on kubepods.
    pub const BIND4: &str = "bind4";
    /// `cgroup/bind6` on kubepods.
    pub const BIND6: &str = "bind6";
    /// `cgroup_skb/egress` on kubepods, while it is needed.
    pub const EGRESS: &str = "egress";
    /// `sk_lookup` on the host's network.
    pub const LOOKUP: &str = "lookup";
    /// tc egress of the node's netdevs that are no pod's: the second fence.
    pub const FENCE: &str = "fence";
    /// The same for netdevs without an Ethernet header.
    pub const FENCE_L3: &str = "fence_l3";
    /// The programs that outlive the agent, in the order in which they are attached: those that mint a ticket,
    /// send it, and choose who gets it come last and one right after the other.
    pub const PERMANENT: [&str; 8] =
        [BIND4, BIND6, GETPEERNAME4, GETPEERNAME6, ACTIVE, CONNECT4, CONNECT6, LOOKUP];
    /// Every program.
    pub const ALL: [&str; 12] = [
        PASSIVE,
        BIND4,
        BIND6,
        LOOKUP,
        ACTIVE,
        CONNECT4,
        CONNECT6,
        GETPEERNAME4,
        GETPEERNAME6,
        EGRESS,
        FENCE,
        FENCE_L3,
    ];
}

/// Names of the maps; the kernel keeps 15 characters.
pub mod map {
    /// Socket storage of the connecting socket: [`crate::origin::PendingOrigin`].
    pub const ORIGINS: &str = "ORIGINS";
    /// Socket storage of the accepted socket: [`crate::origin::Origin`].
    pub const ACCEPTED: &str = "ACCEPTED";
    /// Ticket to [`crate::origin::PendingOrigin`], from the SYN to the accept.
    pub const TICKETS: &str = "TICKETS";
    /// Pod cgroup id to `u64`: how many entries of `TICKETS` are the pod's.
    pub const POD_TICKETS: &str = "POD_TICKETS";
    /// Pod cgroup id to [`crate::policy::PodPolicy`].
    pub const POLICIES: &str = "POLICIES";
    /// Two [`crate::policy::PodPolicy`]: what a pod gets that has none yet, by [`crate::policy::UNKNOWN_IN_POD_NETWORK`]
    /// and [`crate::policy::UNKNOWN_ON_HOST_NETWORK`].
    pub const UNKNOWN_POD: &str = "UNKNOWN_POD";
    /// Two `u64`: the cgroup ids of the quality-of-service classes, by [`crate::policy::QosClass`]; 0 where
    /// there is none yet.
    pub const QOS_CLASSES: &str = "QOS_CLASSES";
    /// Pod cgroup id to `u64`: pods that no policy applies to, [`super::EXEMPT_PODGATE`] or [`super::EXEMPT_EKS_AGENT`].
    pub const EXEMPT: &str = "EXEMPT";
    /// One `u64`: which generation of the agent is active on the node; counts up. The same for every ABI.
    pub const GENERATION: &str = "GENERATION";
    /// One `u64`: the last heartbeat, in nanoseconds of `CLOCK_MONOTONIC`; 0 when it has stopped. The same for every
    /// ABI.
    pub const HEARTBEAT: &str = "HEARTBEAT";
    /// Listening sockets: a half for generations with even numbers, and one for those with odd ones.
    pub const LISTENERS: &str = "LISTENERS";
    /// Netns cookie to [`crate::pod_listener::PodListener`]: the networks of pods in which the active agent listens.
    pub const POD_LISTENERS: &str = "POD_LISTENERS";
    /// [`crate::net::Endpoint`] to `u32`: where nobody but exempt pods may listen, and podgate's listeners alone get the
    /// connections. The value means nothing.
    pub const RESERVED: &str = "RESERVED";
    /// One 32-byte key, by which IMDS tokens are valid across restarts. A token grants nothing by itself.
    pub const IMDS_KEY: &str = "IMDS_KEY";
    /// Two [`crate::target::Target`] slots.
    pub const TARGETS: &str = "TARGETS";
    /// One `u32`: which slot of `TARGETS` is effective.
    pub const TARGET_INDEX: &str = "TARGET_INDEX";
    /// One `u32`: what the program [`super::program::EGRESS`] is to do, of [`crate::egress`]'s `JOB_*`.
    pub const EGRESS_JOBS: &str = "EGRESS_JOBS";
    /// Index of a netdev on the node to `u64`: the own cgroup of the pod whose packets come in there.
    pub const NETDEVS: &str = "NETDEVS";
    /// Socket storage of a socket whose request to IMDS was reported: `u32`, the value means nothing.
    pub const AUDITED: &str = "AUDITED";
    /// Per-CPU `u64`s, indexed by [`crate::counter::Counter`].
    pub const COUNTERS: &str = "COUNTERS";
    /// Ring buffer of the debugging log, made by `aya-log-ebpf`.
    pub const LOG: &str = "AYA_LOGS";
    /// Ring buffer of [`crate::event::Event`].
    pub const EVENTS: &str = "EVENTS";
}

/// Names of the globals that are set at load and hold for the life of the programs.
pub mod global {
    /// `[u64; 2]`: key of the ticket PRF.
    pub const TICKET_KEY: &str = "TICKET_KEY";
    /// `u32`: ancestor level of the kubepods cgroup, the root being 0.
    pub const KUBEPODS_LEVEL: &str = "KUBEPODS_LEVEL";
    /// `u64`: cgroup id of the kubepods cgroup.
    pub const KUBEPODS_ID: &str = "KUBEPODS_ID";
    /// `u64`: cookie of the host's network namespace, 0 where it is not known.
    pub const HOST_NETNS: &str = "HOST_NETNS";
    /// `u8`: the debugging log's level, 0 for none, made by `aya-log-ebpf`.
    pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";
    /// `u64`: how long a ticket may be redeemed, in nanoseconds.
    pub const TICKET_LIFE: &str = "TICKET_LIFE";
}

const _: () = {
    assert!(crate::counter::COUNT <= COUNTERS_MAX);

    assert!(size_of::<Endpoint>() == 20 && align_of::<Endpoint>() == 4);
    assert!(offset_of!(Endpoint, port) == 16 && offset_of!(Endpoint, _pad) == 18);

    assert!(size_of::<Origin>() == 104 && align_of::<Origin>() == 8);
    assert!(offset_of!(Origin, ticket) == 24);
    assert!(offset_of!(Origin, orig_dst) == 40);
    assert!(offset_of!(Origin, target) == 60);
    assert!(offset_of!(Origin, state) == 80);
    assert!(offset_of!(Origin, comm) == 88);

    assert!(size_of::<PendingOrigin>() == 112 && offset_of!(PendingOrigin, counts_for) == 104);

    assert!(size_of::<Event>() == 80 && align_of::<Event>() == 8);
    assert!(offset_of!(Event, address) == 32);
    assert!(offset_of!(Event, kind) == 52);
    assert!(offset_of!(Event, comm) == 64);

    assert!(size_of::<PodPolicy>() == 8 && align_of::<PodPolicy>() == 4);

    assert!(size_of::<PodListener>() == 16 && align_of::<PodListener>() == 8);
    assert!(offset_of!(PodListener, v6) == 10);

    assert!(size_of::<Target>() == 48 && align_of::<Target>() == 8);
    assert!(offset_of!(Target, v6) == 20 && offset_of!(Target, when_down) == 40);
};
