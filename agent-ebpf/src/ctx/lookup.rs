//! A look-up of the socket for an incoming packet: the context of `sk_lookup`.
//!
//! Owns its layout; never decides anything.

use agent_common::net::{Endpoint, NetPort};
use aya_ebpf::{bindings::bpf_sk_lookup, programs::SkLookupContext};

use super::{AF_INET, IPPROTO_TCP};

/// Who is asked for.
pub(crate) struct Lookup(*mut bpf_sk_lookup);

// === impl Lookup ===

// SAFETY, for every block below: the kernel passes a valid context, which lives as long as the program runs.
impl Lookup {
    #[inline(always)]
    pub(crate) fn new(context: &SkLookupContext) -> Self {
        Self(context.lookup)
    }

    /// Whether it is for TCP.
    #[inline(always)]
    pub(crate) fn is_tcp(&self) -> bool {
        // SAFETY: see above.
        unsafe { (*self.0).protocol == IPPROTO_TCP }
    }

    /// The address on this side.
    #[inline(always)]
    pub(crate) fn local(&self) -> Endpoint {
        // SAFETY: see above. Word by word: a copy of the whole array offsets the context pointer, which the verifier
        // refuses. Volatile, or the compiler chooses a field first and reads it then, from a computed place.
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
        let port = NetPort::new(port as u16);
        if family == AF_INET { Endpoint::from_ip4_be(ip4, port) } else { Endpoint::from_ip6_be(words, port) }
    }
}
