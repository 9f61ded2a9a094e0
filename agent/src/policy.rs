//! What a pod may do, decided from the operator's defaults, its namespace and the pod itself.
//!
//! Owns the rules and the reason given for each outcome; never touches a map, a watch or a request.

use std::{collections::BTreeMap, fmt, str::FromStr};

use agent_common::policy::{
    IMDS_AUDIT, IMDS_DENY, IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_OFF, POD_IDENTITY_ON, PodPolicy,
};
use serde::Serialize;

use crate::identity::Pod;

mod annotation;
pub mod lookup;

use self::annotation::{Allowance, Read, Switch, read};

/// Namespace and pod annotation: the mode of dials to IMDS. A namespace's goes anywhere above the floor; a pod's
/// only tightens, since a tenant must not give itself the node's role.
pub const ANNOTATION_IMDS: &str = "podgate.dev/imds";
/// Namespace annotation, `true` or `false`: whether pods may loosen their mode too, down to the floor.
pub const ANNOTATION_IMDS_POD_OVERRIDE: &str = "podgate.dev/imds-pod-override";
/// Namespace and pod annotation, `on` or `off`: whether podgate answers at 169.254.170.23. Where a namespace says
/// `on`, a pod cannot say `off`.
pub const ANNOTATION_POD_IDENTITY: &str = "podgate.dev/pod-identity";
/// Namespace and pod annotation, `allow` or `deny`: IMDSv1, for the pod's own role.
pub const ANNOTATION_IMDS_V1: &str = "podgate.dev/imds-v1";
/// Namespace and pod annotation, `allow` or `deny`: the container endpoints from the cgroup alone although the
/// pod has a token.
pub const ANNOTATION_TOKENLESS: &str = "podgate.dev/tokenless";

/// Annotations by their whole name.
pub type Annotations = BTreeMap<String, String>;

/// What pods get unless something more particular says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Defaults {
    /// What a pod's dials to the instance metadata service get.
    pub imds: ImdsMode,
    /// No annotation goes below it, but for pods on the host's network.
    pub imds_floor: ImdsMode,
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
    /// Why.
    pub reason: Reason,
    /// Whether podgate answers at 169.254.170.23 and 169.254.170.2.
    pub pod_identity: bool,
    /// Whether it may use IMDSv1.
    pub imds_v1: bool,
    /// Whether the container endpoints serve it from its cgroup alone.
    pub tokenless: bool,
}

/// Why a pod's mode is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The operator's `--imds`.
    Default,
    /// The operator's `--imds-floor`.
    Floor,
    /// Pods on the host's network are outside default and floor: the CNI lives there.
    HostNetwork,
    /// The pod has an identity of its own; on any error of Pod Identity some SDKs would go on to IMDS and end up
    /// with the node's role.
    Injected,
    /// The namespace's annotation.
    Namespace,
    /// The pod's annotation.
    Pod,
    /// An annotation that cannot be read: whoever wrote it meant something.
    Unreadable,
}

/// An annotation whose value is none of those that it may have. The strictest that fits applies instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable<'a> {
    /// The annotation.
    pub annotation: &'static str,
    /// Its value.
    pub value: &'a str,
    /// Whether it is the namespace's or the pod's.
    pub place: Place,
}

/// Where an annotation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On the namespace.
    Namespace,
    /// On the pod.
    Pod,
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

// === impl Policy ===

impl Policy {
    /// Decides for a known pod in a namespace with these annotations.
    pub fn decide(defaults: &Defaults, namespace: &Annotations, pod: &Pod) -> Self {
        let (imds, reason) = imds(*defaults, namespace, pod);
        let pod_identity = pod_identity(namespace, pod);
        // The pod's word before its namespace's: these two expose nothing but its own role.
        let allowance = |annotation, default| {
            [&pod.annotations, namespace]
                .into_iter()
                .find_map(|place| match read::<Allowance>(place, annotation) {
                    Read::Absent => None,
                    Read::Value(value) => Some(value == Allowance::Allow),
                    Read::Unreadable(_) => Some(false),
                })
                .unwrap_or(default)
        };
        Self {
            imds,
            reason,
            pod_identity,
            imds_v1: allowance(ANNOTATION_IMDS_V1, defaults.imds_v1),
            // A pod with a token must send it: a request that forgot it is more likely forged than old.
            tokenless: allowance(ANNOTATION_TOKENLESS, !pod.token_volume && imds == ImdsMode::Intercept),
        }
    }

