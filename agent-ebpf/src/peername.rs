//! `getpeername`: give the pod back the address that it dialled.
//!
//! Owns the answer; never changes where anything goes. An MPTCP socket shows the agent's address: the origin is on its
//! subflow, which these programs do not see.

use agent_common::{net::Endpoint, origin::STATE_SENT};

use crate::{ctx::Dial, maps::ORIGINS, storage};

/// `cgroup/getpeername4`.
#[inline(always)]
pub(crate) fn getpeername4(socket: &Dial) {
    if let Some(dialled) = dialled(socket, &socket.address4()) {
        socket.set_address4(dialled);
    }
}

/// `cgroup/getpeername6`, of v4-mapped connections too.
#[inline(always)]
pub(crate) fn getpeername6(socket: &Dial) {
    if let Some(dialled) = dialled(socket, &socket.address6()) {
        socket.set_address6(dialled);
    }
}

/// What was dialled, if `peer` is what it was sent to. The socket may have been dialled elsewhere since.
#[inline(always)]
fn dialled(socket: &Dial, peer: &Endpoint) -> Option<&'static Endpoint> {
    let origin = &storage::get(&ORIGINS, socket.socket()?)?.origin;
    (origin.state == STATE_SENT && origin.target.same(peer)).then_some(&origin.orig_dst)
}
