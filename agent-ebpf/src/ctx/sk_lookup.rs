//! The context of `sk_lookup`: the kernel searches the socket for an incoming connection.
//!
//! Owns its layout; never decides anything. `sk_lookup` programs: Linux 5.9,
//! <https://github.com/torvalds/linux/commit/e9ddbb7707ff5891616240026062b8c1e29864ca>.

use agent_common::net::{Endpoint, NetPort};
use aya_ebpf::{btf_maps::SockMap, programs::SkLookupContext};

use super::{AF_INET, IPPROTO_TCP};

/// `BPF_SK_LOOKUP_F_NO_REUSEPORT`, which is as old as these programs.
const NO_REUSEPORT: u64 = 1 << 1;

/// `bpf_sk_lookup`: the connection whose socket is searched.
pub(crate) struct SkLookupCtx(SkLookupContext);

// === impl SkLookupCtx ===

// SAFETY, for every block below: the kernel passes a valid context, which lives as long as the program runs.
impl SkLookupCtx {
    #[inline(always)]
    pub(crate) fn new(context: SkLookupContext) -> Self {
        Self(context)
    }

    /// Selects the listener in this slot of the map, if there is one of the right family. No other socket of its
    /// `SO_REUSEPORT` group takes its place.
    #[inline(always)]
    pub(crate) fn select<const N: usize>(&self, listeners: &SockMap<N>, slot: u32) -> bool {
        listeners.redirect_sk_lookup(&self.0, slot, NO_REUSEPORT).is_ok()
    }

    /// Whether it is TCP.
    #[inline(always)]
    pub(crate) fn is_tcp(&self) -> bool {
        // SAFETY: see above.
        unsafe { (*self.0.lookup).protocol == IPPROTO_TCP }
    }

    /// The address on this side.
    #[inline(always)]
    pub(crate) fn local(&self) -> Endpoint {
        // SAFETY: see above. Word by word: a copy of the whole array offsets the context pointer, which the verifier
        // refuses. Volatile, or the compiler chooses a field first and reads it then, from a computed place.
        let (family, port, ip4, words) = unsafe {
            (
                (*self.0.lookup).family,
                (&raw const (*self.0.lookup).local_port).read_volatile(),
                (&raw const (*self.0.lookup).local_ip4).read_volatile(),
                [
                    (&raw const (*self.0.lookup).local_ip6[0]).read_volatile(),
                    (&raw const (*self.0.lookup).local_ip6[1]).read_volatile(),
                    (&raw const (*self.0.lookup).local_ip6[2]).read_volatile(),
                    (&raw const (*self.0.lookup).local_ip6[3]).read_volatile(),
                ],
            )
        };
        // In host order.
        #[expect(clippy::cast_possible_truncation, reason = "a port")]
        let port = NetPort::new(port as u16);
        if family == AF_INET { Endpoint::from_ip4_be(ip4, port) } else { Endpoint::from_ip6_be(words, port) }
    }
}
