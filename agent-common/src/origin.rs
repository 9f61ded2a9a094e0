//! The origin: what the kernel knew about a connection attempt.

use crate::net::Endpoint;

/// `Origin::state`: `connect` has run, the handshake has not begun.
pub const STATE_MINTED: u32 = 1;
/// `Origin::state`: the handshake has begun with the ticket in it.
pub const STATE_SENT: u32 = 2;
/// `Origin::state`: the connection has ended; its ticket is worth nothing any more.
pub const STATE_SPENT: u32 = 3;

/// What the kernel knew when a pod connected to one of our endpoints. Lives in the connecting socket's storage, then
/// under its ticket, then in the accepted socket's storage.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Cgroup of the task that called connect.
    pub cgroup_id: u64,
    /// The pod's own cgroup, or 0 where no policy for the pod was in the map yet.
    pub pod_cgroup_id: u64,
    /// Network namespace of the connecting socket.
    pub netns_cookie: u64,
    /// The single-use number that travels with the handshake.
    pub ticket: u64,
    /// When connect was called; once the handshake has begun, when that began: nanoseconds of
    /// `CLOCK_BOOTTIME`. The ticket's life counts from here.
    pub started_at_ns: u64,
    /// The original destination: the address the pod connected to.
    pub orig_dst: Endpoint,
    /// The address it was sent to instead; may be the same.
    pub target: Endpoint,
    /// [`STATE_MINTED`], [`STATE_SENT`] or [`STATE_SPENT`].
    pub state: u32,
    /// Process that called connect, as the initial PID namespace numbers it.
    pub tgid: u32,
    /// Name of the task that called connect, padded with NUL.
    pub comm: [u8; 16],
}

/// An origin between connect and accept.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingOrigin {
    /// What the accepted socket will have.
    pub origin: Origin,
    /// The cgroup that its ticket counts for in `POD_TICKETS`: the pod's own, or the nearest that is certain while nothing
    /// is known of the pod.
    pub counts_for: u64,
}

// SAFETY: `repr(C)`, no padding (asserted in `abi`), every bit pattern is valid.
#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya reads the record from a map as bytes")]
unsafe impl aya::Pod for PendingOrigin {}

// SAFETY: `repr(C)`, no padding (asserted in `abi`), every bit pattern is valid.
#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya reads the record from a map as bytes")]
unsafe impl aya::Pod for Origin {}
