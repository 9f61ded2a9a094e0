//! The agent's side of the handshake: redeem the ticket and put the origin on the accepted socket.
//!
//! Owns the redemption; never trusts anything in the segment but the ticket. A connection without a valid ticket is
//! left without an origin: the agent takes it for anonymous.

use agent_common::{
    counter::Counter,
    defense::{Defense, holds},
};
use aya_ebpf::bindings::BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB;

use crate::{
    counters::count,
    ctx::Handshake,
    events,
    globals::TICKET_LIFE,
    limit, log,
    maps::{ACCEPTED, TICKETS},
    storage, ticket,
};

/// `sock_ops` on the agent's cgroup.
#[inline(always)]
pub(crate) fn passive(handshake: &Handshake) {
    if handshake.event() != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        return;
    }
    let Some(socket) = handshake.socket() else { return };
    if storage::get(&ACCEPTED, socket).is_some() {
        // Two of these programs run while one replaces the other: the first has done it.
        return;
    }
    // With SYN cookies there is no saved SYN; the ACK that completes the handshake has the option as well.
    let of_segment = || handshake.ticket_of_segment().filter(|_| holds(Defense::TicketInAck));
    let Some(number) = handshake.ticket_of_syn().or_else(of_segment) else {
        return count(Counter::NoTicket);
    };
    // SAFETY: the slot may be reused while it is copied, but then the removal below fails and the copy is dropped.
    let Some(dialled) = (unsafe { TICKETS.get(number).copied() }) else { return refuse(handshake) };
    if holds(Defense::SingleUse) && TICKETS.remove(number).is_err() {
        // Somebody else has redeemed it in between.
        return refuse(handshake);
    }
    limit::give_back(dialled.counts_for);
    let origin = &dialled.origin;
    if ticket::age(origin) > TICKET_LIFE.load() {
        count(Counter::TicketExpired);
        log::of_ticket(Counter::TicketExpired, origin);
        return events::of_origin(Counter::TicketExpired, origin, origin.orig_dst);
    }
    let what = match storage::create(&ACCEPTED, socket, origin) {
        Some(_) => Counter::Redeemed,
        None => Counter::AcceptedNoRoom,
    };
    count(what);
    log::of_ticket(what, origin);
}

/// Leaves the connection anonymous: its ticket is forged, or was redeemed or dropped before.
#[inline(always)]
fn refuse(handshake: &Handshake) {
    let peer = handshake.remote();
    count(Counter::BadTicket);
    log::of_peer(Counter::BadTicket, &peer);
    events::of_peer(Counter::BadTicket, peer);
}
