//! Who may listen where the agent does.
//!
//! Owns that refusal; never looks at another address. Generations of the agent share its address with `SO_REUSEPORT`:
//! without this a pod on the host's network could join them, and take their connections with the tokens in them.

use agent_common::{counter::Counter, net::Endpoint};

use crate::{caller, connect::Verdict, counters::count, ctx::Dial, events, target};

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
    let target = target::in_force().and_then(|target| target::endpoint(target, address.is_ip4()));
    if !target.is_some_and(|target| target.same(address)) || caller::current_is_exempt() {
        return Verdict::Allow;
    }
    count(Counter::DeniedBind);
    events::of_dial(Counter::DeniedBind, bind, 0, address);
    Verdict::Deny
}
