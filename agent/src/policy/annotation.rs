//! The annotations of namespaces and pods: their names, and the values that they may have.
//!
//! Owns the reading of one annotation, to the letter. Pure: never decides what follows from it.

use std::{collections::BTreeMap, fmt, str::FromStr};

use super::mode::ImdsMode;

/// Namespace and pod annotation: the mode of connections to IMDS. A namespace's may be any mode from the floor up; a
/// pod's only tightens, because a tenant must not give itself the node's role.
pub const ANNOTATION_IMDS: &str = "podgate.dev/imds";
/// Namespace annotation, `true` or `false`: whether pods may loosen their mode too, down to the floor.
pub const ANNOTATION_IMDS_POD_OVERRIDE: &str = "podgate.dev/imds-pod-override";
/// Namespace and pod annotation, `on` or `off`: whether podgate answers at 169.254.170.23. Where a namespace says
/// `on`, a pod cannot say `off`.
pub const ANNOTATION_POD_IDENTITY: &str = "podgate.dev/pod-identity";
/// Namespace and pod annotation, `allow` or `deny`: IMDSv1, for the pod's own role.
pub const ANNOTATION_IMDS_V1: &str = "podgate.dev/imds-v1";
/// Namespace and pod annotation, `allow` or `deny`: the container endpoints serve the pod from its cgroup alone,
/// although it has a token.
pub const ANNOTATION_TOKENLESS: &str = "podgate.dev/tokenless";

/// Annotations by their full name.
pub type Annotations = BTreeMap<String, String>;

/// An annotation with an unknown value. The strictest value that fits applies instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable<'a> {
    /// The annotation.
    pub annotation: &'static str,
    /// Its value.
    pub value: &'a str,
    /// What it is on.
    pub scope: AnnotationScope,
}

/// What an annotation is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnnotationScope {
    /// A namespace.
    Namespace,
    /// A pod.
    Pod,
}

/// One annotation, read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Read<'a, T> {
    /// It is not there.
    Absent,
    /// It has a known value.
    Value(T),
    /// It has an unknown value.
    Unreadable(&'a str),
}

/// `on` or `off`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Switch {
    On,
    Off,
}

/// `allow` or `deny`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Allowance {
    Allow,
    Deny,
}

// === impl Unreadable ===

impl fmt::Display for Unreadable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scope = match self.scope {
            AnnotationScope::Namespace => "namespace",
            AnnotationScope::Pod => "pod",
        };
        // A tenant wrote it: quoted short, and without control characters.
        let value: String = self.value.chars().take(40).collect();
        write!(f, "the {scope}'s annotation {} has the unknown value {value:?}", self.annotation)
    }
}

// === impl Switch ===

impl FromStr for Switch {
    type Err = ();

    fn from_str(switch: &str) -> Result<Self, ()> {
        match switch {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err(()),
        }
    }
}

// === impl Allowance ===

impl FromStr for Allowance {
    type Err = ();

    fn from_str(allowance: &str) -> Result<Self, ()> {
        match allowance {
            "allow" => Ok(Self::Allow),
            "deny" => Ok(Self::Deny),
            _ => Err(()),
        }
    }
}

/// Reads one annotation, to the letter.
pub(super) fn read<'a, T: FromStr>(annotations: &'a Annotations, annotation: &str) -> Read<'a, T> {
    match annotations.get(annotation) {
        None => Read::Absent,
        Some(value) => value.parse().map_or(Read::Unreadable(value), Read::Value),
    }
}

/// Every annotation of a namespace or a pod with an unknown value.
pub fn unreadable(annotations: &Annotations, scope: AnnotationScope) -> Vec<Unreadable<'_>> {
    let unreadable = |annotation, value| Unreadable { annotation, value, scope };
    let mut found = Vec::new();
    if let Read::Unreadable(value) = read::<ImdsMode>(annotations, ANNOTATION_IMDS) {
        found.push(unreadable(ANNOTATION_IMDS, value));
    }
    if let Read::Unreadable(value) = read::<Switch>(annotations, ANNOTATION_POD_IDENTITY) {
        found.push(unreadable(ANNOTATION_POD_IDENTITY, value));
    }
    for annotation in [ANNOTATION_IMDS_V1, ANNOTATION_TOKENLESS] {
        if let Read::Unreadable(value) = read::<Allowance>(annotations, annotation) {
            found.push(unreadable(annotation, value));
        }
    }
    if let (AnnotationScope::Namespace, Read::Unreadable(value)) =
        (scope, read::<bool>(annotations, ANNOTATION_IMDS_POD_OVERRIDE))
    {
        found.push(unreadable(ANNOTATION_IMDS_POD_OVERRIDE, value));
    }
    found
}
