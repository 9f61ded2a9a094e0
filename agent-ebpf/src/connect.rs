//! What happens to a connection attempt: it is left alone, refused, or redirected to the agent with its origin on the
//! socket.
//!
//! Owns the decision and the origin; never identifies the source pod (`source_pod` does), never touches the handshake.

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
    counters::count, ctx::SockAddrCtx, events, limit, log, maps::ORIGINS, source_pod::SourcePod, storage,
    target, ticket,
};

/// The port of every service.
const HTTP: NetPort = NetPort::new(HTTP_PORT);

/// The result of the call.
pub(crate) enum Verdict {
    /// Go on, with whatever the context says now.
    Allow,
    /// `EPERM`.
    Deny,
}

/// The call fails with `EPERM`; the reason is counted and reported.
struct Refused;

/// What the policy says about a connection attempt to one of our addresses.
enum Mode {
    /// Leave it alone, and count it as this.
    PassThrough(Counter),
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
pub(crate) fn connect4(ctx: &SockAddrCtx) -> Verdict {
    let Ok(redirect) = decide(ctx, &ctx.address4()) else { return Verdict::Deny };
    if let Some(target) = redirect {
        ctx.set_address4(target);
    }
    Verdict::Allow
}

/// `cgroup/connect6`, also for v4-mapped addresses.
#[inline(always)]
pub(crate) fn connect6(ctx: &SockAddrCtx) -> Verdict {
    if !holds(Defense::Ipv6) {
        return Verdict::Allow;
    }
    let Ok(redirect) = decide(ctx, &ctx.address6()) else { return Verdict::Deny };
    if let Some(target) = redirect {
        ctx.set_address6(target);
    }
    Verdict::Allow
}

/// Where to redirect the connection, `None` to leave its address as it is.
#[inline(always)]
fn decide(ctx: &SockAddrCtx, destination: &Endpoint) -> Result<Option<&'static Endpoint>, Refused> {
    let service = destination.service();
    let effective = target::effective();
    let target = effective.and_then(|target| target::endpoint(target, destination.is_ip4()));
    let at_target = target.is_some_and(|target| target.same_address(destination));
    if service.is_none() && !at_target {
        return Ok(None);
    }

    let source = SourcePod::current(ctx);
    let pod_cgroup_id = source.as_ref().map_or(0, |source| source.pod_cgroup_id);
    let mut reported = (source.is_some() && pod_cgroup_id == 0).then_some(Counter::UnknownPod);
    if let Some(unknown) = reported {
        count(unknown);
    }
    let mut what = Counter::Redirected;
    let outcome = match source {
        None => Err(Counter::DeniedNoPod),
        Some(source) => match mode(&source.policy, service, at_target) {
            Mode::PassThrough(how) => {
                revoke_previous(ctx);
                count(how);
                what = how;
                if matches!(how, Counter::Audited) {
                    reported = Some(how);
                }
                Ok(None)
            }
            _ if !(ctx.is_tcp() && is_served(destination, service, target)) => Err(Counter::DeniedPort),
            Mode::Deny => Err(Counter::Denied),
            Mode::Serve if !target::agent_is_alive() => {
                what = Counter::PassedAgentDown;
                when_down(ctx, effective, service, at_target)
            }
            Mode::Serve => redirect(ctx, &source, destination, target),
        },
    };
    if let Err(reason) = outcome {
        count(reason);
        what = reason;
        reported = Some(reason);
    }
    // One event per call, from one place only: the verifier walks each place separately.
    if let Some(what) = reported {
        events::of_call(what, ctx, pod_cgroup_id, destination);
    }
    log::of_connect(what, destination);
    outcome.map_err(|_| Refused)
}

/// Whether the port is one that the agent serves.
#[inline(always)]
fn is_served(destination: &Endpoint, service: Option<Service>, target: Option<&Endpoint>) -> bool {
    service.is_some() && destination.port == HTTP || target.is_some_and(|target| target.same(destination))
}

