//! What an IP header says, wherever in the packet it is.
//!
//! Owns the layout of both versions' headers; never decides anything.

use agent_common::net::NetPort;
use aya_ebpf::programs::sk_buff::SkBuff;

pub(super) const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;
/// Of an IPv4 header without options.
pub(super) const IP4_HEADER_LEN: u32 = 20;
/// Of an IPv6 header without the headers that may follow.
pub(super) const IP6_HEADER_LEN: u32 = 40;
/// The part of the IPv4 header's fragment word that is 0 in all packets but later fragments.
const FRAGMENT_OFFSET: u16 = 0x1fff;

/// An IP header in a packet.
#[derive(Clone, Copy)]
pub(super) struct IpHeader {
    pub(super) is_ip6: bool,
    /// Where it begins.
    pub(super) offset: u32,
}

// === impl IpHeader ===

impl IpHeader {
    /// The port that the packet goes to, 0 where it has none or an extension header hides it.
    #[inline(always)]
    pub(super) fn port(self, skb: &SkBuff) -> NetPort {
        let port = match self.transport(skb) {
            Some((IPPROTO_TCP | IPPROTO_UDP, header)) => load(skb, header + 2).unwrap_or(0),
            _ => 0,
        };
        NetPort::from_be(port)
    }

    /// The transport protocol and where its header begins; `None` for later fragments, which have none.
    #[inline(always)]
    pub(super) fn transport(self, skb: &SkBuff) -> Option<(u8, u32)> {
        if self.is_ip6 {
            return Some((load(skb, self.offset + 6)?, self.offset + IP6_HEADER_LEN));
        }
        let fragment: u16 = load(skb, self.offset + 6)?;
        let header_words = load::<u8>(skb, self.offset)? & 0xf;
        let protocol = load(skb, self.offset + 9)?;
        let header = self.offset + u32::from(header_words) * 4;
        (u16::from_be(fragment) & FRAGMENT_OFFSET == 0).then_some((protocol, header))
    }
}

#[inline(always)]
fn load<T>(skb: &SkBuff, offset: u32) -> Option<T> {
    skb.load(offset as usize).ok()
}
