//! An outgoing frame of a netdev: the context of a tc program.
//!
//! Owns the frame's layout up to the IP header; never decides anything. The netdev that a frame came in by: Linux 4.2,
//! <https://github.com/torvalds/linux/commit/37e82c2f974b72c9ab49c787ef7b5bb1aec12768>; the ancestors of a socket's cgroup
//! as in `skb`.

use agent_common::net::{Endpoint, NetPort};
use aya_ebpf::{
    helpers::{bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id},
    programs::TcContext,
};

use super::ip::IpHeader;

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
const ETH_P_8021Q: u16 = 0x8100;
const ETH_P_8021AD: u16 = 0x88a8;
/// Where an Ethernet header has the type of what follows.
const ETHERTYPE: u32 = 12;
const VLAN_TAG_LEN: u32 = 4;
/// How many VLAN tags are looked behind, of those in the frame. Those that the netdev adds are not in it.
const VLAN_TAGS_MAX: u32 = 2;

/// `__sk_buff`: a frame, or with segmentation offload many at once.
pub(crate) struct FrameCtx {
    context: TcContext,
    ip: Option<IpHeader>,
}

// === impl FrameCtx ===

// SAFETY, for every block below: the kernel passes a valid context, which lives as long as the program runs.
impl FrameCtx {
    /// A frame that begins with an Ethernet header.
    ///
    /// The header decides and not the packet's `protocol`, which a packet socket says as it likes.
    #[inline(always)]
    pub(crate) fn ethernet(context: TcContext) -> Self {
        let mut ip = None;
        let mut at = ETHERTYPE;
        for _ in 0..=VLAN_TAGS_MAX {
            match load(&context, at).map(|[kind]: [u16; 1]| u16::from_be(kind)) {
                Some(ETH_P_8021Q | ETH_P_8021AD) => at += VLAN_TAG_LEN,
                Some(kind @ (ETH_P_IP | ETH_P_IPV6)) => {
                    ip = Some(IpHeader { is_ip6: kind == ETH_P_IPV6, offset: at + 2 });
                    break;
                }
                _ => break,
            }
        }
        Self { context, ip }
    }

    /// A packet that begins with its IP header, as tunnels send it.
    #[inline(always)]
    pub(crate) fn ip(context: TcContext) -> Self {
        // Of the first byte alone the verifier does not see that it is in the packet.
        let ip = match load(&context, 0).map(|[first, ..]: [u8; 4]| first >> 4) {
            Some(version @ (4 | 6)) => Some(IpHeader { is_ip6: version == 6, offset: 0 }),
            _ => None,
        };
        Self { context, ip }
    }

    /// The address it goes to, without a port; `None` where it is not IP.
    #[inline(always)]
    pub(crate) fn destination(&self) -> Option<Endpoint> {
        let ip = self.ip?;
        if ip.is_ip6 {
            Some(Endpoint::from_ip6_be(load(&self.context, ip.offset + 24)?, NetPort::new(0)))
        } else {
            let [address] = load(&self.context, ip.offset + 16)?;
            Some(Endpoint::from_ip4_be(address, NetPort::new(0)))
        }
    }

    /// The port it goes to, 0 where it has none.
    #[inline(always)]
    pub(crate) fn port(&self) -> NetPort {
        self.ip.map_or(NetPort::new(0), |ip| ip.port(&self.context.skb))
    }

    /// The netdev by which it came to the node, 0 where the node made it, or a netdev in a pod that shares the node's.
    #[inline(always)]
    pub(crate) fn ingress(&self) -> u32 {
        // SAFETY: see above.
        unsafe { (*self.context.skb.skb).ingress_ifindex }
    }

    /// The cgroup in which its socket was made, 0 where it has none: a packet that is forwarded loses it.
    #[inline(always)]
    pub(crate) fn cgroup_id(&self) -> u64 {
        // SAFETY: see above.
        unsafe { bpf_skb_cgroup_id(self.context.skb.skb) }
    }

    /// That cgroup's ancestor at `level`, 0 where it has none.
    #[inline(always)]
    pub(crate) fn ancestor(&self, level: u32) -> u64 {
        // SAFETY: see above.
        unsafe { bpf_skb_ancestor_cgroup_id(self.context.skb.skb, level.cast_signed()) }
    }
}

/// What is in the frame at `offset`. Mostly it can be read directly; a packet socket may put it where it cannot.
#[inline(always)]
fn load<T: Copy, const N: usize>(context: &TcContext, offset: u32) -> Option<[T; N]> {
    let start = context.data() + offset as usize;
    if start + size_of::<[T; N]>() <= context.data_end() {
        // SAFETY: it is in the packet, which the verifier proves; BPF reads words at any address.
        Some(unsafe { *(start as *const [T; N]) })
    } else {
        context.load(offset as usize).ok()
    }
}
