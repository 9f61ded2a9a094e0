//! Where intercepted connections are redirected, and how the programs know that an agent is there.

use crate::net::Endpoint;

/// The agent's addresses. Two slots and an index make a change atomic for the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// IPv4 address and port, or [`Endpoint::NONE`].
    pub v4: Endpoint,
    /// IPv6 address and port, or [`Endpoint::NONE`]. Never link-local: `connect6` cannot set a scope.
    pub v6: Endpoint,
    /// What connections to 169.254.170.23 and `fd00:ec2::23` get while the agent is down: [`WHEN_DOWN_DENY`] or
    /// [`WHEN_DOWN_PASS`]. Connections to the instance metadata service are always refused then: there is the node's role.
    pub when_down: u64,
}

/// `Target::when_down`: `EPERM`, which costs an SDK nothing; an unanswered connection costs it up to minutes.
pub const WHEN_DOWN_DENY: u64 = 0;
/// `Target::when_down`: left alone, because the EKS Pod Identity Agent answers there.
pub const WHEN_DOWN_PASS: u64 = 1;

/// The agent counts as down when its last heartbeat is older, in nanoseconds.
pub const HEARTBEAT_LIMIT_NS: i64 = 2_000_000_000;

/// Whether an agent whose last heartbeat was at `heartbeat_ns` is alive at `now_ns`, both of `CLOCK_MONOTONIC`; 0 means
/// that it has stopped.
///
/// Signed: the programs read a coarse clock, for which a heartbeat may be a moment in the future.
#[inline(always)]
pub const fn is_alive(heartbeat_ns: u64, now_ns: u64) -> bool {
    heartbeat_ns != 0 && now_ns.wrapping_sub(heartbeat_ns).cast_signed() < HEARTBEAT_LIMIT_NS
}

// SAFETY: `repr(C)`, no padding (asserted in `abi`), every bit pattern is valid.
#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya writes the record to a map as bytes")]
unsafe impl aya::Pod for Target {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_alive_for_a_while_after_a_heartbeat() {
        let second = 1_000_000_000;
        assert!(is_alive(10 * second, 10 * second));
        assert!(is_alive(10 * second, 12 * second - 1));
        assert!(!is_alive(10 * second, 12 * second));
        assert!(is_alive(10 * second + 4_000_000, 10 * second), "the coarse clock lags behind");
        assert!(!is_alive(0, second), "stopped");
    }
}
