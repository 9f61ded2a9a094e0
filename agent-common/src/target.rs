//! Where intercepted dials are sent.

use crate::net::Endpoint;

/// The agent's addresses. Two slots and an index make a change atomic for the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Which running agent listens there; counts up with each one.
    pub generation: u64,
    /// IPv4 address and port, or [`Endpoint::NONE`].
    pub v4: Endpoint,
    /// IPv6 address and port, or [`Endpoint::NONE`]. Never link-local: `connect6` cannot set a scope.
    pub v6: Endpoint,
}

// SAFETY: `repr(C)`, no padding (asserted in `abi`), every bit pattern is valid.
#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya writes the record to a map as bytes")]
unsafe impl aya::Pod for Target {}
