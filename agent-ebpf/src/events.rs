//! Telling the agent what happens, through the ring buffer.
//!
//! Owns the records' making; never decides. When the agent does not keep up, what is new is lost, and counted.

use agent_common::{counter::Counter, event::Event, net::Endpoint, origin::Origin};
use aya_ebpf::helpers::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns,
};

use crate::{
    counters::count,
    ctx::{Dial, Packet},
    maps::EVENTS,
};

/// Something about a dial, as it is made.
#[inline(always)]
pub(crate) fn of_dial(kind: Counter, dial: &Dial, pod_cgroup_id: u64, destination: &Endpoint) {
    let task = bpf_get_current_pid_tgid();
    #[expect(clippy::cast_possible_truncation, reason = "the thread is in the low half")]
    let tid = task as u32;
    emit(Event {
        // SAFETY: the helper has no precondition.
        cgroup_id: unsafe { bpf_get_current_cgroup_id() },
        pod_cgroup_id,
        netns_cookie: dial.netns_cookie(),
        at_ns: now(),
        address: *destination,
        kind: kind as u32,
        tgid: (task >> 32) as u32,
        tid,
        comm: bpf_get_current_comm().unwrap_or_default(),
    });
}

/// Something about a dial that was made before, and an address of it; its task need not be the one that runs.
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

/// Something about a packet: of who sends it no more is known than its socket.
#[inline(always)]
pub(crate) fn of_packet(kind: Counter, packet: &Packet, pod_cgroup_id: u64, destination: Endpoint) {
    emit(Event {
        cgroup_id: packet.cgroup_id(),
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

/// Something about a connection of which no more is known than where it comes from.
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

/// The time as events and origins have it: nanoseconds of `CLOCK_BOOTTIME`.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper has no precondition.
    unsafe { bpf_ktime_get_boot_ns() }
}
