//! The pod's side of the handshake: mint the ticket, send it with the SYN, clean it up at close.
//!
//! Owns the ticket from its making to the peer's answer; never rewrites addresses and never asks who is running (the
//! helpers for that are not allowed in `sock_ops` before 6.4).

use agent_common::{
    abi::UNANSWERED_AFTER,
    counter::Counter,
    defense::{Defense, holds},
    origin::{Origin, PendingOrigin, STATE_MINTED, STATE_SENT, STATE_SPENT},
    siphash::siphash24,
};
use aya_ebpf::bindings::{
    BPF_NOEXIST, BPF_SOCK_OPS_HDR_OPT_LEN_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_TCP_CONNECT_CB,
    BPF_SOCK_OPS_WRITE_HDR_OPT_CB, BPF_TCP_CLOSE, BPF_TCP_SYN_SENT,
};

use crate::{
    counters::count,
    ctx::{Handshake, STATE, WRITE_HDR_OPT},
    events,
    globals::TICKET_KEY,
    limit, log,
    maps::{ORIGINS, TICKETS},
    storage,
};

/// The ticket of a dial. It never repeats: no other socket has the cookie, and the socket dials once at a time.
#[inline(always)]
pub(crate) fn mint(socket_cookie: u64, started_at_ns: u64) -> u64 {
    if !holds(Defense::UnguessableTickets) {
        return started_at_ns >> 26;
    }
    siphash24(TICKET_KEY.load(), [socket_cookie, started_at_ns])
}

/// The socket's dial is over: its ticket is worth nothing any more. Whether it could have been redeemed until now.
#[inline(always)]
pub(crate) fn revoke(PendingOrigin { origin, counts_for }: &mut PendingOrigin) -> bool {
    let was_alive =
        origin.state == STATE_SENT && holds(Defense::RevokedTickets) && TICKETS.remove(origin.ticket).is_ok();
    if was_alive {
        limit::give_back(*counts_for);
        count(Counter::TicketDropped);
    }
    origin.state = STATE_SPENT;
    was_alive
}

/// `sock_ops` on kubepods.
#[inline(always)]
pub(crate) fn active(handshake: &Handshake) {
    let event = handshake.event();
    if event != BPF_SOCK_OPS_TCP_CONNECT_CB
        && event != BPF_SOCK_OPS_HDR_OPT_LEN_CB
        && event != BPF_SOCK_OPS_WRITE_HDR_OPT_CB
        && event != BPF_SOCK_OPS_STATE_CB
    {
        return;
    }
    let Some(dialled) = handshake.socket().and_then(|socket| storage::get(&ORIGINS, socket)) else { return };
    match event {
        BPF_SOCK_OPS_TCP_CONNECT_CB => begin(handshake, dialled),
        BPF_SOCK_OPS_HDR_OPT_LEN_CB => reserve(handshake, &dialled.origin),
        BPF_SOCK_OPS_WRITE_HDR_OPT_CB if dialled.origin.state == STATE_SENT => {
            handshake.store_option(dialled.origin.ticket);
        }
        BPF_SOCK_OPS_STATE_CB if handshake.new_state() == BPF_TCP_CLOSE => end(handshake, dialled),
        _ => {}
    }
}

/// The handshake begins: from now on the ticket may be redeemed.
///
/// Here and not in `connect`, because a `connect` that fails for want of a route is never heard of again.
#[inline(always)]
fn begin(handshake: &Handshake, dialled: &mut PendingOrigin) {
    // The socket may have been dialled elsewhere since, or a second program may have been here before.
    if dialled.origin.state != STATE_MINTED || !dialled.origin.target.same(&handshake.remote()) {
        return;
    }
    dialled.origin.state = STATE_SENT;
    // A dial that waits for its first data begins long after `connect`.
    dialled.origin.started_at_ns = events::now();
    if !store(dialled) {
        dialled.origin.state = STATE_SPENT;
        count(Counter::TicketsFull);
        log::of_ticket(Counter::TicketsFull, &dialled.origin);
        return events::of_origin(Counter::TicketsFull, &dialled.origin, dialled.origin.orig_dst);
    }
    handshake.ask_for(WRITE_HDR_OPT | STATE);
    count(Counter::TicketSent);
    log::of_ticket(Counter::TicketSent, &dialled.origin);
}

/// Makes the ticket one that can be redeemed, and counts it first, so that no count is ever less than it should be.
#[inline(always)]
fn store(dialled: &PendingOrigin) -> bool {
    if !limit::take(dialled.counts_for) {
        return false;
    }
    let stored = TICKETS.insert(dialled.origin.ticket, *dialled, u64::from(BPF_NOEXIST)).is_ok();
    if !stored {
        limit::give_back(dialled.counts_for);
    }
    stored
}

/// A segment is being laid out: asks for room, until the peer has answered.
///
/// Stopping after the handshake's ACK would lose the identity when SYN cookies are on and that ACK is lost.
#[inline(always)]
fn reserve(handshake: &Handshake, origin: &Origin) {
    if origin.state == STATE_SENT && !handshake.peer_has_answered() {
        if !handshake.reserve_option() {
            count(Counter::OptionNoRoom);
        }
        return;
    }
    // With TCP Fast Open the peer answers before it redeems the ticket; then the close must still be heard of.
    let redeemed = TICKETS.get_ptr(origin.ticket).is_none();
    handshake.do_without(if redeemed { WRITE_HDR_OPT | STATE } else { WRITE_HDR_OPT });
}

/// The connection is over. One that never was, and was not refused at once either, is worth knowing of: without a word
/// from here its client only knows that it has waited in vain.
#[inline(always)]
fn end(handshake: &Handshake, dialled: &mut PendingOrigin) {
    #[expect(clippy::cast_possible_truncation, reason = "a fraction of a second")]
    const AFTER_NS: u64 = UNANSWERED_AFTER.as_nanos() as u64;
    let is_unanswered = handshake.old_state() == BPF_TCP_SYN_SENT && age(&dialled.origin) >= AFTER_NS;
    if revoke(dialled) && is_unanswered {
        count(Counter::Unanswered);
        events::of_origin(Counter::Unanswered, &dialled.origin, dialled.origin.target);
    }
}

/// How long ago the handshake began, in nanoseconds.
#[inline(always)]
pub(crate) fn age(origin: &Origin) -> u64 {
    events::now().wrapping_sub(origin.started_at_ns)
}
