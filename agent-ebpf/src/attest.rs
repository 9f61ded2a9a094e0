//! The agent's side of the handshake: redeem the ticket and put the origin on the accepted socket.
//!
//! Owns the redemption; never trusts anything in the segment but the ticket, and that only where its connection was
//! redirected to: whoever makes the node translate the address, or reads a ticket on its way, can use it nowhere else. A
//! connection without a valid ticket gets no origin, and its caller is anonymous to the agent.

use agent_common::{
    counter::Counter,
    defense::{Defense, holds},
    origin::Origin,
};
use aya_ebpf::bindings::BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB;

use crate::{
    counters::count,
    ctx::SockOpsCtx,
    events,
    globals::TICKET_LIFE,
    limit, log,
    maps::{ACCEPTED, TICKETS},
    storage, ticket,
};

/// `sock_ops` on the agent's cgroup.
#[inline(always)]
pub(crate) fn passive(ctx: &SockOpsCtx) {
    if ctx.event() != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB {
        return;
    }
    let Some(socket) = ctx.socket() else { return };
    if storage::get(&ACCEPTED, socket).is_some() {
        // While one program replaces another, both run: the first has done it.
        return;
    }
    // With SYN cookies there is no saved SYN; the ACK that completes the handshake has the option as well.
    let in_segment = || ctx.ticket_in_segment().filter(|_| holds(Defense::TicketInAck));
    let Some(number) = ctx.ticket_in_saved_syn().or_else(in_segment) else {
        // In a pod's network it is mostly the agent itself, which makes sure that its listeners answer.
        if !ctx.local().is_loopback() {
            count(Counter::NoTicket);
        }
        return;
    };
    // SAFETY: the slot may be reused while it is copied, but then the removal below fails and the copy is dropped.
    let Some(pending) = (unsafe { TICKETS.get(number).copied() }) else { return refuse(ctx) };
    if !was_sent_here(ctx, &pending.origin) && holds(Defense::TicketPath) {
        // The ticket stays good for its own connection.
        count(Counter::DivertedTicket);
        log::of_ticket(Counter::DivertedTicket, &pending.origin);
        return events::of_origin(Counter::DivertedTicket, &pending.origin, ctx.remote());
    }
    if holds(Defense::SingleUse) && TICKETS.remove(number).is_err() {
        // Another CPU has redeemed it in between.
        return refuse(ctx);
    }
    limit::give_back(pending.counts_for);
    let origin = &pending.origin;
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

/// Whether the connection has arrived where its origin was redirected to: at the same address and port and, on a loopback,
/// in the same network.
#[inline(always)]
fn was_sent_here(ctx: &SockOpsCtx, origin: &Origin) -> bool {
    origin.target.same(&ctx.local())
        && (!origin.target.is_loopback() || origin.netns_cookie == ctx.netns_cookie())
}

/// Leaves the connection anonymous: its ticket is forged, or was redeemed or dropped before.
#[inline(always)]
fn refuse(ctx: &SockOpsCtx) {
    let peer = ctx.remote();
    count(Counter::BadTicket);
    log::of_peer(Counter::BadTicket, &peer);
    events::of_peer(Counter::BadTicket, peer);
}
