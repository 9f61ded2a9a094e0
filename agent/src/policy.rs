//! What a pod may do, decided from the operator's defaults and the pod itself.
//!
//! Owns the rules and the reason given for each outcome; never touches a map, a watch or a request.

use std::str::FromStr;

use agent_common::policy::{IMDS_AUDIT, IMDS_DENY, IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_ON, PodPolicy};
use serde::Serialize;

use crate::identity::Pod;

/// Pod annotation that allows IMDSv1 to the pod's own role: `allow`.
pub const ANNOTATION_IMDS_V1: &str = "podgate.dev/imds-v1";
/// Pod annotation that serves the container endpoints from the cgroup alone although the pod has a token:
/// `allow`.
pub const ANNOTATION_TOKENLESS: &str = "podgate.dev/tokenless";

/// What pods get unless something more particular says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Defaults {
    /// What a pod's dials to the instance metadata service get.
    pub imds: ImdsMode,
    /// Whether IMDSv1 is answered.
    pub imds_v1: bool,
}

/// What a pod's dials to the instance metadata service get, strictest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ImdsMode {
    /// They are left alone.
    Off,
    /// They are left alone and counted: who still uses the node's role?
    Audit,
    /// They reach podgate, which answers with the pod's own role.
    Intercept,
    /// They fail with `EPERM`.
    Deny,
}

/// What one pod may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// What its dials to the instance metadata service get.
    pub imds: ImdsMode,
    /// Whether it may use IMDSv1.
    pub imds_v1: bool,
    /// Whether the container endpoints serve it from its cgroup alone.
    pub tokenless: bool,
    /// Why `imds` is what it is.
    pub reason: Reason,
}

/// Why a pod's mode is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The operator's `--imds`.
    Default,
    /// Pods on the host's network are outside the default: the CNI lives there.
    HostNetwork,
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

// === impl Policy ===

impl Policy {
    /// Decides for a known pod.
    pub fn decide(defaults: &Defaults, pod: &Pod) -> Self {
        let allows = |annotation| pod.annotations.get(annotation).is_some_and(|value| value == "allow");
        let (imds, reason) = if pod.host_network {
            (ImdsMode::Off, Reason::HostNetwork)
        } else {
            (defaults.imds, Reason::Default)
        };
        Self {
            imds,
            imds_v1: defaults.imds_v1 || allows(ANNOTATION_IMDS_V1),
            // A pod with a token must send it: a request that forgot it is more likely forged than old.
            tokenless: allows(ANNOTATION_TOKENLESS) || (!pod.token_volume && imds == ImdsMode::Intercept),
            reason,
        }
    }

    /// The policy as the kernel's programs read it.
    pub const fn kernel(&self) -> PodPolicy {
        PodPolicy { imds: self.imds.code(), pod_identity: POD_IDENTITY_ON }
    }
}

/// What the kernel does with a pod whose policy it does not have yet. As long as anybody is to be intercepted
/// it is intercepted too: SDKs keep for hours what one untouched dial got them.
pub const fn unknown_pod(defaults: &Defaults) -> PodPolicy {
    let imds = match defaults.imds {
        ImdsMode::Off | ImdsMode::Audit => defaults.imds,
        ImdsMode::Intercept | ImdsMode::Deny => ImdsMode::Intercept,
    };
    PodPolicy { imds: imds.code(), pod_identity: POD_IDENTITY_ON }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod;

    fn defaults(imds: ImdsMode) -> Defaults {
        Defaults { imds, imds_v1: false }
    }

    #[test]
    fn a_pod_gets_the_default_unless_it_is_on_the_host_s_network() {
        for imds in [ImdsMode::Off, ImdsMode::Audit, ImdsMode::Intercept, ImdsMode::Deny] {
            let policy = Policy::decide(&defaults(imds), &pod("app", "web"));
            assert_eq!((policy.imds, policy.reason), (imds, Reason::Default));
            let host = Pod { host_network: true, ..pod("app", "web") };
            let policy = Policy::decide(&defaults(imds), &host);
            assert_eq!((policy.imds, policy.reason), (ImdsMode::Off, Reason::HostNetwork));
        }
    }

    #[test]
    fn imds_v1_is_for_those_who_ask_for_it() {
        let defaults = defaults(ImdsMode::Intercept);
        for (value, allowed) in [("allow", true), ("deny", false), ("yes", false), ("", false)] {
            let mut pod = pod("app", "web");
            pod.annotations.insert(ANNOTATION_IMDS_V1.into(), value.into());
            assert_eq!(Policy::decide(&defaults, &pod).imds_v1, allowed, "{value:?}");
        }
        assert!(!Policy::decide(&defaults, &pod("app", "web")).imds_v1);
        assert!(Policy::decide(&Defaults { imds_v1: true, ..defaults }, &pod("app", "web")).imds_v1);
    }

    #[test]
    fn a_pod_that_has_a_token_must_send_it() {
        let cases = [
            // mode, has the volume, annotation, served from its cgroup alone
            (ImdsMode::Intercept, false, None, true),
            (ImdsMode::Intercept, true, None, false),
            (ImdsMode::Intercept, true, Some("allow"), true),
            (ImdsMode::Audit, false, None, false),
            (ImdsMode::Audit, false, Some("allow"), true),
            (ImdsMode::Deny, false, None, false),
        ];
        for (imds, token_volume, annotation, tokenless) in cases {
            let mut pod = Pod { token_volume, ..pod("app", "web") };
            if let Some(value) = annotation {
                pod.annotations.insert(ANNOTATION_TOKENLESS.into(), value.into());
            }
            let policy = Policy::decide(&defaults(imds), &pod);
            assert_eq!(policy.tokenless, tokenless, "{imds:?} {token_volume} {annotation:?}");
        }
    }

    #[test]
    fn an_unknown_pod_is_intercepted_as_soon_as_anybody_is() {
        assert_eq!(unknown_pod(&defaults(ImdsMode::Off)).imds, IMDS_OFF);
        assert_eq!(unknown_pod(&defaults(ImdsMode::Audit)).imds, IMDS_AUDIT);
        assert_eq!(unknown_pod(&defaults(ImdsMode::Intercept)).imds, IMDS_INTERCEPT);
        assert_eq!(unknown_pod(&defaults(ImdsMode::Deny)).imds, IMDS_INTERCEPT);
    }
}
