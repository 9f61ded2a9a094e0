//! Where podgate listens in a pod's own network, as the kernel reads it.

use crate::net::{Endpoint, NetPort};

/// The agent's listeners on the loopback of one pod's network, under that network's cookie. A port of 0 is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodListener {
    /// The pod's own cgroup: the listeners serve no other pod.
    pub pod_cgroup_id: u64,
    /// The port on 127.0.0.1.
    pub v4: NetPort,
    /// The port on `::1`.
    pub v6: NetPort,
    /// Always 0.
    _pad: u32,
}

impl PodListener {
    /// Listeners at these ports, in host byte order.
    pub const fn new(pod_cgroup_id: u64, v4: u16, v6: u16) -> Self {
        Self { pod_cgroup_id, v4: NetPort::new(v4), v6: NetPort::new(v6), _pad: 0 }
    }

    /// The listener of a family, or [`Endpoint::NONE`].
    #[inline(always)]
    pub const fn endpoint(&self, is_ip4: bool) -> Endpoint {
        let port = if is_ip4 { self.v4 } else { self.v6 };
        if port.to_be() == 0 { Endpoint::NONE } else { Endpoint::loopback(is_ip4, port) }
    }
}

// SAFETY: `repr(C)`, no padding (asserted in `abi`), every bit pattern is valid.
#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya writes the record to a map as bytes")]
unsafe impl aya::Pod for PodListener {}
