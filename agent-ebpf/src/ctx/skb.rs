//! An outgoing packet: the context of `cgroup_skb/egress`.
//!
//! Owns the packet's layout, from the IP header on; never decides anything. The ancestors of a socket's cgroup: Linux 4.19,
//! <https://github.com/torvalds/linux/commit/7723628101aaeb1d723786747529b4ea65c5b5c5>; full sockets: 5.1,
//! <https://github.com/torvalds/linux/commit/46f8bc92758c6259bcf945e9216098661c1587cd>.

use core::{hint::black_box, ptr::NonNull};

use agent_common::{
    egress::HEAD_LEN,
    net::{Endpoint, NetPort},
};
use aya_ebpf::{
    helpers::{bpf_sk_fullsock, bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id, bpf_skb_load_bytes},
    programs::SkBuffContext,
};

use super::{
    Socket,
    ip::{IP4_HEADER_LEN, IP6_HEADER_LEN, IPPROTO_TCP, IpHeader},
};

/// `ETH_P_IP`, in network byte order as the context has it.
const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
/// `ETH_P_IPV6`, likewise.
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// How much of a payload is read at most.
#[expect(clippy::cast_possible_truncation, reason = "a few dozen")]
const HEAD_MAX: u32 = HEAD_LEN as u32;
const _: () = assert!(HEAD_MAX.is_power_of_two());

/// `__sk_buff`: a packet that a socket sends. With TCP segmentation offload it is many segments at once.
pub(crate) struct SkbCtx(SkBuffContext);

// === impl SkbCtx ===

// SAFETY, for every block below: the kernel passes a valid context, which lives as long as the program runs.
impl SkbCtx {
    #[inline(always)]
    pub(crate) fn new(context: SkBuffContext) -> Self {
        Self(context)
    }

    /// The address it goes to, without a port; `None` where it is not IP. Extension headers change nothing: with a
    /// routing header this is the next address on the way.
    #[inline(always)]
    pub(crate) fn destination(&self) -> Option<Endpoint> {
        // SAFETY: see above. The header is in the packet, which the verifier proves; the kernel keeps all of it in what
        // can be read directly.
        unsafe {
            let skb = self.0.skb.skb;
            let (start, end) = ((*skb).data as usize, (*skb).data_end as usize);
            let word = |offset| *((start + offset) as *const u32);
            match (*skb).protocol {
                ETH_P_IP if start + IP4_HEADER_LEN as usize <= end => {
                    Some(Endpoint::from_ip4_be(word(16), NetPort::new(0)))
                }
                ETH_P_IPV6 if start + IP6_HEADER_LEN as usize <= end => {
                    Some(Endpoint::from_ip6_be([word(24), word(28), word(32), word(36)], NetPort::new(0)))
                }
                _ => None,
            }
        }
    }

    /// The port it goes to, 0 where it has none or an extension header hides it.
    #[inline(always)]
    pub(crate) fn port(&self) -> NetPort {
        self.ip().port(&self.0.skb)
    }

    /// The beginning of what it carries over TCP, filled up with 0; `None` where it carries nothing.
    #[inline(always)]
    pub(crate) fn payload_of_tcp(&self) -> Option<[u8; HEAD_LEN]> {
        let Some((IPPROTO_TCP, header)) = self.ip().transport(&self.0.skb) else { return None };
        let header_words = self.0.load::<u8>(header as usize + 12).ok()? >> 4;
        let offset = header + u32::from(header_words) * 4;
        let available = self.0.len().checked_sub(offset).filter(|available| *available > 0)?;
        // Less one, so that a mask can show to the verifier what the compiler knows and would leave out: 1 to 32.
        let last = black_box(available.min(HEAD_MAX) - 1) & (HEAD_MAX - 1);
        let mut head = [0; HEAD_LEN];
        // SAFETY: see above; there is room for as much as is asked for.
        let failed =
            unsafe { bpf_skb_load_bytes(self.0.skb.skb.cast(), offset, head.as_mut_ptr().cast(), last + 1) };
        (failed == 0).then_some(head)
    }

    /// The socket that sends it, if the kernel names one.
    #[inline(always)]
    pub(crate) fn socket(&self) -> Option<Socket> {
        // SAFETY: see above; the helper takes any socket.
        unsafe {
            let socket = (*self.0.skb.skb).__bindgen_anon_2.sk;
            if socket.is_null() { None } else { NonNull::new(bpf_sk_fullsock(socket)).map(Socket) }
        }
    }

    /// The cgroup in which its socket was made.
    #[inline(always)]
    pub(crate) fn cgroup_id(&self) -> u64 {
        // SAFETY: see above.
        unsafe { bpf_skb_cgroup_id(self.0.skb.skb) }
    }

    /// That cgroup's ancestor at `level`, 0 where it has none.
    #[inline(always)]
    pub(crate) fn ancestor(&self, level: u32) -> u64 {
        // SAFETY: see above.
        unsafe { bpf_skb_ancestor_cgroup_id(self.0.skb.skb, level.cast_signed()) }
    }

    /// Where its IP header is.
    #[inline(always)]
    fn ip(&self) -> IpHeader {
        // SAFETY: see above.
        IpHeader { is_ip6: unsafe { (*self.0.skb.skb).protocol } == ETH_P_IPV6, offset: 0 }
    }
}
