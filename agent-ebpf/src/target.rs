//! Where the agent listens, on the node and in a pod's network, and whether it is alive.
//!
//! Owns the reading of these; never decides what follows.

use agent_common::{
    net::Endpoint,
    pod_listener::PodListener,
    target::{Target, is_alive},
};
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;

use crate::maps::{HEARTBEAT, POD_LISTENERS, TARGET_INDEX, TARGETS};

/// The effective target.
#[inline(always)]
pub(crate) fn effective() -> Option<&'static Target> {
    TARGETS.get(*TARGET_INDEX.get(0)?)
}

/// The target's endpoint of a family, if it has one.
#[inline(always)]
pub(crate) fn endpoint(target: &'static Target, is_ip4: bool) -> Option<&'static Endpoint> {
    let endpoint = if is_ip4 { &target.v4 } else { &target.v6 };
    (!endpoint.is_none()).then_some(endpoint)
}

/// The agent's listeners in the network with this cookie.
#[inline(always)]
pub(crate) fn in_network(netns_cookie: u64) -> Option<&'static PodListener> {
    // SAFETY: entries are replaced whole, and stay readable while the program runs.
    unsafe { POD_LISTENERS.get(netns_cookie) }
}

/// Whether the last heartbeat is recent enough. The coarse clock costs half of the exact one. Linux 5.11:
/// <https://github.com/torvalds/linux/commit/d055126180564a57fe533728a4e93d0cb53d49b3>
#[inline(always)]
pub(crate) fn agent_is_alive() -> bool {
    // SAFETY: the helper has no precondition.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    HEARTBEAT.get(0).is_some_and(|&heartbeat| is_alive(heartbeat, now))
}