    /// The policy as the kernel's programs read it.
    pub const fn kernel(&self) -> PodPolicy {
        let pod_identity = if self.pod_identity { POD_IDENTITY_ON } else { POD_IDENTITY_OFF };
        PodPolicy { imds: self.imds.code(), pod_identity }
    }
}

/// The mode: the default, then the namespace, then the pod.
fn imds(defaults: Defaults, namespace: &Annotations, pod: &Pod) -> (ImdsMode, Reason) {
    let (base, floor) = if pod.host_network {
        ((ImdsMode::Off, Reason::HostNetwork), ImdsMode::Off)
    } else if pod.injected && !defaults.imds.is_strict() {
        ((ImdsMode::Intercept, Reason::Injected), defaults.imds_floor)
    } else {
        ((defaults.imds, Reason::Default), defaults.imds_floor)
    };
    let raised = |(mode, reason)| if mode < floor { (floor, Reason::Floor) } else { (mode, reason) };
    let guarded = |inherited: (ImdsMode, Reason)| {
        if inherited.0.is_strict() { inherited } else { (ImdsMode::Intercept, Reason::Unreadable) }
    };
    let of_namespace = raised(match read(namespace, ANNOTATION_IMDS) {
        Read::Absent => base,
        Read::Value(mode) => (mode, Reason::Namespace),
        Read::Unreadable(_) => guarded(base),
    });
    let may_loosen = matches!(read(namespace, ANNOTATION_IMDS_POD_OVERRIDE), Read::Value(true));
    match read(&pod.annotations, ANNOTATION_IMDS) {
        Read::Value(mode) if may_loosen || mode > of_namespace.0 => raised((mode, Reason::Pod)),
        Read::Absent | Read::Value(_) => of_namespace,
        Read::Unreadable(_) => guarded(of_namespace),
    }
}

/// `on` is the stricter: the kernel vouches for callers then.
fn pod_identity(namespace: &Annotations, pod: &Pod) -> bool {
    let says = |place| match read::<Switch>(place, ANNOTATION_POD_IDENTITY) {
        Read::Absent => None,
        Read::Value(switch) => Some(switch == Switch::On),
        Read::Unreadable(_) => Some(true),
    };
    match (says(namespace), says(&pod.annotations)) {
        (Some(true), _) | (_, Some(true)) | (None, None) => true,
        (Some(false), _) | (None, Some(false)) => false,
    }
}

/// Every annotation of a namespace or a pod that cannot be read.
pub fn unreadable(annotations: &Annotations, place: Place) -> Vec<Unreadable<'_>> {
    let bad = |annotation, value| Unreadable { annotation, value, place };
    let mut found = Vec::new();
    if let Read::Unreadable(value) = read::<ImdsMode>(annotations, ANNOTATION_IMDS) {
        found.push(bad(ANNOTATION_IMDS, value));
    }
    if let Read::Unreadable(value) = read::<Switch>(annotations, ANNOTATION_POD_IDENTITY) {
        found.push(bad(ANNOTATION_POD_IDENTITY, value));
    }
    for annotation in [ANNOTATION_IMDS_V1, ANNOTATION_TOKENLESS] {
        if let Read::Unreadable(value) = read::<Allowance>(annotations, annotation) {
            found.push(bad(annotation, value));
        }
    }
    if let (Place::Namespace, Read::Unreadable(value)) =
        (place, read::<bool>(annotations, ANNOTATION_IMDS_POD_OVERRIDE))
    {
        found.push(bad(ANNOTATION_IMDS_POD_OVERRIDE, value));
    }
    found
}

/// What the kernel does with a pod whose policy it does not have yet, on a node where `strictest` is the strictest
/// mode of anybody. As long as anybody is to be intercepted it is intercepted too: SDKs keep for hours what one
/// untouched dial got them.
pub fn unknown_pod(strictest: ImdsMode) -> PodPolicy {
    let imds = if strictest.is_strict() { ImdsMode::Intercept } else { strictest };
    PodPolicy { imds: imds.code(), pod_identity: POD_IDENTITY_ON }
}

// === impl Unreadable ===

impl fmt::Display for Unreadable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.place {
            Place::Namespace => "namespace",
            Place::Pod => "pod",
        };
        // A tenant's text: short, and without control characters.
        let value: String = self.value.chars().take(40).collect();
        write!(f, "the {place}'s annotation {} has the unknown value {value:?}", self.annotation)
    }
}

#[cfg(test)]
mod tests;
