//! Events for the agent, through the ring buffer.
//!
//! Owns how a record is filled; never decides anything. When the agent does not keep up, new events are lost and counted.

use agent_common::{counter::Counter, event::Event, net::Endpoint, origin::Origin};
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns,
};

use crate::{counters::count, ctx::SockAddrCtx, maps::EVENTS};

/// About a `connect` or `bind` call of the running task.
#[inline(always)]
pub(crate) fn of_call(kind: Counter, ctx: &SockAddrCtx, pod_cgroup_id: u64, destination: &Endpoint) {
    let task = bpf_get_current_pid_tgid();
    #[expect(clippy::cast_possible_truncation, reason = "the thread is in the low half")]
    let tid = task as u32;
    emit(Event {
        // SAFETY: the helper has no precondition.
        cgroup_id: unsafe { bpf_get_current_cgroup_id() },
        pod_cgroup_id,
        netns_cookie: ctx.netns_cookie(),
        at_ns: now(),
        address: *destination,
        kind: kind as u32,
        tgid: (task >> 32) as u32,
        tid,
        comm: bpf_get_current_comm().unwrap_or_default(),
    });
}

/// About an earlier connection attempt and one of its addresses; the running task may be another.
#[inline(always)]
pub(crate) fn of_origin(kind: Counter, origin: &Origin, address: Endpoint) {
    emit(Event {
        cgroup_id: origin.cgroup_id,
        pod_cgroup_id: origin.pod_cgroup_id,
        netns_cookie: origin.netns_cookie,
        at_ns: now(),
        address,
        kind: kind as u32,
        tgid: origin.tgid,
        tid: 0,
        comm: origin.comm,
    });
}

/// About a packet: all that is known of its sender is a cgroup, the socket's or else the pod's.
#[inline(always)]
pub(crate) fn of_packet(kind: Counter, cgroup_id: u64, pod_cgroup_id: u64, destination: Endpoint) {
    emit(Event {
        cgroup_id,
        pod_cgroup_id,
        netns_cookie: 0,
        at_ns: now(),
        address: destination,
        kind: kind as u32,
        tgid: 0,
        tid: 0,
        comm: [0; 16],
    });
}

/// About a connection of which only the peer's address is known.
#[inline(always)]
pub(crate) fn of_peer(kind: Counter, peer: Endpoint) {
    emit(Event {
        cgroup_id: 0,
        pod_cgroup_id: 0,
        netns_cookie: 0,
        at_ns: now(),
        address: peer,
        kind: kind as u32,
        tgid: 0,
        tid: 0,
        comm: [0; 16],
    });
}

#[inline(always)]
fn emit(event: Event) {
    match EVENTS.reserve(0) {
        Some(mut slot) => {
            slot.write(event);
            slot.submit(0);
        }
        None => count(Counter::EventsDropped),
    }
}

/// The time in events and origins: nanoseconds of `CLOCK_BOOTTIME`.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper has no precondition.
    unsafe { bpf_ktime_get_boot_ns() }
}
