//! What an interceptor is told when its programs are loaded.
//!
//! Owns the key that makes tickets unguessable, which no log prints; never reads a map.

use std::{fmt, path::PathBuf, time::Duration};

use super::Error;

/// What the programs need to know for as long as they live.
#[derive(Debug)]
pub struct Settings {
    /// Where bpffs is mounted.
    pub bpffs: PathBuf,
    /// Directory of the kubepods cgroup on the cgroup2 mount.
    pub kubepods: PathBuf,
    /// Directory of the agent's own cgroup, where its listeners are made.
    pub agent_cgroup: PathBuf,
    /// Ancestor level of the kubepods cgroup; the root of the hierarchy is 0.
    pub kubepods_level: u32,
    /// Cgroup id of the kubepods cgroup.
    pub kubepods_id: u64,
    /// Cookie of the host's network namespace, as [`crate::identity::netns::own_cookie`] gives it; 0 for none.
    pub host_netns_cookie: u64,
    /// Whether pods in `intercept` and `deny` are kept from IMDS and the target where `connect` does not see it.
    pub egress_filter: bool,
    /// Whether what pods in `audit` ask IMDS for is told.
    pub audit_paths: bool,
    /// How long a ticket may be redeemed: [`agent_common::abi::TICKET_LIFE`], or less in tests.
    pub ticket_life: Duration,
    /// Makes the tickets unguessable.
    pub ticket_key: TicketKey,
}

/// The 128-bit key from which the programs derive tickets.
pub struct TicketKey(pub(super) [u64; 2]);

// === impl TicketKey ===

impl TicketKey {
    /// A fresh key from the kernel's random numbers.
    pub fn random() -> Result<Self, Error> {
        let word = || getrandom::u64().map_err(Error::Randomness);
        Ok(Self([word()?, word()?]))
    }
}

impl fmt::Debug for TicketKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketKey(redacted)")
    }
}

/// Settings for tests, with a kubepods cgroup that there may be or not.
#[cfg(test)]
pub(super) fn fake(kubepods: &str) -> Settings {
    Settings {
        bpffs: "/nowhere".into(),
        kubepods: kubepods.into(),
        agent_cgroup: "/".into(),
        kubepods_level: 1,
        kubepods_id: 1,
        host_netns_cookie: 1,
        egress_filter: true,
        audit_paths: false,
        ticket_life: agent_common::abi::TICKET_LIFE,
        ticket_key: TicketKey([0x1122_3344, 0x5566_7788]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ticket_key_is_not_printed() {
        let text = format!("{:?}", fake("/"));
        assert!(text.contains("redacted"), "{text}");
        for secret in ["287454020", "11223344", "1432778632", "55667788"] {
            assert!(!text.contains(secret), "{text}");
        }
    }

    #[test]
    fn random_keys_differ() {
        assert_ne!(TicketKey::random().unwrap().0, TicketKey::random().unwrap().0);
    }
}
