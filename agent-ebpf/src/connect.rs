//! What happens to a dial: leave it alone, refuse it, or send it to the agent and remember its origin.
//!
//! Owns the decision and the origin; never asks who dials (`caller` does), never touches the handshake.

use agent_common::{
    counter::Counter,
    defense::{Defense, holds},
    net::{Endpoint, HTTP_PORT, NetPort, Service},
    origin::{Origin, STATE_MINTED},
    policy::{IMDS_AUDIT, IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_OFF, PodPolicy},
    target::{Target, WHEN_DOWN_PASS},
};
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns,
};

use crate::{
    caller::Caller, counters::count, ctx::Dial, events, limit, log, maps::ORIGINS, storage, target, ticket,
};

/// The port of every service.
const HTTP: NetPort = NetPort::new(HTTP_PORT);

/// What the call is told.
pub(crate) enum Verdict {
    /// Go on, with whatever the context says now.
    Allow,
    /// `EPERM`.
    Deny,
}

/// The dial gets `EPERM`; the reason is counted and told.
struct Refused;

/// What the policy says about a dial to one of our addresses.
enum Mode {
    /// Leave it alone, and count it so.
    Leave(Counter),
    Serve,
    Deny,
}

// === impl Verdict ===

impl Verdict {
    /// The value that a `cgroup/connect` or `cgroup/bind` program returns.
    #[inline(always)]
    pub(crate) fn code(self) -> i32 {
        match self {
            Self::Allow => 1,
            Self::Deny => 0,
        }
    }
}

/// `cgroup/connect4`.
#[inline(always)]
pub(crate) fn connect4(dial: &Dial) -> Verdict {
    let Ok(redirect) = decide(dial, &dial.address4()) else { return Verdict::Deny };
    if let Some(target) = redirect {
        dial.set_address4(target);
    }
    Verdict::Allow
}

/// `cgroup/connect6`, of v4-mapped dials too.
#[inline(always)]
pub(crate) fn connect6(dial: &Dial) -> Verdict {
    if !holds(Defense::Ipv6) {
        return Verdict::Allow;
    }
    let Ok(redirect) = decide(dial, &dial.address6()) else { return Verdict::Deny };
    if let Some(target) = redirect {
        dial.set_address6(target);
    }
    Verdict::Allow
}

/// Where to send the dial, `None` to leave its address as it is.
#[inline(always)]
fn decide(dial: &Dial, destination: &Endpoint) -> Result<Option<&'static Endpoint>, Refused> {
    let service = destination.service();
    let effective = target::effective();
    let target = effective.and_then(|target| target::endpoint(target, destination.is_ip4()));
    let at_target = target.is_some_and(|target| target.same_address(destination));
    if service.is_none() && !at_target {
        return Ok(None);
    }

    let caller = Caller::current(dial);
    let pod_cgroup_id = caller.as_ref().map_or(0, |caller| caller.pod_cgroup_id);
    let mut news = (caller.is_some() && pod_cgroup_id == 0).then_some(Counter::UnknownPod);
    if let Some(unknown) = news {
        count(unknown);
    }
    // What is said of it where nothing else is.
    let mut what = Counter::Redirected;
    let outcome = match caller {
        None => Err(Counter::DeniedNoPod),
        Some(caller) => match mode(&caller.policy, service, at_target) {
            Mode::Leave(how) => {
                forget(dial);
                count(how);
                what = how;
                if matches!(how, Counter::Audited) {
                    news = Some(how);
                }
                Ok(None)
            }
            _ if !(dial.is_tcp() && is_served(destination, service, target)) => Err(Counter::DeniedPort),
            Mode::Deny => Err(Counter::Denied),
            Mode::Serve if !target::agent_is_alive() => {
                what = Counter::PassedAgentDown;
                when_down(dial, effective, service, at_target)
            }
            Mode::Serve => send_to_agent(dial, &caller, destination, target),
        },
    };
    if let Err(reason) = outcome {
        count(reason);
        what = reason;
        news = Some(reason);
    }
    // One event a dial, and only one place that makes it: the verifier goes through each.
    if let Some(what) = news {
        events::of_dial(what, dial, pod_cgroup_id, destination);
    }
    log::of_dial(what, destination);
    outcome.map_err(|_| Refused)
}

