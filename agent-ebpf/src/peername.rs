//! `getpeername`: shows the pod its original destination.
//!
//! Owns the answer; never changes where anything goes. An MPTCP socket shows the agent's address: the origin is on its
//! subflow, which these programs do not see.

use agent_common::{net::Endpoint, origin::STATE_SENT};

use crate::{ctx::SockAddrCtx, maps::ORIGINS, storage};

/// `cgroup/getpeername4`.
#[inline(always)]
pub(crate) fn getpeername4(ctx: &SockAddrCtx) {
    if let Some(original) = original_destination(ctx, &ctx.address4()) {
        ctx.set_address4(original);
    }
}

/// `cgroup/getpeername6`, of v4-mapped connections too.
#[inline(always)]
pub(crate) fn getpeername6(ctx: &SockAddrCtx) {
    if let Some(original) = original_destination(ctx, &ctx.address6()) {
        ctx.set_address6(original);
    }
}

/// The original destination, if `peer` is where the connection was redirected to. The socket may have connected elsewhere
/// since.
#[inline(always)]
fn original_destination(ctx: &SockAddrCtx, peer: &Endpoint) -> Option<&'static Endpoint> {
    let origin = &storage::get(&ORIGINS, ctx.socket()?)?.origin;
    (origin.state == STATE_SENT && origin.target.same(peer)).then_some(&origin.orig_dst)
}
