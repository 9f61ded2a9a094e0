//! What the programs tell the agent as it happens: the record in the ring buffer `EVENTS`.

use crate::net::Endpoint;

/// Something happened that an operator may want to know of. What is not known is 0.
///
/// A connection attempt makes one at most: why it was refused, else that it was audited, else that its pod is unknown.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Cgroup of the task that called connect; of a packet, of the socket that sends it.
    pub cgroup_id: u64,
    /// The pod's own cgroup; 0 where no policy for the pod was in the map yet.
    pub pod_cgroup_id: u64,
    /// Network namespace of the connecting socket.
    pub netns_cookie: u64,
    /// When it happened: nanoseconds of `CLOCK_BOOTTIME`.
    pub at_ns: u64,
    /// The original destination. Of a bad ticket, whose sender is not known, the address it came from; of an unanswered
    /// connection attempt, the agent's, where it was redirected.
    pub address: Endpoint,
    /// Which branch was taken: the slot of a [`crate::counter::Counter`].
    pub kind: u32,
    /// Process that called connect, as the initial PID namespace numbers it.
    pub tgid: u32,
    /// Its thread that called connect.
    pub tid: u32,
    /// Name of the task that called connect, padded with NUL.
    pub comm: [u8; 16],
}
