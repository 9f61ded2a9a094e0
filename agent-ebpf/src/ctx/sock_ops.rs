//! An event in a connection's life: the context of `sock_ops`.
//!
//! Owns its layout and the ticket's option in the TCP header; never decides anything. `sock_ops` programs: Linux 4.13,
//! <https://github.com/torvalds/linux/commit/40304b2a1567fecc321f640ee4239556dd0f3ee0>. Options in TCP headers: 5.10,
//! <https://github.com/torvalds/linux/commit/0813a841566f0962a5551be7749b43c45f0022a0>. Choice of callbacks: 4.16,
//! <https://github.com/torvalds/linux/commit/b13d880721729384757f235166068c315326f4a1>.

use core::ptr::NonNull;

use agent_common::{
    abi::{TICKET_OPTION_EXID, TICKET_OPTION_KIND, TICKET_OPTION_LEN},
    net::{Endpoint, NetPort},
};
use aya_ebpf::{
    bindings::{BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG, bpf_sock_ops},
    helpers::{
        bpf_get_netns_cookie, bpf_load_hdr_opt, bpf_reserve_hdr_opt, bpf_sock_ops_cb_flags_set,
        bpf_store_hdr_opt,
    },
    programs::SockOpsContext,
};

use super::{AF_INET, Socket};

/// `BPF_LOAD_HDR_OPT_TCP_SYN`: search the SYN that the listener has saved.
const SAVED_SYN: u64 = 1;
/// How much of an option `bpf_load_hdr_opt` compares: kind, length and experiment identifier.
const SEARCH_LEN: u8 = 4;
/// Requests the segments' header option callbacks.
pub(crate) const WRITE_HDR_OPT: u32 = BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
/// Requests the state change callback.
pub(crate) const STATE: u32 = BPF_SOCK_OPS_STATE_CB_FLAG;

/// `bpf_sock_ops`: the event and its connection.
pub(crate) struct SockOpsCtx(*mut bpf_sock_ops);

/// The option as it is in a TCP header.
#[repr(C)]
struct TicketOption {
    kind: u8,
    length: u8,
    exid: [u8; 2],
    ticket: [u8; 8],
}

const _: () = assert!(size_of::<TicketOption>() == TICKET_OPTION_LEN as usize);

// === impl SockOpsCtx ===

// SAFETY, for every block below: the kernel passes a valid context, which lives as long as the program runs.
impl SockOpsCtx {
    #[inline(always)]
    pub(crate) fn new(SockOpsContext { ops }: SockOpsContext) -> Self {
        Self(ops)
    }

    /// Which event: a `BPF_SOCK_OPS_*_CB`.
    #[inline(always)]
    pub(crate) fn event(&self) -> u32 {
        // SAFETY: see above.
        unsafe { (*self.0).op }
    }

    /// The connection's socket; absent while it is not a full one.
    #[inline(always)]
    pub(crate) fn socket(&self) -> Option<Socket> {
        // SAFETY: see above.
        NonNull::new(unsafe { (*self.0).__bindgen_anon_2.sk }).map(Socket)
    }

    /// The other side. A v4-mapped connection has the v4-mapped address.
    #[inline(always)]
    pub(crate) fn remote(&self) -> Endpoint {
        // SAFETY: see above. Volatile, or the compiler chooses a field first and reads it then, from a computed place,
        // which the verifier refuses.
        let (family, port, ip4, words) = unsafe {
            (
                (*self.0).family,
                (&raw const (*self.0).remote_port).read_volatile(),
                (&raw const (*self.0).remote_ip4).read_volatile(),
                [
                    (&raw const (*self.0).remote_ip6[0]).read_volatile(),
                    (&raw const (*self.0).remote_ip6[1]).read_volatile(),
                    (&raw const (*self.0).remote_ip6[2]).read_volatile(),
                    (&raw const (*self.0).remote_ip6[3]).read_volatile(),
                ],
            )
        };
        // In the upper half, in network order.
        let port = NetPort::from_be((port >> 16) as u16);
        if family == AF_INET { Endpoint::from_ip4_be(ip4, port) } else { Endpoint::from_ip6_be(words, port) }
    }

    /// This side. A v4-mapped client arrives with the IPv4 address.
    #[inline(always)]
    pub(crate) fn local(&self) -> Endpoint {
        // SAFETY: see above. Volatile, as in `remote`.
        let (family, port, ip4, words) = unsafe {
            (
                (*self.0).family,
                (&raw const (*self.0).local_port).read_volatile(),
                (&raw const (*self.0).local_ip4).read_volatile(),
                [
                    (&raw const (*self.0).local_ip6[0]).read_volatile(),
                    (&raw const (*self.0).local_ip6[1]).read_volatile(),
                    (&raw const (*self.0).local_ip6[2]).read_volatile(),
                    (&raw const (*self.0).local_ip6[3]).read_volatile(),
                ],
            )
        };
        // In host order.
        #[expect(clippy::cast_possible_truncation, reason = "a port")]
        let port = NetPort::new(port as u16);
        if family == AF_INET { Endpoint::from_ip4_be(ip4, port) } else { Endpoint::from_ip6_be(words, port) }
    }

