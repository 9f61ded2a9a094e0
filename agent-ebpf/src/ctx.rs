//! The kernel's contexts as typed values: one wrapper per program type.
//!
//! Owns every raw field access, with the byte order in the types; never decides anything.

use core::ptr::NonNull;

use aya_ebpf::bindings::bpf_sock;

mod frame;
mod ip;
mod sk_lookup;
mod skb;
mod sock_addr;
mod sock_ops;

pub(crate) use self::{
    frame::FrameCtx,
    sk_lookup::SkLookupCtx,
    skb::SkbCtx,
    sock_addr::SockAddrCtx,
    sock_ops::{STATE, SockOpsCtx, WRITE_HDR_OPT},
};

/// `IPPROTO_TCP`. MPTCP needs no case of its own: the hooks run for its subflows, which are TCP.
const IPPROTO_TCP: u32 = 6;
/// `SOCK_STREAM`.
const SOCK_STREAM: u32 = 1;
/// `AF_INET`.
const AF_INET: u32 = 2;

/// A socket that socket storage may be attached to.
#[derive(Clone, Copy)]
pub(crate) struct Socket(NonNull<bpf_sock>);

// === impl Socket ===

impl Socket {
    /// The kernel's socket.
    #[inline(always)]
    pub(crate) fn as_ptr(self) -> *mut bpf_sock {
        self.0.as_ptr()
    }

    /// Whether it is bound to a network interface other than the loopback, which every network numbers 1
    /// (`LOOPBACK_IFINDEX` of `include/net/flow.h`).
    #[inline(always)]
    pub(crate) fn is_bound_elsewhere(self) -> bool {
        // SAFETY: the kernel's socket lives as long as the program runs.
        unsafe { (*self.as_ptr()).bound_dev_if > 1 }
    }

    /// Whether it connects before it sends: TCP, and neither raw nor datagram.
    #[inline(always)]
    pub(crate) fn is_stream(self) -> bool {
        // SAFETY: the kernel's socket lives as long as the program runs.
        unsafe { (*self.as_ptr()).type_ == SOCK_STREAM }
    }
}
