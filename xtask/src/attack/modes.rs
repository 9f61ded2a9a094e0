//! The modes of a cluster in which attacks are tried, and what of an attack each of them leaves.
//!
//! Owns which mode is the hardest for an attack, and where a control cannot work by nature. Never runs anything.

use serde::{Deserialize, Serialize};

/// What `--imds` of the agent says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Mode {
    /// Every pod is kept from the node's role, and gets its own at IMDS.
    Intercept,
    /// Every pod is kept from the node's role.
    Deny,
    /// Pods are, or are not: a node with both.
    Audit,
}

/// How much of everything is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// Every mode; that each of several defenses does alone, in `intercept`.
    Modes,
    /// The mode in which an attack is hardest to withstand: an emulated machine is slow.
    Hardest,
    /// Everything in every mode.
    All,
}

/// Where an attack is harder to withstand than in `intercept`, and why.
const HARDEST: &[(&str, Mode, &str)] = &[
    ("guessed-ticket", Mode::Audit, BY_HAND),
    ("replayed-ticket", Mode::Audit, BY_HAND),
    ("stolen-ticket", Mode::Audit, BY_HAND),
    ("no-ticket", Mode::Audit, BY_HAND),
    ("syn-flood", Mode::Audit, BY_HAND),
    ("raw-tcp-to-imds", Mode::Audit, BOTH_KINDS),
    ("udp-to-imds", Mode::Audit, BOTH_KINDS),
    ("icmp-to-imds", Mode::Audit, BOTH_KINDS),
    ("pod-not-known-yet", Mode::Audit, NOT_KNOWN),
    ("arrival-while-dead", Mode::Audit, NOT_KNOWN),
    ("arrival-while-hung", Mode::Audit, NOT_KNOWN),
    ("arrival-while-blind", Mode::Audit, NOT_KNOWN),
    ("arrival-while-starved", Mode::Audit, NOT_KNOWN),
    ("loosening-annotation", Mode::Audit, "all but one namespace have what the pod asks for"),
    (
        "stolen-token-when-left-alone",
        Mode::Audit,
        "elsewhere podgate's addresses are attested for the sake of IMDS too",
    ),
];

const BY_HAND: &str = "no filter drops the handshakes that a pod in audit makes by hand";
const BOTH_KINDS: &str = "the filter must tell the pod from those whose packets to IMDS it leaves alone";
const NOT_KNOWN: &str = "others may have the node's role, and nothing tells the pod from them yet";

/// Where an attack cannot work whatever podgate does without, and why.
const NO_CONTROL: &[(&str, Mode, &str)] = &[
    ("agent-killed", Mode::Deny, DENIED),
    ("agent-stopped", Mode::Deny, DENIED),
    ("agent-hung", Mode::Deny, DENIED),
    ("arrival-while-dead", Mode::Intercept, AS_STRICT),
    ("arrival-while-dead", Mode::Deny, AS_STRICT),
    ("rebound-imds", Mode::Deny, DENIED),
    ("tricked-server", Mode::Deny, DENIED),
    ("host-of-another-dialect", Mode::Deny, DENIED),
];

const AS_STRICT: &str = "what the setting takes for an unknown pod's mode is as strict there";
const DENIED: &str = "the kernel refuses connections to IMDS, whoever serves there";

// === impl Mode ===

impl Mode {
    pub(super) const ALL: [Self; 3] = [Self::Intercept, Self::Deny, Self::Audit];

    /// As `--imds` has it.
    pub(super) const fn label(self) -> &'static str {
        match self {
            Self::Intercept => "intercept",
            Self::Deny => "deny",
            Self::Audit => "audit",
        }
    }

    /// The one in which this attack is hardest to withstand.
    fn hardest(attack: &str) -> Self {
        HARDEST.iter().find(|(name, ..)| *name == attack).map_or(Self::Intercept, |(_, mode, _)| *mode)
    }

    /// Why the control of this attack cannot work in this mode, if it cannot.
    pub(super) fn lacks_control(self, attack: &str) -> Option<&'static str> {
        let found = NO_CONTROL.iter().find(|(name, mode, _)| *name == attack && *mode == self);
        found.map(|(.., why)| *why)
    }
}

// === impl Scope ===

impl Scope {
    /// The modes in which this attack is tried.
    pub(super) fn modes(self, attack: &str) -> Vec<Mode> {
        match self {
            Self::Modes | Self::All => Mode::ALL.into(),
            Self::Hardest => vec![Mode::hardest(attack)],
        }
    }

    /// Whether each of several defenses is tried alone in this mode.
    pub(super) fn has_layers(self, mode: Mode) -> bool {
        match self {
            Self::Modes => mode == Mode::Intercept,
            Self::Hardest => false,
            Self::All => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::attack::list::ATTACKS;

    #[test]
    fn the_tables_name_attacks_that_there_are_and_each_once() {
        let is_attack = |name: &str| ATTACKS.iter().any(|attack| attack.name == name);
        let hardest: BTreeSet<_> = HARDEST.iter().map(|(name, ..)| *name).collect();
        let no_control: BTreeSet<_> = NO_CONTROL.iter().map(|(name, mode, _)| (*name, *mode)).collect();
        assert_eq!((hardest.len(), no_control.len()), (HARDEST.len(), NO_CONTROL.len()));
        for name in hardest.into_iter().chain(no_control.into_iter().map(|(name, _)| name)) {
            assert!(is_attack(name), "{name}");
        }
    }

    #[test]
    fn where_an_attack_is_hardest_its_control_works() {
        for attack in ATTACKS {
            assert_eq!(Mode::hardest(attack.name).lacks_control(attack.name), None, "{}", attack.name);
        }
    }

    #[test]
    fn an_emulated_machine_tries_each_attack_once_and_all_is_everything() {
        assert_eq!(Scope::Hardest.modes("no-such-attack"), [Mode::Intercept]);
        for (scope, modes, layers) in [(Scope::Modes, 3, 1), (Scope::Hardest, 1, 0), (Scope::All, 3, 3)] {
            assert_eq!(scope.modes(ATTACKS[0].name).len(), modes, "{scope:?}");
            assert_eq!(Mode::ALL.into_iter().filter(|mode| scope.has_layers(*mode)).count(), layers);
        }
    }
}
