//! What happens to a connection attempt: it is left alone, refused, or redirected to the agent with its origin on the
//! socket.
//!
//! Owns the decision and the origin; never identifies the source pod (`source_pod` does), never touches the handshake.

use agent_common::{
    counter::Counter,
    defense::{Defense, holds},
    net::{Endpoint, HTTP_PORT, NetPort, Service},
    origin::{Origin, STATE_MINTED},
    policy::{IMDS_AUDIT, IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_OFF},
    target::{Target, WHEN_DOWN_PASS},
};
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns,
};

use crate::{
    counters::count,
    ctx::{SockAddrCtx, Socket},
    events, limit, log,
    maps::ORIGINS,
    source_pod::SourcePod,
    storage, target, ticket,
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

/// Where a connection attempt goes that concerns podgate.
struct Destined {
    /// The service whose address it is.
    service: Option<Service>,
    /// Whether it is the address of the agent's target on the node, at whatever port.
    at_node: bool,
    /// Whether the agent listens there, on the node or in the pod's own network.
    at_target: bool,
}

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
    let Ok(target) = decide(ctx, &ctx.address4()) else { return Verdict::Deny };
    if !target.is_none() {
        ctx.set_address4(&target);
    }
    Verdict::Allow
}

/// `cgroup/connect6`, also for v4-mapped addresses.
#[inline(always)]
pub(crate) fn connect6(ctx: &SockAddrCtx) -> Verdict {
    if !holds(Defense::Ipv6) {
        return Verdict::Allow;
    }
    let Ok(target) = decide(ctx, &ctx.address6()) else { return Verdict::Deny };
    if !target.is_none() {
        ctx.set_address6(&target);
    }
    Verdict::Allow
}

