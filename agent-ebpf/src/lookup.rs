//! Which socket gets a new connection to the agent's address: a listener of the active agent, and no other.
//!
//! Owns that choice, which the kernel makes before it searches for listeners itself: a process that listens on every
//! address, or on the agent's, gets nothing. Where the active generation has no listener left, its predecessor's is
//! chosen; where there is neither, the connection is refused at once.

use agent_common::{
    abi::LISTENERS_MAX,
    defense::{Defense, holds},
};

use crate::{
    ctx::SkLookupCtx,
    maps::{GENERATION, LISTENERS, RESERVED},
};

/// What happens to the connection.
pub(crate) enum Verdict {
    /// It goes to the selected socket, or to the one that the kernel finds.
    Pass,
    /// It is refused.
    Drop,
}

// === impl Verdict ===

impl Verdict {
    /// `enum sk_action` of `include/uapi/linux/bpf.h`.
    #[inline(always)]
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::Drop => 0,
            Self::Pass => 1,
        }
    }
}

/// `sk_lookup` on the host's network.
#[inline(always)]
pub(crate) fn lookup(ctx: &SkLookupCtx) -> Verdict {
    if !ctx.is_tcp() || RESERVED.get_ptr(ctx.local()).is_none() || !holds(Defense::OwnListeners) {
        return Verdict::Pass;
    }
    // Even generations have the first half of the map, odd ones the second.
    let half = GENERATION.get(0).map_or(0, |generation| u32::from(generation & 1 != 0));
    for slot in 0..2 * LISTENERS_MAX {
        let index = (slot + half * LISTENERS_MAX) % (2 * LISTENERS_MAX);
        if ctx.select(&LISTENERS, index) {
            return Verdict::Pass;
        }
    }
    Verdict::Drop
}
