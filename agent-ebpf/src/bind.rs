//! Who may listen where the agent does.
//!
//! Owns that refusal; never looks at another address. The agent's listeners are at other ports, and are given what is
//! dialled there: without this a pod on the host's network could wait there for the moment in which nothing is given.

use agent_common::{
    counter::Counter,
    defense::{Defense, holds},
    net::Endpoint,
};

use crate::{caller, connect::Verdict, counters::count, ctx::Dial, events, maps::RESERVED};

/// `cgroup/bind4`.
#[inline(always)]
pub(crate) fn bind4(bind: &Dial) -> Verdict {
    judge(bind, &bind.address4())
}

/// `cgroup/bind6`, of v4-mapped addresses too.
#[inline(always)]
pub(crate) fn bind6(bind: &Dial) -> Verdict {
    judge(bind, &bind.address6())
}

#[inline(always)]
fn judge(bind: &Dial, address: &Endpoint) -> Verdict {
    if RESERVED.get_ptr(address).is_none()
        || caller::current_is_exempt()
        || !holds(Defense::AddressReservation)
    {
        return Verdict::Allow;
    }
    count(Counter::DeniedBind);
    events::of_dial(Counter::DeniedBind, bind, 0, address);
    Verdict::Deny
}
