//! Which socket gets a new connection to the agent's address: the agent's in charge, and nobody else's.
//!
//! Owns that choice, before the kernel looks for listeners by itself: whoever listens at every address, or joins the
//! agent's, gets nothing. The generation before this one gets what this one does not accept any more; where there is
//! neither, the connection is refused at once.

use agent_common::{
    abi::LISTENERS_MAX,
    defense::{Defense, holds},
};

use crate::{
    ctx::Lookup,
    maps::{GENERATION, LISTENERS, RESERVED},
};

/// What becomes of the connection.
pub(crate) enum Verdict {
    /// The socket that was chosen, or the one that the kernel finds.
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
pub(crate) fn lookup(lookup: &Lookup) -> Verdict {
    if !lookup.is_tcp() || RESERVED.get_ptr(lookup.local()).is_none() || !holds(Defense::OwnListeners) {
        return Verdict::Pass;
    }
    // A generation's listeners have one half of the map, the next one's the other.
    let half = GENERATION.get(0).map_or(0, |generation| u32::from(generation & 1 != 0));
    for slot in 0..2 * LISTENERS_MAX {
        let place = (slot + half * LISTENERS_MAX) % (2 * LISTENERS_MAX);
        if lookup.takes(&LISTENERS, place) {
            return Verdict::Pass;
        }
    }
    Verdict::Drop
}
