//! Which generation of the agent gets a new connection, while two listen at the same address.
//!
//! Owns the choice: the generation whose program this is, as long as it listens. The kernel takes any listener of the
//! group otherwise, so that a generation that dies hands over by dying.

use agent_common::abi::LISTENERS_MAX;
use aya_ebpf::programs::SkReuseportContext;

use crate::maps::LISTENERS;

/// `sk_reuseport` on the agent's listeners. The kernel refuses a listener at another address than the one dialled: the
/// one that it takes is the right one.
#[inline(always)]
pub(crate) fn steer(ctx: &SkReuseportContext) {
    for slot in 0..LISTENERS_MAX {
        if LISTENERS.select_reuseport(ctx, slot).is_ok() {
            return;
        }
    }
}
