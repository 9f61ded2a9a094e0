//! The pod's side of the handshake: mint the ticket, send it with the SYN, clean it up at close.
//!
//! Owns the ticket from its making to the peer's answer; never rewrites addresses and never asks who is running (the
//! helpers for that are not allowed in `sock_ops` before Linux 6.4,
//! <https://github.com/torvalds/linux/commit/c501bf55c88b834adefda870c7c092ec9052a437>). Callbacks about a
//! socket's state: Linux 4.16, <https://github.com/torvalds/linux/commit/d44874910a26f3a8f81edf873a2473363f07f660>.

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
    ctx::{STATE, SockOpsCtx, WRITE_HDR_OPT},
    events,
    globals::TICKET_KEY,
    limit, log,
    maps::{ORIGINS, TICKETS},
    storage,
};

/// The ticket of a connection attempt. It never repeats: no other socket has the cookie, and a socket connects once at a
/// time.
#[inline(always)]
pub(crate) fn mint(socket_cookie: u64, started_at_ns: u64) -> u64 {
    if !holds(Defense::UnguessableTickets) {
        return started_at_ns >> 26;
    }
    siphash24(TICKET_KEY.load(), [socket_cookie, started_at_ns])
}

/// Ends the socket's connection attempt: its ticket cannot be redeemed any more. Whether it could have been until now.
#[inline(always)]
pub(crate) fn revoke(PendingOrigin { origin, counts_for }: &mut PendingOrigin) -> bool {
    let was_redeemable =
        origin.state == STATE_SENT && holds(Defense::RevokedTickets) && TICKETS.remove(origin.ticket).is_ok();
    if was_redeemable {
        limit::give_back(*counts_for);
        count(Counter::TicketDropped);
    }
    origin.state = STATE_SPENT;
    was_redeemable
}

/// `sock_ops` on kubepods.
#[inline(always)]
pub(crate) fn active(ctx: &SockOpsCtx) {
    let event = ctx.event();
    if event != BPF_SOCK_OPS_TCP_CONNECT_CB
        && event != BPF_SOCK_OPS_HDR_OPT_LEN_CB
        && event != BPF_SOCK_OPS_WRITE_HDR_OPT_CB
        && event != BPF_SOCK_OPS_STATE_CB
    {
        return;
    }
    let Some(pending) = ctx.socket().and_then(|socket| storage::get(&ORIGINS, socket)) else { return };
    match event {
        BPF_SOCK_OPS_TCP_CONNECT_CB => begin(ctx, pending),
        BPF_SOCK_OPS_HDR_OPT_LEN_CB => reserve(ctx, &pending.origin),
        BPF_SOCK_OPS_WRITE_HDR_OPT_CB if pending.origin.state == STATE_SENT => {
            ctx.store_option(pending.origin.ticket);
        }
        BPF_SOCK_OPS_STATE_CB if ctx.new_state() == BPF_TCP_CLOSE => end(ctx, pending),
        _ => {}
    }
}

/// The handshake begins: from now on the ticket may be redeemed.
///
/// Here and not in `connect`, because a call that fails without a route never reaches another hook.
#[inline(always)]
fn begin(ctx: &SockOpsCtx, pending: &mut PendingOrigin) {
    // The socket may have connected elsewhere since, or a second program may have been here before.
    if pending.origin.state != STATE_MINTED || !pending.origin.target.same(&ctx.remote()) {
        return;
    }
    pending.origin.state = STATE_SENT;
    // With TCP_FASTOPEN_CONNECT the handshake begins with the first data, long after `connect`. Linux 4.11:
    // <https://github.com/torvalds/linux/commit/19f6d3f3c8422d65b5e3d2162e30ef07c6e21ea2>
    pending.origin.started_at_ns = events::now();
    if !store(pending) {
        pending.origin.state = STATE_SPENT;
        count(Counter::TicketsFull);
        log::of_ticket(Counter::TicketsFull, &pending.origin);
        return events::of_origin(Counter::TicketsFull, &pending.origin, pending.origin.orig_dst);
    }
    ctx.request_callbacks(WRITE_HDR_OPT | STATE);
    count(Counter::TicketSent);
    log::of_ticket(Counter::TicketSent, &pending.origin);
}

/// Makes the ticket one that can be redeemed, and counts it first, so that no count is ever less than it should be.
#[inline(always)]
fn store(pending: &PendingOrigin) -> bool {
    if !limit::take(pending.counts_for) {
        return false;
    }
    let stored = TICKETS.insert(pending.origin.ticket, *pending, u64::from(BPF_NOEXIST)).is_ok();
    if !stored {
        limit::give_back(pending.counts_for);
    }
    stored
}

/// A segment is being laid out: asks for room, until the peer has answered.
///
/// Stopping after the handshake's ACK would lose the identity when SYN cookies are on and that ACK is lost.
#[inline(always)]
fn reserve(ctx: &SockOpsCtx, origin: &Origin) {
    if origin.state == STATE_SENT && !ctx.peer_has_answered() {
        if !ctx.reserve_option() {
            count(Counter::OptionNoRoom);
        }
        return;
    }
    // With TCP Fast Open the peer answers before it redeems the ticket; then the close must still be seen.
    let redeemed = TICKETS.get_ptr(origin.ticket).is_none();
    ctx.stop_callbacks(if redeemed { WRITE_HDR_OPT | STATE } else { WRITE_HDR_OPT });
}

/// The connection is closed. One that was neither established nor refused is reported: its client sees only a timeout.
#[inline(always)]
fn end(ctx: &SockOpsCtx, pending: &mut PendingOrigin) {
    #[expect(clippy::cast_possible_truncation, reason = "a fraction of a second")]
    const AFTER_NS: u64 = UNANSWERED_AFTER.as_nanos() as u64;
    let is_unanswered = ctx.old_state() == BPF_TCP_SYN_SENT && age(&pending.origin) >= AFTER_NS;
    if revoke(pending) && is_unanswered {
        count(Counter::Unanswered);
        events::of_origin(Counter::Unanswered, &pending.origin, pending.origin.target);
    }
}

/// How long ago the handshake began, in nanoseconds.
#[inline(always)]
pub(crate) fn age(origin: &Origin) -> u64 {
    events::now().wrapping_sub(origin.started_at_ns)
}
