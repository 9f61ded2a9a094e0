//! What leaves a pod for IMDS or the agent: stop what no dial was let through for, tell what is asked for.
//!
//! Owns the second layer behind `connect`, which sees neither raw packets nor datagrams without a connection, nor what
//! is translated on its way; never looks at any other packet.

use agent_common::{
    counter::Counter,
    defense::{Defense, holds},
    egress::{Asked, JOB_AUDIT_PATHS, JOB_FILTER},
    net::{Endpoint, HTTP_PORT, Service},
    policy::{IMDS_AUDIT, IMDS_DENY, IMDS_OFF, UNKNOWN_IN_POD_NETWORK},
};

use crate::{
    caller::{self, Lineage},
    counters::count,
    ctx::{Packet, Socket},
    events,
    maps::{AUDITED, EGRESS_JOBS, ORIGINS},
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
pub(crate) fn egress(packet: &Packet) -> Verdict {
    match packet.destination() {
        Some(destination) if is_ours(&destination) => judge(packet, destination),
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

/// What the policy of the socket's pod says. A connection from before the policy stops too.
#[inline(always)]
fn judge(packet: &Packet, destination: Endpoint) -> Verdict {
    let socket = packet.socket();
    if socket.is_some_and(|socket| was_let_through(socket, &destination)) {
        return Verdict::Pass;
    }
    let (pod_cgroup_id, imds) = match Lineage::of(|level| packet.ancestor(level)) {
        None => (0, IMDS_DENY),
        Some(lineage) => match lineage.known() {
            Some((pod, policy)) => (pod, policy.imds),
            // `connect` has decided, and by the socket's network, which is not known here.
            None if socket.is_some_and(Socket::is_stream) => return Verdict::Pass,
            None => (0, caller::unknown(UNKNOWN_IN_POD_NETWORK).imds),
        },
    };
    let jobs = EGRESS_JOBS.get(0).copied().unwrap_or(0);
    if imds == IMDS_AUDIT && jobs & JOB_AUDIT_PATHS != 0 {
        audit(packet, socket, pod_cgroup_id, destination);
    }
    if matches!(imds, IMDS_OFF | IMDS_AUDIT) || jobs & JOB_FILTER == 0 {
        return Verdict::Pass;
    }
    tell(Counter::EgressDropped, packet, pod_cgroup_id, destination);
    Verdict::Drop
}

/// Whether `connect` has sent the socket there. Only TCP sockets have an origin, and they send to their peer alone; the
/// last segments leave after the origin is spent.
#[inline(always)]
fn was_let_through(socket: Socket, destination: &Endpoint) -> bool {
    storage::get(&ORIGINS, socket).is_some_and(|dialled| dialled.origin.target.same_address(destination))
}

/// Tells what a connection to IMDS is for, by its first request for anything but a token: once a socket.
///
/// IMDS is plain HTTP, and clients send a request in one segment; one that does not counts as something else.
#[inline(always)]
fn audit(packet: &Packet, socket: Option<Socket>, pod_cgroup_id: u64, destination: Endpoint) {
    let Some(socket) = socket else { return };
    if !matches!(destination.service(), Some(Service::Imds))
        || packet.port().get() != HTTP_PORT
        || storage::get(&AUDITED, socket).is_some()
    {
        return;
    }
    let Some(head) = packet.payload_of_tcp() else { return };
    let what = match Asked::of(&head) {
        Asked::Token => return,
        Asked::Credentials => Counter::AuditedCredentials,
        Asked::UserData => Counter::AuditedUserData,
        Asked::Other => Counter::AuditedOther,
    };
    // Without memory for it the next request is told too.
    let _ = storage::get_or_create(&AUDITED, socket);
    tell(what, packet, pod_cgroup_id, destination);
}

#[inline(always)]
fn tell(what: Counter, packet: &Packet, pod_cgroup_id: u64, destination: Endpoint) {
    count(what);
    events::of_packet(what, packet, pod_cgroup_id, Endpoint::from_ip6_be(destination.addr, packet.port()));
}