/// What happens while no agent is alive: the EKS Pod Identity Agent may serve its own address where the target says so;
/// IMDS, and with it the node's role, is always refused.
#[inline(always)]
fn when_down(
    ctx: &SockAddrCtx,
    effective: Option<&Target>,
    service: Option<Service>,
    at_target: bool,
) -> Result<Option<&'static Endpoint>, Counter> {
    let passes = effective.is_some_and(|target| target.when_down == WHEN_DOWN_PASS);
    if passes && !at_target && matches!(service, Some(Service::PodIdentity))
        || !holds(Defense::RefusalWhenDown)
    {
        revoke_previous(ctx);
        count(Counter::PassedAgentDown);
        return Ok(None);
    }
    Err(Counter::DeniedAgentDown)
}

/// What the policy says. The agent's own address is served to every pod that has any business with the agent.
#[inline(always)]
fn mode(policy: &PodPolicy, service: Option<Service>, at_target: bool) -> Mode {
    let imds = match policy.imds {
        IMDS_OFF => Mode::PassThrough(Counter::Untouched),
        IMDS_AUDIT => Mode::PassThrough(Counter::Audited),
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
        Mode::PassThrough(Counter::Untouched)
    }
}

/// Puts the origin on the socket. Returns the new address, `None` where it is the same.
#[inline(always)]
fn redirect(
    ctx: &SockAddrCtx,
    source: &SourcePod,
    destination: &Endpoint,
    target: Option<&'static Endpoint>,
) -> Result<Option<&'static Endpoint>, Counter> {
    let target = target.ok_or(Counter::DeniedInternal)?;
    let socket = ctx.socket().ok_or(Counter::DeniedInternal)?;
    let pending = storage::get_or_create(&ORIGINS, socket).ok_or(Counter::DeniedInternal)?;
    let redirect = (!target.same(destination)).then_some(target);
    // SAFETY: these helpers have no precondition.
    let (cgroup_id, started_at_ns) = unsafe { (bpf_get_current_cgroup_id(), bpf_ktime_get_boot_ns()) };
    let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
    let is_same_task = (pending.origin.cgroup_id, pending.origin.tgid) == (cgroup_id, tgid)
        || !holds(Defense::OriginOfEveryConnect);
    if pending.origin.state == STATE_MINTED && pending.origin.target.same(destination) && is_same_task {
        // While one program replaces another, both run: the first has redirected the connection already. It ran for the
        // same task; another one's socket may have a ticket left from a connect that failed early.
        return Ok(redirect);
    }
    ticket::revoke(pending);
    if !limit::has_room(source.counts_for) {
        return Err(Counter::DeniedLimit);
    }
    let previous = (pending.origin.cgroup_id, pending.origin.pod_cgroup_id);
    pending.counts_for = source.counts_for;
    pending.origin = Origin {
        cgroup_id,
        pod_cgroup_id: source.pod_cgroup_id,
        netns_cookie: ctx.netns_cookie(),
        ticket: ticket::mint(ctx.socket_cookie(), started_at_ns),
        started_at_ns,
        orig_dst: *destination,
        target: *target,
        state: STATE_MINTED,
        tgid,
        comm: bpf_get_current_comm().unwrap_or_default(),
    };
    if !holds(Defense::OriginOfEveryConnect) && previous.0 != 0 {
        (pending.origin.cgroup_id, pending.origin.pod_cgroup_id) = previous;
    }
    count(Counter::Redirected);
    Ok(redirect)
}

/// The socket connects to where it is left alone: its previous origin must not show in `getpeername`.
#[inline(always)]
fn revoke_previous(ctx: &SockAddrCtx) {
    if let Some(previous) = ctx.socket().and_then(|socket| storage::get(&ORIGINS, socket)) {
        ticket::revoke(previous);
    }
}