/// Whether the port is one that the agent answers for.
#[inline(always)]
fn is_served(destination: &Endpoint, service: Option<Service>, target: Option<&Endpoint>) -> bool {
    service.is_some() && destination.port == HTTP || target.is_some_and(|target| target.same(destination))
}

/// What a dial gets while there is no agent to send it to: the EKS Pod Identity Agent where there is one, never the node's role.
#[inline(always)]
fn when_down(
    dial: &Dial,
    effective: Option<&Target>,
    service: Option<Service>,
    at_target: bool,
) -> Result<Option<&'static Endpoint>, Counter> {
    let passes = effective.is_some_and(|target| target.when_down == WHEN_DOWN_PASS);
    if passes && !at_target && matches!(service, Some(Service::PodIdentity))
        || !holds(Defense::RefusalWhenDown)
    {
        forget(dial);
        count(Counter::PassedAgentDown);
        return Ok(None);
    }
    Err(Counter::DeniedAgentDown)
}

/// What the policy says. The agent's own address is served to every pod that has any business with the agent.
#[inline(always)]
fn mode(policy: &PodPolicy, service: Option<Service>, at_target: bool) -> Mode {
    let imds = match policy.imds {
        IMDS_OFF => Mode::Leave(Counter::Untouched),
        IMDS_AUDIT => Mode::Leave(Counter::Audited),
        IMDS_INTERCEPT => Mode::Serve,
        _ => Mode::Deny,
    };
    if matches!(service, Some(Service::Imds)) {
        return imds;
    }
    let imds_is_ours = matches!(imds, Mode::Serve | Mode::Deny);
    if policy.pod_identity != POD_IDENTITY_OFF || at_target && imds_is_ours {
        Mode::Serve
    } else {
        Mode::Leave(Counter::Untouched)
    }
}

/// Puts the dial's origin on its socket; where to send it then, `None` where it goes anyway.
#[inline(always)]
fn send_to_agent(
    dial: &Dial,
    caller: &Caller,
    destination: &Endpoint,
    target: Option<&'static Endpoint>,
) -> Result<Option<&'static Endpoint>, Counter> {
    let target = target.ok_or(Counter::DeniedInternal)?;
    let socket = dial.socket().ok_or(Counter::DeniedInternal)?;
    let dialled = storage::get_or_create(&ORIGINS, socket).ok_or(Counter::DeniedInternal)?;
    let redirect = (!target.same(destination)).then_some(target);
    if dialled.origin.state == STATE_MINTED && dialled.origin.target.same(destination) {
        // Two of these programs run while one replaces the other: the first has been here and redirected the dial.
        return Ok(redirect);
    }
    ticket::revoke(dialled);
    if !limit::has_room(caller.counts_for) {
        return Err(Counter::DeniedLimit);
    }
    // SAFETY: these helpers have no precondition.
    let (cgroup_id, started_at_ns) = unsafe { (bpf_get_current_cgroup_id(), bpf_ktime_get_boot_ns()) };
    let former = (dialled.origin.cgroup_id, dialled.origin.pod_cgroup_id);
    dialled.counts_for = caller.counts_for;
    dialled.origin = Origin {
        cgroup_id,
        pod_cgroup_id: caller.pod_cgroup_id,
        netns_cookie: dial.netns_cookie(),
        ticket: ticket::mint(dial.socket_cookie(), started_at_ns),
        started_at_ns,
        orig_dst: *destination,
        target: *target,
        state: STATE_MINTED,
        tgid: (bpf_get_current_pid_tgid() >> 32) as u32,
        comm: bpf_get_current_comm().unwrap_or_default(),
    };
    if !holds(Defense::OriginOfEveryConnect) && former.0 != 0 {
        (dialled.origin.cgroup_id, dialled.origin.pod_cgroup_id) = former;
    }
    count(Counter::Redirected);
    Ok(redirect)
}

/// The socket is dialled to where it is left alone: a former dial must not show in `getpeername`.
#[inline(always)]
fn forget(dial: &Dial) {
    if let Some(former) = dial.socket().and_then(|socket| storage::get(&ORIGINS, socket)) {
        ticket::revoke(former);
    }
}
