//! The address reservation: which sockets may bind to the agent's addresses.
//!
//! Owns that refusal; never looks at another address. The agent's listeners have other ports, and `lookup` hands them the
//! connections: without the reservation a pod on the host's network could bind there and wait for a moment in which
//! `lookup` is not attached.

use agent_common::{
    counter::Counter,
    defense::{Defense, holds},
    net::Endpoint,
};

use crate::{connect::Verdict, counters::count, ctx::SockAddrCtx, events, maps::RESERVED, source_pod};

/// `cgroup/bind4`.
#[inline(always)]
pub(crate) fn bind4(ctx: &SockAddrCtx) -> Verdict {
    judge(ctx, &ctx.address4())
}

/// `cgroup/bind6`, of v4-mapped addresses too.
#[inline(always)]
pub(crate) fn bind6(ctx: &SockAddrCtx) -> Verdict {
    judge(ctx, &ctx.address6())
}

#[inline(always)]
fn judge(ctx: &SockAddrCtx, address: &Endpoint) -> Verdict {
    if RESERVED.get_ptr(address).is_none()
        || source_pod::current_task_is_exempt()
        || !holds(Defense::AddressReservation)
    {
        return Verdict::Allow;
    }
    count(Counter::DeniedBind);
    events::of_call(Counter::DeniedBind, ctx, 0, address);
    Verdict::Deny
}