/// Where to redirect the connection, [`Endpoint::NONE`] to leave its address as it is: no `Option`, of which the compiler
/// copies what is not there, which the verifier refuses.
#[inline(always)]
fn decide(ctx: &SockAddrCtx, destination: &Endpoint) -> Result<Endpoint, Refused> {
    let service = destination.service();
    let effective = target::effective();
    let on_node = effective.and_then(|target| target::endpoint(target, destination.is_ip4()));
    let at_node = on_node.is_some_and(|target| target.same_address(destination));
    let is_tcp = ctx.is_tcp();
    let mut at_target = at_node && is_tcp && on_node.is_some_and(|target| target.same(destination));
    let mut listens_for = 0;
    if service.is_none() && !at_node {
        // A look at the map for connections on the loopback only.
        if !destination.is_loopback() || !is_tcp {
            return Ok(Endpoint::NONE);
        }
        let Some(in_pod) = target::in_network(ctx.netns_cookie()) else { return Ok(Endpoint::NONE) };
        if !in_pod.endpoint(destination.is_ip4()).same(destination) {
            return Ok(Endpoint::NONE);
        }
        at_target = true;
        listens_for = in_pod.pod_cgroup_id;
    }

    let source = SourcePod::current(ctx);
    let pod_cgroup_id = source.as_ref().map_or(0, |source| source.pod_cgroup_id);
    if listens_for != 0 && listens_for != pod_cgroup_id {
        // A process of another pod in this network, as a mesh's proxy: whom it speaks for, a token may tell.
        revoke_previous(ctx);
        return Ok(Endpoint::NONE);
    }
    let destined = Destined { service, at_node, at_target };

    let mut reported = (source.is_some() && pod_cgroup_id == 0).then_some(Counter::UnknownPod);
    if let Some(unknown) = reported {
        count(unknown);
    }
    let mut what = Counter::Redirected;
    let outcome = match source {
        None => Err(Counter::DeniedNoPod),
        Some(source) => match mode(&source, &destined) {
            Mode::PassThrough(how) => {
                revoke_previous(ctx);
                count(how);
                what = how;
                if matches!(how, Counter::Audited) {
                    reported = Some(how);
                }
                Ok(Endpoint::NONE)
            }
            _ if !(at_target || is_tcp && service.is_some() && destination.port == HTTP) => {
                Err(Counter::DeniedPort)
            }
            Mode::Deny => Err(Counter::Denied),
            Mode::Serve if !target::agent_is_alive() => {
                what = Counter::PassedAgentDown;
                when_down(ctx, effective, &destined)
            }
            Mode::Serve => {
                let listener = own_listener(ctx, pod_cgroup_id, destination.is_ip4());
                let target = if listener.is_none() { on_node.unwrap_or(&Endpoint::NONE) } else { &listener };
                redirect(ctx, &source, destination, target)
            }
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

/// The agent's listener in the pod's own network, or [`Endpoint::NONE`] where it has gone with its agent, where the socket is
/// in another network, or is bound to an interface that the loopback cannot be reached through. On the node there is the
/// predecessor's listener then.
#[inline(always)]
fn own_listener(ctx: &SockAddrCtx, pod_cgroup_id: u64, is_ip4: bool) -> Endpoint {
    match target::in_network(ctx.netns_cookie()) {
        Some(in_pod)
            if in_pod.pod_cgroup_id == pod_cgroup_id
                && holds(Defense::PodListeners)
                && !ctx.socket().is_some_and(Socket::is_bound_elsewhere) =>
        {
            let listener = in_pod.endpoint(is_ip4);
            if ctx.is_listened_at(&listener) { listener } else { Endpoint::NONE }
        }
        _ => Endpoint::NONE,
    }
}

/// What happens while no agent is alive: the EKS Pod Identity Agent may serve its own address where the target says so;
/// IMDS, and with it the node's role, is always refused.
#[inline(always)]
fn when_down(
    ctx: &SockAddrCtx,
    effective: Option<&Target>,
    destined: &Destined,
) -> Result<Endpoint, Counter> {
    let passes = effective.is_some_and(|target| target.when_down == WHEN_DOWN_PASS);
    if passes && !destined.at_target && matches!(destined.service, Some(Service::PodIdentity))
        || !holds(Defense::RefusalWhenDown)
    {
        revoke_previous(ctx);
        count(Counter::PassedAgentDown);
        return Ok(Endpoint::NONE);
    }
    Err(Counter::DeniedAgentDown)
}

/// What the policy says. At its own addresses the agent attests every pod, also those that it does not serve: a switch
/// that leaves a pod to others must not make it anonymous there.
#[inline(always)]
fn mode(source: &SourcePod, destined: &Destined) -> Mode {
    if source.is_exempt {
        return Mode::PassThrough(Counter::Untouched);
    }
    let imds = match source.policy.imds {
        IMDS_OFF => Mode::PassThrough(Counter::Untouched),
        IMDS_AUDIT => Mode::PassThrough(Counter::Audited),
        IMDS_INTERCEPT => Mode::Serve,
        _ => Mode::Deny,
    };
    if matches!(destined.service, Some(Service::Imds)) {
        return imds;
    }
    let imds_is_ours = matches!(imds, Mode::Serve | Mode::Deny);
    if source.policy.pod_identity != POD_IDENTITY_OFF
        || destined.at_target
        || destined.at_node && imds_is_ours
    {
        Mode::Serve
    } else {
        Mode::PassThrough(Counter::Untouched)
    }
}

/// Puts the origin on the socket. Returns the new address, which may be the same.
#[inline(always)]
fn redirect(
    ctx: &SockAddrCtx,
    source: &SourcePod,
    destination: &Endpoint,
    target: &Endpoint,
) -> Result<Endpoint, Counter> {
    if target.is_none() {
        return Err(Counter::DeniedInternal);
    }
    let socket = ctx.socket().ok_or(Counter::DeniedInternal)?;
    let pending = storage::get_or_create(&ORIGINS, socket).ok_or(Counter::DeniedInternal)?;
    // SAFETY: these helpers have no precondition.
    let (cgroup_id, started_at_ns) = unsafe { (bpf_get_current_cgroup_id(), bpf_ktime_get_boot_ns()) };
    let tgid = (bpf_get_current_pid_tgid() >> 32) as u32;
    let is_same_task = (pending.origin.cgroup_id, pending.origin.tgid) == (cgroup_id, tgid)
        || !holds(Defense::OriginOfEveryConnect);
    if pending.origin.state == STATE_MINTED && pending.origin.target.same(destination) && is_same_task {
        // While one program replaces another, both run: the first has redirected the connection already. It ran for the
        // same task; another one's socket may have a ticket left from a connect that failed early.
        return Ok(*target);
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
    Ok(*target)
}

/// The socket connects to where it is left alone: its previous origin must not show in `getpeername`.
#[inline(always)]
fn revoke_previous(ctx: &SockAddrCtx) {
    if let Some(previous) = ctx.socket().and_then(|socket| storage::get(&ORIGINS, socket)) {
        ticket::revoke(previous);
    }
}
