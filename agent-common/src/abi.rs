//! The version of the binary interface, every name in it, and proof that its records have no hidden padding.

use core::mem::{align_of, offset_of, size_of};

use crate::{net::Endpoint, origin::Origin, policy::PodPolicy, target::Target};

/// Counts up whenever a record or the meaning of a map changes; part of the pins' path.
pub const ABI_VERSION: u32 = 1;

/// Where pins go below the bpffs mount. A dot in a bpffs name is `EPERM`, hence `v1`.
pub const PIN_DIRECTORY: &str = "podgate/v1";

/// TCP option kind for experiments, RFC 4727.
pub const TICKET_OPTION_KIND: u8 = 254;
/// Experiment identifier that marks the option as podgate's, RFC 6994.
pub const TICKET_OPTION_EXID: [u8; 2] = *b"pg";
/// Length of the whole option: kind, length, `ExID` and the ticket.
pub const TICKET_OPTION_LEN: u8 = 12;

/// Most tickets alive at a time: 250 pods with 64 dials each in flight, rounded up.
pub const TICKETS_MAX: u32 = 16_384;
/// Most pods with a policy: EKS allows at most 737 on a node; cgroups outlive their pod for some seconds.
pub const POLICIES_MAX: u32 = 4_096;

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
    /// Every program, in the order in which they are attached.
    pub const ALL: [&str; 4] = [PASSIVE, ACTIVE, CONNECT4, CONNECT6];
}

/// Names of the maps; the kernel keeps 15 characters.
pub mod map {
    /// Socket storage of the dialling socket: [`crate::origin::Origin`].
    pub const ORIGINS: &str = "ORIGINS";
    /// Socket storage of the accepted socket: [`crate::origin::Origin`].
    pub const ACCEPTED: &str = "ACCEPTED";
    /// Ticket to [`crate::origin::Origin`], from the SYN to the accept.
    pub const TICKETS: &str = "TICKETS";
    /// Pod cgroup id to [`crate::policy::PodPolicy`].
    pub const POLICIES: &str = "POLICIES";
    /// Two [`crate::policy::PodPolicy`]: what a pod gets that has none yet, by [`crate::policy::UNKNOWN_IN_POD_NETWORK`]
    /// and [`crate::policy::UNKNOWN_ON_HOST_NETWORK`].
    pub const UNKNOWN_POD: &str = "UNKNOWN_POD";
    /// Two [`crate::target::Target`] slots.
    pub const TARGETS: &str = "TARGETS";
    /// One `u32`: which slot of `TARGETS` is in force.
    pub const TARGET_INDEX: &str = "TARGET_INDEX";
    /// Per-CPU `u64`s, indexed by [`crate::counter::Counter`].
    pub const COUNTERS: &str = "COUNTERS";
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
}

const _: () = {
    assert!(size_of::<Endpoint>() == 20 && align_of::<Endpoint>() == 4);
    assert!(offset_of!(Endpoint, port) == 16 && offset_of!(Endpoint, _pad) == 18);

    assert!(size_of::<Origin>() == 104 && align_of::<Origin>() == 8);
    assert!(offset_of!(Origin, ticket) == 24);
    assert!(offset_of!(Origin, orig_dst) == 40);
    assert!(offset_of!(Origin, target) == 60);
    assert!(offset_of!(Origin, state) == 80);
    assert!(offset_of!(Origin, comm) == 88);

    assert!(size_of::<PodPolicy>() == 8 && align_of::<PodPolicy>() == 4);

    assert!(size_of::<Target>() == 48 && align_of::<Target>() == 8);
    assert!(offset_of!(Target, v4) == 8 && offset_of!(Target, v6) == 28);
};
