//! Which generation of the agent gets a new connection, while two listen at the same address.
//!
//! Owns the choice: the generation whose program this is, as long as it listens. The kernel takes any listener of the
//! group otherwise, so that a generation that dies hands over by dying.

use agent_common::abi::{LISTENER_V4, LISTENER_V6};
use aya_ebpf::programs::SkReuseportContext;

use crate::maps::LISTENERS;

/// `ETH_P_IP`, in network order as the context has it.
const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;

/// `sk_reuseport` on the agent's listeners.
#[inline(always)]
pub(crate) fn steer(ctx: &SkReuseportContext) {
    let slot = if ctx.eth_protocol() == ETH_P_IP { LISTENER_V4 } else { LISTENER_V6 };
    // An error means that this generation listens no more.
    let _ = LISTENERS.select_reuseport(ctx, slot);
}
