//! The egress filter: drops a pod's packets to IMDS or the agent that belong to no connection which `connect` allowed, and
//! reports what is requested from IMDS.
//!
//! Owns the second layer behind `connect`, which sees neither raw packets nor unconnected datagrams, nor addresses that
//! are translated later; never looks at any other packet.

use agent_common::{
    counter::Counter,
    egress::{Asked, JOB_AUDIT_PATHS, JOB_FILTER},
    net::{Endpoint, HTTP_PORT, Service},
    policy::{IMDS_AUDIT, IMDS_DENY, IMDS_OFF, UNKNOWN_IN_POD_NETWORK},
};

use crate::{
    counters::count,
    ctx::{SkbCtx, Socket},
    events,
    maps::{AUDITED, EGRESS_JOBS, ORIGINS},
    source_pod::{self, Lineage},
    storage, target,
};

/// What happens to a packet.
pub(crate) enum Verdict {
    Pass,
    /// The sender is told `EPERM`, unless it is TCP, which tries again.
    Drop,
}

// === impl Verdict ===

impl Verdict {
    /// The value that a `cgroup_skb` program returns.
    #[inline(always)]
    pub(crate) fn code(self) -> i32 {
        match self {
            Self::Pass => 1,
            Self::Drop => 0,
        }
    }
}

/// `cgroup_skb/egress` on kubepods.
#[inline(always)]
pub(crate) fn egress(ctx: &SkbCtx) -> Verdict {
    match ctx.destination() {
        Some(destination) if is_ours(&destination) => judge(ctx, destination),
        _ => Verdict::Pass,
    }
}

/// Whether it is an address of IMDS, or the agent's.
#[inline(always)]
fn is_ours(destination: &Endpoint) -> bool {
    matches!(destination.service(), Some(Service::Imds))
        || target::effective()
            .and_then(|target| target::endpoint(target, destination.is_ip4()))
            .is_some_and(|target| target.same_address(destination))
}

/// Applies the policy of the socket's pod. A connection that is older than the policy is dropped too.
#[inline(always)]
fn judge(ctx: &SkbCtx, destination: Endpoint) -> Verdict {
    let socket = ctx.socket();
    if socket.is_some_and(|socket| was_allowed(socket, &destination)) {
        return Verdict::Pass;
    }
    let (pod_cgroup_id, imds) = match Lineage::of(|level| ctx.ancestor(level)) {
        None => (0, IMDS_DENY),
        Some(lineage) => match lineage.known() {
            Some((pod, policy)) => (pod, policy.imds),
            // `connect` has decided already, by the socket's network namespace, which is not known here.
            None if socket.is_some_and(Socket::is_stream) => return Verdict::Pass,
            None => (0, source_pod::unknown(UNKNOWN_IN_POD_NETWORK).imds),
        },
    };
    let jobs = EGRESS_JOBS.get(0).copied().unwrap_or(0);
    if imds == IMDS_AUDIT && jobs & JOB_AUDIT_PATHS != 0 {
        audit(ctx, socket, pod_cgroup_id, destination);
    }
    if matches!(imds, IMDS_OFF | IMDS_AUDIT) || jobs & JOB_FILTER == 0 {
        return Verdict::Pass;
    }
    report(Counter::EgressDropped, ctx, pod_cgroup_id, destination);
    Verdict::Drop
}

/// Whether `connect` has allowed the socket to go there. Only TCP sockets have an origin, and they send to their peer only;
/// the last segments leave after the origin is spent.
#[inline(always)]
fn was_allowed(socket: Socket, destination: &Endpoint) -> bool {
    storage::get(&ORIGINS, socket).is_some_and(|pending| pending.origin.target.same_address(destination))
}

/// Reports what a connection to IMDS requests, by its first request for anything but a token: once per socket.
///
/// IMDS is plain HTTP, and clients send a request in one segment; a request in several counts as `Other`.
#[inline(always)]
fn audit(ctx: &SkbCtx, socket: Option<Socket>, pod_cgroup_id: u64, destination: Endpoint) {
    let Some(socket) = socket else { return };
    if !matches!(destination.service(), Some(Service::Imds))
        || ctx.port().get() != HTTP_PORT
        || storage::get(&AUDITED, socket).is_some()
    {
        return;
    }
    let Some(head) = ctx.payload_of_tcp() else { return };
    let what = match Asked::of(&head) {
        Asked::Token => return,
        Asked::Credentials => Counter::AuditedCredentials,
        Asked::UserData => Counter::AuditedUserData,
        Asked::Other => Counter::AuditedOther,
    };
    // If the kernel has no memory for it, the next request is reported too.
    let _ = storage::get_or_create(&AUDITED, socket);
    report(what, ctx, pod_cgroup_id, destination);
}

#[inline(always)]
fn report(what: Counter, ctx: &SkbCtx, pod_cgroup_id: u64, destination: Endpoint) {
    count(what);
    events::of_packet(
        what,
        ctx.cgroup_id(),
        pod_cgroup_id,
        Endpoint::from_ip6_be(destination.addr, ctx.port()),
    );
}
