use ImdsMode::{Audit, Deny, Intercept, Off};
use agent_common::policy::{IMDS_AUDIT, IMDS_INTERCEPT, IMDS_OFF};

use super::*;
use crate::{
    policy::{AnnotationScope, unreadable},
    testing::pod as plain_pod,
};

fn annotations(pairs: &[(&str, &str)]) -> Annotations {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// `podgate.dev/imds`, where there is one.
fn imds_annotation(value: Option<&str>) -> Annotations {
    value.map(|value| annotations(&[(ANNOTATION_IMDS, value)])).unwrap_or_default()
}

fn pod(annotations: Annotations) -> Pod {
    Pod { annotations, ..plain_pod("app", "web") }
}

fn defaults(imds: ImdsMode, imds_floor: ImdsMode) -> Defaults {
    Defaults { imds, imds_floor, imds_unknown: UnknownPods::Strict, imds_v1: false, tokenless: true }
}

#[test]
fn default_floor_namespace_and_pod_decide_the_mode_in_this_order() {
    let cases = [
        // default, floor, namespace, pod, mode, reason
        (Audit, Off, None, None, Audit, Reason::Default),
        (Deny, Off, None, None, Deny, Reason::Default),
        (Off, Audit, None, None, Audit, Reason::Floor),
        // A namespace loosens and tightens, down to the floor.
        (Audit, Off, Some("intercept"), None, Intercept, Reason::Namespace),
        (Deny, Off, Some("off"), None, Off, Reason::Namespace),
        (Deny, Intercept, Some("off"), None, Intercept, Reason::Floor),
        // A pod only tightens.
        (Audit, Off, None, Some("intercept"), Intercept, Reason::Pod),
        (Audit, Off, None, Some("off"), Audit, Reason::Default),
        (Audit, Off, Some("deny"), Some("intercept"), Deny, Reason::Namespace),
        (Audit, Off, Some("intercept"), Some("deny"), Deny, Reason::Pod),
        (Intercept, Off, None, Some("off"), Intercept, Reason::Default),
        // An unknown value never gives a pod the node's role.
        (Audit, Off, Some("Deny"), None, Intercept, Reason::Unreadable),
        (Audit, Off, None, Some(""), Intercept, Reason::Unreadable),
        (Deny, Off, Some("of"), None, Deny, Reason::Default),
        (Audit, Off, Some("deny"), Some("nonsense"), Deny, Reason::Namespace),
        (Audit, Deny, Some("nonsense"), None, Deny, Reason::Floor),
    ];
    for (default, floor, namespace, of_pod, mode, reason) in cases {
        let policy = Policy::decide(
            &defaults(default, floor),
            &imds_annotation(namespace),
            &pod(imds_annotation(of_pod)),
        );
        let case = format!("default {default:?}, floor {floor:?}, namespace {namespace:?}, pod {of_pod:?}");
        assert_eq!((policy.imds, policy.reason), (mode, reason), "{case}");
    }
}

#[test]
fn a_pod_loosens_only_where_its_namespace_allows_and_to_the_floor() {
    let cases = [
        // override, floor, pod, mode
        ("true", Off, "off", Off),
        ("true", Audit, "off", Audit),
        ("true", Off, "deny", Deny),
        ("false", Off, "off", Intercept),
        ("yes", Off, "off", Intercept),
    ];
    for (may_loosen, floor, of_pod, mode) in cases {
        let namespace = annotations(&[(ANNOTATION_IMDS_POD_OVERRIDE, may_loosen)]);
        let policy =
            Policy::decide(&defaults(Intercept, floor), &namespace, &pod(imds_annotation(Some(of_pod))));
        assert_eq!(policy.imds, mode, "{may_loosen} {floor:?} {of_pod}");
    }
}

#[test]
fn a_pod_with_an_identity_of_its_own_is_intercepted_by_default() {
    let injected = Pod { injected: true, ..pod(Annotations::new()) };
    let decide = |default, namespace| {
        let policy = Policy::decide(&defaults(default, Off), &imds_annotation(namespace), &injected);
        (policy.imds, policy.reason)
    };
    assert_eq!(decide(Audit, None), (Intercept, Reason::Injected));
    assert_eq!(decide(Off, None), (Intercept, Reason::Injected));
    assert_eq!(decide(Deny, None), (Deny, Reason::Default));
    assert_eq!(decide(Audit, Some("audit")), (Audit, Reason::Namespace), "namespaces belong to admins");
}

#[test]
fn a_pod_on_the_host_network_is_left_alone_without_an_annotation() {
    let decide = |namespace, of_pod| {
        let pod = Pod { host_network: true, ..pod(imds_annotation(of_pod)) };
        let policy = Policy::decide(&defaults(Deny, Deny), &imds_annotation(namespace), &pod);
        (policy.imds, policy.reason)
    };
    assert_eq!(decide(None, None), (Off, Reason::HostNetwork));
    assert_eq!(decide(Some("intercept"), None), (Intercept, Reason::Namespace));
    assert_eq!(decide(None, Some("deny")), (Deny, Reason::Pod));
}

#[test]
fn pod_identity_is_off_only_where_one_says_off_and_none_says_on() {
    let cases = [
        // namespace, pod, on
        (None, None, true),
        (Some("off"), None, false),
        (None, Some("off"), false),
        (Some("on"), Some("off"), true),
        (Some("off"), Some("on"), true),
        (Some("Off"), None, true),
        (Some("off"), Some("nonsense"), true),
    ];
    for (namespace, of_pod, on) in cases {
        let says = |value: Option<&str>| {
            value.map(|value| annotations(&[(ANNOTATION_POD_IDENTITY, value)])).unwrap_or_default()
        };
        let policy = Policy::decide(&defaults(Audit, Off), &says(namespace), &pod(says(of_pod)));
        assert_eq!(policy.pod_identity, on, "{namespace:?} {of_pod:?}");
    }
}

#[test]
fn imds_v1_is_for_those_who_ask_for_it() {
    let cases = [
        // default, namespace, pod, allowed
        (false, None, None, false),
        (true, None, None, true),
        (false, Some("allow"), None, true),
        (false, None, Some("allow"), true),
        (true, None, Some("deny"), false),
        (false, Some("allow"), Some("deny"), false),
        (true, None, Some("yes"), false),
        (true, Some("ALLOW"), None, false),
    ];
    for (imds_v1, namespace, of_pod, allowed) in cases {
        let says = |value: Option<&str>| {
            value.map(|value| annotations(&[(ANNOTATION_IMDS_V1, value)])).unwrap_or_default()
        };
        let defaults = Defaults { imds_v1, ..defaults(Intercept, Off) };
        let policy = Policy::decide(&defaults, &says(namespace), &pod(says(of_pod)));
        assert_eq!(policy.imds_v1, allowed, "{imds_v1} {namespace:?} {of_pod:?}");
    }
}

#[test]
fn a_pod_that_has_a_token_must_send_it() {
    let cases = [
        // default, mode, has the volume, namespace, pod, served from its cgroup alone
        (true, Intercept, false, None, None, true),
        (false, Intercept, false, None, None, false),
        (true, Intercept, true, None, None, false),
        (false, Intercept, true, None, None, false),
        (true, Intercept, true, None, Some("allow"), true),
        (false, Intercept, true, None, Some("allow"), true),
        (false, Intercept, true, Some("allow"), None, true),
        (false, Intercept, false, Some("allow"), None, true),
        (false, Intercept, false, Some("allow"), Some("deny"), false),
        (true, Intercept, false, None, Some("deny"), false),
        (true, Intercept, false, Some("deny"), None, false),
        (true, Audit, false, None, None, false),
        (false, Audit, false, None, Some("allow"), true),
        (true, Audit, false, None, Some("Allow"), false),
        (true, Deny, false, None, None, false),
    ];
    for (default, imds, token_volume, namespace, of_pod, tokenless) in cases {
        let says = |value: Option<&str>| {
            value.map(|value| annotations(&[(ANNOTATION_TOKENLESS, value)])).unwrap_or_default()
        };
        let defaults = Defaults { tokenless: default, ..defaults(imds, Off) };
        let pod = Pod { token_volume, ..pod(says(of_pod)) };
        let policy = Policy::decide(&defaults, &says(namespace), &pod);
        let case = format!("{default} {imds:?} {token_volume} {namespace:?} {of_pod:?}");
        assert_eq!(policy.tokenless, tokenless, "{case}");
    }
}

#[test]
fn an_unknown_value_is_reported_with_its_scope() {
    let bad = annotations(&[
        (ANNOTATION_IMDS, "Deny"),
        (ANNOTATION_IMDS_V1, "allow"),
        (ANNOTATION_TOKENLESS, "\u{1b}[31m"),
        (ANNOTATION_IMDS_POD_OVERRIDE, "yes"),
    ]);
    let reports: Vec<_> =
        unreadable(&bad, AnnotationScope::Namespace).iter().map(ToString::to_string).collect();
    assert_eq!(reports.len(), 3, "{reports:?}");
    assert_eq!(reports[0], "the namespace's annotation podgate.dev/imds has the unknown value \"Deny\"");
    assert!(!reports.iter().any(|report| report.contains('\u{1b}')), "{reports:?}");
    assert_eq!(unreadable(&bad, AnnotationScope::Pod).len(), 2, "the override is the namespace's alone");
}

#[test]
fn an_unknown_pod_is_intercepted_unless_the_cluster_is_off() {
    use UnknownPods::{AsKnown, Strict};
    let cases = [
        // setting, default, floor, strictest, mode
        (Strict, Audit, Off, Audit, IMDS_INTERCEPT),
        (Strict, Off, Audit, Audit, IMDS_INTERCEPT),
        (Strict, Intercept, Off, Intercept, IMDS_INTERCEPT),
        (Strict, Deny, Off, Deny, IMDS_INTERCEPT),
        // The cluster is off: as strict as the strictest.
        (Strict, Off, Off, Off, IMDS_OFF),
        (Strict, Off, Off, Audit, IMDS_AUDIT),
        (Strict, Off, Off, Deny, IMDS_INTERCEPT),
        (AsKnown, Off, Off, Off, IMDS_OFF),
        (AsKnown, Audit, Off, Audit, IMDS_AUDIT),
        (AsKnown, Audit, Off, Intercept, IMDS_INTERCEPT),
        (AsKnown, Deny, Off, Deny, IMDS_INTERCEPT),
    ];
    for (imds_unknown, default, floor, strictest, code) in cases {
        let defaults = Defaults { imds_unknown, ..defaults(default, floor) };
        let case = format!("{imds_unknown:?}, default {default:?}, floor {floor:?}, strictest {strictest:?}");
        assert_eq!(unknown_pod(&defaults, strictest).imds, code, "{case}");
    }
}