    /// The cookie of the network namespace of its socket. Linux 5.15 for `sock_ops`:
    /// <https://github.com/torvalds/linux/commit/6cf1770d63dd2d0d0d4048e7b3ee360336c072d9>
    #[inline(always)]
    pub(crate) fn netns_cookie(&self) -> u64 {
        // SAFETY: see above.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    /// The TCP state that the connection leaves at `BPF_SOCK_OPS_STATE_CB`.
    #[inline(always)]
    pub(crate) fn old_state(&self) -> u32 {
        // SAFETY: see above.
        unsafe { (*self.0).__bindgen_anon_1.args[0] }
    }

    /// The TCP state that the connection enters at `BPF_SOCK_OPS_STATE_CB`.
    #[inline(always)]
    pub(crate) fn new_state(&self) -> u32 {
        // SAFETY: see above.
        unsafe { (*self.0).__bindgen_anon_1.args[1] }
    }

    /// Whether the peer has acknowledged data or sent some. The SYN counts as one byte acknowledged.
    #[inline(always)]
    pub(crate) fn peer_has_answered(&self) -> bool {
        // SAFETY: see above.
        unsafe { (*self.0).bytes_acked > 1 || (*self.0).bytes_received > 0 }
    }

    /// Requests callbacks, and keeps those that other programs have requested.
    #[inline(always)]
    pub(crate) fn request_callbacks(&self, callbacks: u32) {
        // SAFETY: see above.
        self.set_callbacks(unsafe { (*self.0).bpf_sock_ops_cb_flags } | callbacks);
    }

    /// Stops callbacks, and keeps the others.
    #[inline(always)]
    pub(crate) fn stop_callbacks(&self, callbacks: u32) {
        // SAFETY: see above.
        self.set_callbacks(unsafe { (*self.0).bpf_sock_ops_cb_flags } & !callbacks);
    }

    /// Reserves room for the ticket in the current segment; false when there is none.
    #[inline(always)]
    pub(crate) fn reserve_option(&self) -> bool {
        // SAFETY: see above.
        unsafe { bpf_reserve_hdr_opt(self.0, u32::from(TICKET_OPTION_LEN), 0) == 0 }
    }

    /// Writes the ticket into the current segment. Fails without harm where a second program has written it.
    #[inline(always)]
    pub(crate) fn store_option(&self, ticket: u64) {
        let option = TicketOption {
            kind: TICKET_OPTION_KIND,
            length: TICKET_OPTION_LEN,
            exid: TICKET_OPTION_EXID,
            ticket: ticket.to_be_bytes(),
        };
        // SAFETY: see above; the option is as long as said.
        unsafe {
            bpf_store_hdr_opt(self.0, (&raw const option).cast(), u32::from(TICKET_OPTION_LEN), 0);
        }
    }

    /// The ticket in the SYN that the listener has saved.
    #[inline(always)]
    pub(crate) fn ticket_in_saved_syn(&self) -> Option<u64> {
        self.load_option(SAVED_SYN)
    }

    /// The ticket in the current segment: the handshake's last ACK.
    #[inline(always)]
    pub(crate) fn ticket_in_segment(&self) -> Option<u64> {
        self.load_option(0)
    }

    #[inline(always)]
    fn set_callbacks(&self, callbacks: u32) {
        // SAFETY: see above. It fails on flags unknown to the kernel only, and these are older than 6.1.
        unsafe { bpf_sock_ops_cb_flags_set(self.0, callbacks.cast_signed()) };
    }

    #[inline(always)]
    fn load_option(&self, flags: u64) -> Option<u64> {
        // What to look for: the kind, and as many bytes with it as tell podgate's option from other experiments.
        let mut option = TicketOption {
            kind: TICKET_OPTION_KIND,
            length: SEARCH_LEN,
            exid: TICKET_OPTION_EXID,
            ticket: [0; 8],
        };
        // SAFETY: see above; the buffer is as long as said.
        let length = unsafe {
            bpf_load_hdr_opt(self.0, (&raw mut option).cast(), u32::from(TICKET_OPTION_LEN), flags)
        };
        (length == i64::from(TICKET_OPTION_LEN)).then(|| u64::from_be_bytes(option.ticket))
    }
}
