//! A call with an address: the context of `cgroup/connect4`, `cgroup/bind4`, `cgroup/getpeername4` and their IPv6 siblings.
//!
//! Owns its layout; never decides anything. Cookies of network namespaces: Linux 5.7,
//! <https://github.com/torvalds/linux/commit/f318903c0bf42448b4c884732df2bbb0ef7a2284>. `bind` programs: 4.17,
//! <https://github.com/torvalds/linux/commit/4fbac77d2d092b475dda9eea66da674369665427>.

use core::ptr::NonNull;

use agent_common::net::{Endpoint, NetPort};
use aya_ebpf::{
    bindings::{
        bpf_sock_addr, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
    },
    helpers::{
        bpf_get_netns_cookie, bpf_get_socket_cookie,
        generated::{bpf_sk_lookup_tcp, bpf_sk_release},
    },
    programs::SockAddrContext,
};

use super::{IPPROTO_TCP, Socket};

/// The two lengths of a `bpf_sock_tuple`.
const IP4_TUPLE_LEN: u32 = 12;
const IP6_TUPLE_LEN: u32 = 36;

/// `bpf_sock_addr`: the call, its address and its socket.
pub(crate) struct SockAddrCtx(*mut bpf_sock_addr);

// === impl SockAddrCtx ===

// SAFETY, for every block below: the kernel passes a valid context, which lives as long as the program runs.
impl SockAddrCtx {
    #[inline(always)]
    pub(crate) fn new(SockAddrContext { sock_addr }: SockAddrContext) -> Self {
        Self(sock_addr)
    }

    /// The address that `connect4` or `bind4` is called with, or that `getpeername4` is about to return.
    #[inline(always)]
    pub(crate) fn address4(&self) -> Endpoint {
        // SAFETY: see above.
        unsafe { Endpoint::from_ip4_be((*self.0).user_ip4, self.port()) }
    }

    /// The address that `connect6` or `bind6` is called with, or that `getpeername6` is about to return.
    #[inline(always)]
    pub(crate) fn address6(&self) -> Endpoint {
        // SAFETY: see above. Word by word: a copy of the whole array offsets the context pointer, which the verifier
        // refuses.
        let words = unsafe {
            [(*self.0).user_ip6[0], (*self.0).user_ip6[1], (*self.0).user_ip6[2], (*self.0).user_ip6[3]]
        };
        Endpoint::from_ip6_be(words, self.port())
    }

    /// Whether the socket is TCP.
    #[inline(always)]
    pub(crate) fn is_tcp(&self) -> bool {
        // SAFETY: see above. Volatile, or the compiler keeps the field's address, which the verifier refuses.
        unsafe { (&raw const (*self.0).protocol).read_volatile() == IPPROTO_TCP }
    }

    /// Replaces the address.
    #[inline(always)]
    pub(crate) fn set_address4(&self, address: &Endpoint) {
        // SAFETY: see above.
        unsafe {
            (*self.0).user_ip4 = address.addr[3];
            (*self.0).user_port = u32::from(address.port.to_be());
        }
    }

    /// Replaces the address; a v4-mapped one stays v4-mapped.
    #[inline(always)]
    pub(crate) fn set_address6(&self, address: &Endpoint) {
        // SAFETY: see above.
        unsafe {
            (*self.0).user_ip6[0] = address.addr[0];
            (*self.0).user_ip6[1] = address.addr[1];
            (*self.0).user_ip6[2] = address.addr[2];
            (*self.0).user_ip6[3] = address.addr[3];
            (*self.0).user_port = u32::from(address.port.to_be());
        }
    }

    /// The socket of the call.
    #[inline(always)]
    pub(crate) fn socket(&self) -> Option<Socket> {
        // SAFETY: see above.
        NonNull::new(unsafe { (*self.0).__bindgen_anon_1.sk }).map(Socket)
    }

    /// The socket's cookie, which the kernel never uses again.
    #[inline(always)]
    pub(crate) fn socket_cookie(&self) -> u64 {
        // SAFETY: see above.
        unsafe { bpf_get_socket_cookie(self.0.cast()) }
    }

    /// The cookie of the socket's network namespace, as `SO_NETNS_COOKIE` returns it.
    #[inline(always)]
    pub(crate) fn netns_cookie(&self) -> u64 {
        // SAFETY: see above.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    /// Whether somebody listens at this address in the network of the call's socket. For this context since Linux 5.0:
    /// `sock_addr_func_proto` of <https://github.com/torvalds/linux/blob/v6.1/net/core/filter.c>
    #[inline(always)]
    pub(crate) fn is_listened_at(&self, address: &Endpoint) -> bool {
        /// `BPF_F_CURRENT_NETNS`: -1, of which the helper looks at the lower half.
        const CURRENT_NETNS: u64 = u64::MAX;
        // Nobody is connected from port 0, so what is found is a listener.
        let mut tuple = bpf_sock_tuple {
            __bindgen_anon_1: bpf_sock_tuple__bindgen_ty_1 {
                ipv6: bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
                    saddr: address.addr,
                    daddr: address.addr,
                    sport: 0,
                    dport: address.port.to_be(),
                },
            },
        };
        let mut length = IP6_TUPLE_LEN;
        if address.is_ip4() {
            tuple.__bindgen_anon_1.ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
                saddr: address.addr[3],
                daddr: address.addr[3],
                sport: 0,
                dport: address.port.to_be(),
            };
            length = IP4_TUPLE_LEN;
        }
        // SAFETY: see above; the tuple is as long as said, and what is found is released.
        unsafe {
            let found = bpf_sk_lookup_tcp(self.0.cast(), &raw mut tuple, length, CURRENT_NETNS, 0);
            if found.is_null() {
                return false;
            }
            bpf_sk_release(found.cast());
        }
        true
    }

    #[inline(always)]
    fn port(&self) -> NetPort {
        // SAFETY: see above.
        let port = unsafe { (*self.0).user_port };
        #[expect(clippy::cast_possible_truncation, reason = "the port is in the low half")]
        NetPort::from_be(port as u16)
    }
}
