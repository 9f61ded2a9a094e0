//! What a pod gets at the instance metadata service.
//!
//! Owns the names and the kernel's codes of the modes; never decides which one applies.

use std::str::FromStr;

use agent_common::policy::{IMDS_AUDIT, IMDS_DENY, IMDS_INTERCEPT, IMDS_OFF};
use serde::Serialize;

/// What a pod's connections to the instance metadata service get, strictest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImdsMode {
    /// They are left alone.
    Off,
    /// They are left alone and counted, to find out who still uses the node's role.
    Audit,
    /// They reach podgate, which answers with the pod's own role.
    Intercept,
    /// They fail with `EPERM`.
    Deny,
}

/// What a pod's connections to the instance metadata service get before its policy is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnknownPods {
    /// They reach podgate or nothing, unless the cluster's mode is `off`.
    Strict,
    /// What the strictest pod or namespace that is known gets.
    AsKnown,
}

// === impl ImdsMode ===

impl ImdsMode {
    /// The mode as the kernel's programs read it.
    pub const fn code(self) -> u32 {
        match self {
            Self::Off => IMDS_OFF,
            Self::Audit => IMDS_AUDIT,
            Self::Intercept => IMDS_INTERCEPT,
            Self::Deny => IMDS_DENY,
        }
    }

    /// Whether the node's role is out of reach.
    pub fn is_strict(self) -> bool {
        self >= Self::Intercept
    }
}

impl FromStr for ImdsMode {
    type Err = ();

    fn from_str(mode: &str) -> Result<Self, ()> {
        match mode {
            "off" => Ok(Self::Off),
            "audit" => Ok(Self::Audit),
            "intercept" => Ok(Self::Intercept),
            "deny" => Ok(Self::Deny),
            _ => Err(()),
        }
    }
}
