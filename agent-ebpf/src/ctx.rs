//! The kernel's contexts as typed values: `bpf_sock_addr` of a dial, `bpf_sock_ops` of a handshake, `__sk_buff` of a
//! packet.
//!
//! Owns every raw field access, with the byte order in the types; never decides anything.

use core::ptr::NonNull;

use agent_common::{
    abi::{TICKET_OPTION_EXID, TICKET_OPTION_KIND, TICKET_OPTION_LEN},
    net::{Endpoint, NetPort},
};
use aya_ebpf::{
    bindings::{
        BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG, bpf_sock, bpf_sock_addr, bpf_sock_ops,
    },
    helpers::{
        bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_load_hdr_opt, bpf_reserve_hdr_opt,
        bpf_sock_ops_cb_flags_set, bpf_store_hdr_opt,
    },
    programs::{SockAddrContext, SockOpsContext},
};

mod lookup;
mod packet;

pub(crate) use self::{lookup::Lookup, packet::Packet};

/// `IPPROTO_TCP`. MPTCP needs no word of its own: the hooks run for its subflows, which are TCP.
const IPPROTO_TCP: u32 = 6;
/// `SOCK_STREAM`.
const SOCK_STREAM: u32 = 1;
/// `AF_INET`.
const AF_INET: u32 = 2;
/// `BPF_LOAD_HDR_OPT_TCP_SYN`: search the SYN that the listener has saved.
const SAVED_SYN: u64 = 1;
/// How much of an option `bpf_load_hdr_opt` compares: kind, length and experiment identifier.
const SEARCH_LEN: u8 = 4;
/// Ask for the segments' header option callbacks.
pub(crate) const WRITE_HDR_OPT: u32 = BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
/// Ask for the state change callback.
pub(crate) const STATE: u32 = BPF_SOCK_OPS_STATE_CB_FLAG;

/// A socket that socket storage may be attached to.
#[derive(Clone, Copy)]
pub(crate) struct Socket(NonNull<bpf_sock>);

/// A call with an address: the context of `cgroup/connect4`, `cgroup/getpeername4` and their IPv6 siblings.
pub(crate) struct Dial(*mut bpf_sock_addr);

/// An event in a connection's life: the context of `sock_ops`.
pub(crate) struct Handshake(*mut bpf_sock_ops);

/// The option as it is in a TCP header.
#[repr(C)]
struct TicketOption {
    kind: u8,
    length: u8,
    exid: [u8; 2],
    ticket: [u8; 8],
}

const _: () = assert!(size_of::<TicketOption>() == TICKET_OPTION_LEN as usize);

// === impl Socket ===

impl Socket {
    /// The kernel's socket.
    #[inline(always)]
    pub(crate) fn as_ptr(self) -> *mut bpf_sock {
        self.0.as_ptr()
    }

    /// Whether it is dialled before it sends: TCP, and neither raw nor for datagrams.
    #[inline(always)]
    pub(crate) fn is_stream(self) -> bool {
        // SAFETY: the kernel's socket lives as long as the program runs.
        unsafe { (*self.as_ptr()).type_ == SOCK_STREAM }
    }
}

// === impl Dial ===

// SAFETY, for every block below: the kernel passes a valid context, which lives as long as the program runs.
impl Dial {
    #[inline(always)]
    pub(crate) fn new(SockAddrContext { sock_addr }: SockAddrContext) -> Self {
        Self(sock_addr)
    }

    /// Where `connect4` dials, or what `getpeername4` is about to say.
    #[inline(always)]
    pub(crate) fn address4(&self) -> Endpoint {
        // SAFETY: see above.
        unsafe { Endpoint::from_ip4_be((*self.0).user_ip4, self.port()) }
    }

    /// Where `connect6` dials, or what `getpeername6` is about to say.
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
        // SAFETY: see above.
        unsafe { (*self.0).protocol == IPPROTO_TCP }
    }

    /// Puts another address in its place.
    #[inline(always)]
    pub(crate) fn set_address4(&self, address: &Endpoint) {
        // SAFETY: see above.
        unsafe {
            (*self.0).user_ip4 = address.addr[3];
            (*self.0).user_port = u32::from(address.port.to_be());
        }
    }

    /// Puts another address in its place; a v4-mapped one as such.
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

    /// The dialling socket.
    #[inline(always)]
    pub(crate) fn socket(&self) -> Option<Socket> {
        // SAFETY: see above.
        NonNull::new(unsafe { (*self.0).__bindgen_anon_1.sk }).map(Socket)
    }

    /// The dialling socket's number, never used again while the kernel runs.
    #[inline(always)]
    pub(crate) fn socket_cookie(&self) -> u64 {
        // SAFETY: see above.
        unsafe { bpf_get_socket_cookie(self.0.cast()) }
    }

    /// The number of the socket's network namespace, as `SO_NETNS_COOKIE` gives it.
    #[inline(always)]
    pub(crate) fn netns_cookie(&self) -> u64 {
        // SAFETY: see above.
        unsafe { bpf_get_netns_cookie(self.0.cast()) }
    }

    #[inline(always)]
    fn port(&self) -> NetPort {
        // SAFETY: see above.
        let port = unsafe { (*self.0).user_port };
        #[expect(clippy::cast_possible_truncation, reason = "the port is in the low half")]
        NetPort::from_be(port as u16)
    }
}

// === impl Handshake ===

// SAFETY, for every block below: the kernel passes a valid context, which lives as long as the program runs.
impl Handshake {
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

    /// The TCP state that ends with `BPF_SOCK_OPS_STATE_CB`.
    #[inline(always)]
    pub(crate) fn old_state(&self) -> u32 {
        // SAFETY: see above.
        unsafe { (*self.0).__bindgen_anon_1.args[0] }
    }

    /// The TCP state that `BPF_SOCK_OPS_STATE_CB` announces.
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

    /// Asks for callbacks, keeping what other programs have asked for.
    #[inline(always)]
    pub(crate) fn ask_for(&self, callbacks: u32) {
        // SAFETY: see above.
        self.set_callbacks(unsafe { (*self.0).bpf_sock_ops_cb_flags } | callbacks);
    }

    /// Asks for callbacks no longer, keeping the others.
    #[inline(always)]
    pub(crate) fn do_without(&self, callbacks: u32) {
        // SAFETY: see above.
        self.set_callbacks(unsafe { (*self.0).bpf_sock_ops_cb_flags } & !callbacks);
    }

    /// Reserves room for the ticket in the segment cached; false when there is none.
    #[inline(always)]
    pub(crate) fn reserve_option(&self) -> bool {
        // SAFETY: see above.
        unsafe { bpf_reserve_hdr_opt(self.0, u32::from(TICKET_OPTION_LEN), 0) == 0 }
    }

    /// Writes the ticket into the segment cached. Fails without harm where a second program has written it.
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
    pub(crate) fn ticket_of_syn(&self) -> Option<u64> {
        self.load_option(SAVED_SYN)
    }

    /// The ticket in the segment cached: the handshake's last ACK.
    #[inline(always)]
    pub(crate) fn ticket_of_segment(&self) -> Option<u64> {
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
