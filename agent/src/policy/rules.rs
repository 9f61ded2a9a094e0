//! The rules: from the operator's defaults, a namespace and a pod to what the pod may do.
//!
//! Owns the rules and the reason for each outcome. Pure: never touches a map, a watch or a request.

use agent_common::policy::{POD_IDENTITY_OFF, POD_IDENTITY_ON, PodPolicy};
use serde::Serialize;

use super::{
    annotation::{
        ANNOTATION_IMDS, ANNOTATION_IMDS_POD_OVERRIDE, ANNOTATION_IMDS_V1, ANNOTATION_POD_IDENTITY,
        ANNOTATION_TOKENLESS, Allowance, Annotations, Read, Switch, read,
    },
    mode::{ImdsMode, UnknownPods},
};
use crate::identity::Pod;

/// What pods get where no annotation says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Defaults {
    /// What a pod's connections to the instance metadata service get.
    pub imds: ImdsMode,
    /// No annotation goes below it, except for pods on the host's network.
    pub imds_floor: ImdsMode,
    /// What they get while the agent has not seen the pod.
    pub imds_unknown: UnknownPods,
    /// Whether IMDSv1 is answered.
    pub imds_v1: bool,
    /// Whether the container endpoints serve pods in `intercept` that have no token volume from their cgroup alone.
    pub tokenless: bool,
}

/// What one pod may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// What its connections to the instance metadata service get.
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
    /// The pod has an identity of its own: on an error of Pod Identity, some SDKs would fall back to IMDS and get the
    /// node's role.
    Injected,
    /// The namespace's annotation.
    Namespace,
    /// The pod's annotation.
    Pod,
    /// An annotation with an unknown value: its author wanted some restriction.
    Unreadable,
}

// === impl Policy ===

impl Policy {
    /// Decides for a known pod in a namespace with these annotations.
    pub fn decide(defaults: &Defaults, namespace: &Annotations, pod: &Pod) -> Self {
        let (imds, reason) = imds(*defaults, namespace, pod);
        let pod_identity = pod_identity(namespace, pod);
        // The pod's annotation overrides its namespace's: these two expose only its own role.
        let allowance = |annotation, default| {
            [&pod.annotations, namespace]
                .into_iter()
                .find_map(|annotations| match read::<Allowance>(annotations, annotation) {
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
            // A pod that has a token must send it, whatever the default: a request without it is more likely forged than
            // from an old SDK.
            tokenless: allowance(
                ANNOTATION_TOKENLESS,
                defaults.tokenless && !pod.token_volume && imds == ImdsMode::Intercept,
            ),
        }
    }

    /// The policy as the kernel's programs read it.
    pub const fn kernel(&self) -> PodPolicy {
        let pod_identity = if self.pod_identity { POD_IDENTITY_ON } else { POD_IDENTITY_OFF };
        PodPolicy { imds: self.imds.code(), pod_identity }
    }
}

/// The mode: from the default, then the namespace, then the pod.
fn imds(defaults: Defaults, namespace: &Annotations, pod: &Pod) -> (ImdsMode, Reason) {
    let (base, floor) = if pod.host_network {
        ((ImdsMode::Off, Reason::HostNetwork), ImdsMode::Off)
    } else if pod.injected && !defaults.imds.is_strict() {
        ((ImdsMode::Intercept, Reason::Injected), defaults.imds_floor)
    } else {
        ((defaults.imds, Reason::Default), defaults.imds_floor)
    };
    let raised = |(mode, reason)| if mode < floor { (floor, Reason::Floor) } else { (mode, reason) };
    let strict = |inherited: (ImdsMode, Reason)| {
        if inherited.0.is_strict() { inherited } else { (ImdsMode::Intercept, Reason::Unreadable) }
    };
    let of_namespace = raised(match read(namespace, ANNOTATION_IMDS) {
        Read::Absent => base,
        Read::Value(mode) => (mode, Reason::Namespace),
        Read::Unreadable(_) => strict(base),
    });
    let may_loosen = matches!(read(namespace, ANNOTATION_IMDS_POD_OVERRIDE), Read::Value(true));
    match read(&pod.annotations, ANNOTATION_IMDS) {
        Read::Value(mode) if may_loosen || mode > of_namespace.0 => raised((mode, Reason::Pod)),
        Read::Absent | Read::Value(_) => of_namespace,
        Read::Unreadable(_) => strict(of_namespace),
    }
}

/// `on` is the stricter one: then callers are kernel-attested.
fn pod_identity(namespace: &Annotations, pod: &Pod) -> bool {
    let switch = |annotations| match read::<Switch>(annotations, ANNOTATION_POD_IDENTITY) {
        Read::Absent => None,
        Read::Value(value) => Some(value == Switch::On),
        Read::Unreadable(_) => Some(true),
    };
    match (switch(namespace), switch(&pod.annotations)) {
        (Some(true), _) | (_, Some(true)) | (None, None) => true,
        (Some(false), _) | (None, Some(false)) => false,
    }
}

/// What the kernel does with a pod in a network of its own whose policy it does not have yet, where `strictest` is the
/// strictest mode of any pod. It may be one that is to be intercepted, and SDKs cache for hours what a single connection to
/// IMDS got them.
pub fn unknown_pod(defaults: &Defaults, strictest: ImdsMode) -> PodPolicy {
    let of_cluster = defaults.imds.max(defaults.imds_floor);
    let is_strict = defaults.imds_unknown == UnknownPods::Strict && of_cluster != ImdsMode::Off;
    let imds = if is_strict || strictest.is_strict() { ImdsMode::Intercept } else { strictest };
    PodPolicy { imds: imds.code(), pod_identity: POD_IDENTITY_ON }
}

#[cfg(test)]
mod tests;
