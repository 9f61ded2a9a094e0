//! The lab's switches by name: everything that can be made to go wrong while a lab is up.
//!
//! Owns the names, what their values mean, and which switch is on. What a fault does is the servers' part.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, bail, ensure};
use jiff::SignedDuration;
use serde::{Deserialize, Serialize};

use crate::{
    fault_injection::{Fault, Service},
    imds_server::HOP_LIMIT,
    simulation::{Lab, SESSION_DURATION},
};

/// The services and what the names of their switches begin with.
const SERVICES: [(Service, &str); 3] =
    [(Service::KubeApi, "kube-api"), (Service::EksAuth, "eks-auth"), (Service::Imds, "imds")];

/// What `AssumeRoleForPodIdentity` can answer besides credentials and throttling.
const EKS_AUTH_ERRORS: [(&str, u16, &str, &str); 8] = [
    ("access-denied", 400, "AccessDeniedException", "You do not have sufficient access."),
    ("expired-token", 400, "ExpiredTokenException", "The token included in the request is expired."),
    ("internal-server", 500, "InternalServerException", "An internal error occurred."),
    ("invalid-parameter", 400, "InvalidParameterException", "A parameter is not valid."),
    ("invalid-request", 400, "InvalidRequestException", "The request is not valid."),
    ("invalid-token", 400, "InvalidTokenException", "The token included in the request is invalid."),
    ("resource-not-found", 404, "ResourceNotFoundException", "No association exists."),
    ("service-unavailable", 503, "ServiceUnavailableException", "The service is unavailable."),
];
const KUBE_API_ERRORS: [(&str, u16, &str, &str); 6] = [
    ("unauthorized", 401, "Unauthorized", "Unauthorized"),
    ("forbidden", 403, "Forbidden", "forbidden by the lab"),
    ("not-found", 404, "NotFound", "not found"),
    ("internal-error", 500, "InternalError", "Internal error occurred"),
    (
        "service-unavailable",
        503,
        "ServiceUnavailable",
        "the server is currently unable to handle the request",
    ),
    ("timeout", 504, "Timeout", "request did not complete within the allotted timeout"),
];
const IMDS_ERRORS: [(&str, u16, &str, &str); 5] = [
    ("unauthorized", 401, "", "no valid session token"),
    ("forbidden", 403, "", "the metadata service is disabled"),
    ("not-found", 404, "", "there is no such data"),
    ("internal-error", 500, "", "internal server error"),
    ("service-unavailable", 503, "", "service unavailable"),
];

/// Which switches are on.
#[derive(Debug, Default)]
pub struct Switchboard {
    on: BTreeMap<String, Setting>,
}

/// A switch, as people list it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SwitchState {
    /// Such as `eks-auth-throttle`.
    pub name: String,
    /// What it does.
    pub about: String,
    /// The value that it takes where none is given; `None` where it takes none.
    pub default: Option<String>,
    /// How it is set, where it is on.
    pub on: Option<Setting>,
}

/// How a switch is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// Its value, where it takes one.
    pub value: Option<String>,
    /// The part of the requests that it applies to, where not all.
    pub ratio: Option<f64>,
}

struct Switch {
    name: String,
    about: String,
    default: Option<&'static str>,
    effect: Effect,
}

/// The fault that a value stands for.
type FaultOf = dyn Fn(&str) -> anyhow::Result<Fault>;

enum Effect {
    /// Requests meet a fault; those of one service that are no latency replace each other.
    Fault(Service, Box<FaultOf>),
    /// The wall clock of a service.
    Clock(Service),
    /// Something of one simulator; called without a value to turn it off.
    Setting(fn(&Lab, Option<&str>) -> anyhow::Result<()>),
    /// Happens at once and cannot be undone.
    Event(fn(&Lab) -> anyhow::Result<()>),
}

// === impl Switchboard ===

impl Switchboard {
    /// Every switch there is, by name.
    pub fn list(&self) -> Vec<SwitchState> {
        let state = |switch: Switch| SwitchState {
            on: self.on.get(&switch.name).cloned(),
            name: switch.name,
            about: switch.about,
            default: switch.default.map(str::to_owned),
        };
        all().into_iter().map(state).collect()
    }

    /// Turns a switch on; one that is on already gets the new setting.
    pub fn turn_on(&mut self, lab: &Lab, name: &str, mut setting: Setting) -> anyhow::Result<Setting> {
        let switch = find(name)?;
        if switch.default.is_none() {
            ensure!(setting.value.is_none(), "{name} takes no value");
        }
        if let Some(ratio) = setting.ratio {
            ensure!(matches!(switch.effect, Effect::Fault(..)), "{name} takes no ratio");
            ensure!(ratio > 0.0 && ratio <= 1.0, "a ratio is above 0 and at most 1, not {ratio}");
        }
        setting.value = setting.value.or_else(|| switch.default.map(str::to_owned));
        let value = setting.value.as_deref().unwrap_or_default();
        match &switch.effect {
            Effect::Fault(service, fault) => {
                let fault = fault(value).with_context(|| format!("{name}: {value:?}"))?;
                if !matches!(fault, Fault::Latency(_)) {
                    self.on.retain(|other, _| !replaces(*service, other));
                }
                lab.faults.set_ratio(*service, fault, setting.ratio.unwrap_or(1.0));
            }
            Effect::Clock(service) => {
                let offset =
                    value.parse().with_context(|| format!("{name}: {value:?} is not such as -10m"))?;
                lab.faults.set_clock(*service, offset);
            }
            Effect::Setting(set) => {
                set(lab, Some(value)).with_context(|| format!("{name}: {value:?}"))?;
            }
            Effect::Event(happen) => {
                happen(lab)?;
                return Ok(setting);
            }
        }
        self.on.insert(name.to_owned(), setting.clone());
        Ok(setting)
    }

    /// Turns a switch off.
    pub fn turn_off(&mut self, lab: &Lab, name: &str) -> anyhow::Result<()> {
        let switch = find(name)?;
        if let Effect::Event(_) = switch.effect {
            bail!("{name} cannot be undone");
        }
        // One that has been replaced is off already, and the other one stays.
        if self.on.remove(name).is_none() {
            return Ok(());
        }
        match switch.effect {
            Effect::Fault(service, _) if name.ends_with("-latency") => lab.faults.clear_latency(service),
            Effect::Fault(service, _) => lab.faults.clear_failure(service),
            Effect::Clock(service) => lab.faults.set_clock(service, SignedDuration::ZERO),
            Effect::Setting(set) => set(lab, None)?,
            Effect::Event(_) => {}
        }
        Ok(())
    }

    /// Turns every switch off.
    pub fn turn_all_off(&mut self, lab: &Lab) -> anyhow::Result<()> {
        for name in self.on.keys().cloned().collect::<Vec<_>>() {
            self.turn_off(lab, &name)?;
        }
        Ok(())
    }
}

// === impl Switch ===

impl Switch {
    fn new(name: String, about: &str, default: Option<&'static str>, effect: Effect) -> Self {
        Self { name, about: about.to_owned(), default, effect }
    }

    fn fault(
        (service, prefix): (Service, &str),
        kind: &str,
        about: &str,
        default: Option<&'static str>,
        fault: impl Fn(&str) -> anyhow::Result<Fault> + 'static,
    ) -> Self {
        Self::new(format!("{prefix}-{kind}"), about, default, Effect::Fault(service, Box::new(fault)))
    }
}

fn all() -> Vec<Switch> {
    let mut switches = Vec::new();
    for (service, prefix) in SERVICES {
        switches.extend(faults((service, prefix)));
        let errors: &[_] = match service {
            Service::KubeApi => &KUBE_API_ERRORS,
            Service::EksAuth => &EKS_AUTH_ERRORS,
            Service::Imds => &IMDS_ERRORS,
        };
        for &(kind, status, code, message) in errors {
            let about = format!("answers {status} {code}").trim_end().to_owned();
            switches.push(Switch::fault((service, prefix), kind, &about, None, move |_| {
                Ok(Fault::Error { status, code: code.to_owned(), message: message.to_owned() })
            }));
        }
        let about = "its clock is ahead, or behind with a minus";
        switches.push(Switch::new(format!("{prefix}-clock"), about, Some("10m"), Effect::Clock(service)));
    }
    switches.extend(settings());
    switches.sort_by(|a, b| a.name.cmp(&b.name));
    switches
}

/// The faults that every service can have.
fn faults(of: (Service, &str)) -> [Switch; 5] {
    [
        Switch::fault(of, "latency", "delays every answer", Some("500ms"), |value| {
            duration(value).map(Fault::Latency)
        }),
        Switch::fault(
            of,
            "throttle",
            "throttles every request; the value is Retry-After",
            Some("1s"),
            |value| Ok(Fault::Throttle { retry_after: Some(duration(value)?) }),
        ),
        Switch::fault(of, "limit", "throttles requests above this many a second", Some("1"), |value| {
            let per_second: f64 = value.parse().context("not a number of requests a second")?;
            ensure!(per_second > 0.0 && per_second.is_finite(), "not a number above 0");
            Ok(Fault::Limit { per_second })
        }),
        Switch::fault(of, "drop", "closes connections without an answer", None, |_| Ok(Fault::Drop)),
        Switch::fault(of, "hang", "accepts requests and never answers", None, |_| Ok(Fault::Hang)),
    ]
}

/// What only one of the services has.
fn settings() -> [Switch; 10] {
    let setting = |name: &str, about: &str, default, set| {
        Switch::new(name.to_owned(), about, default, Effect::Setting(set))
    };
    let event =
        |name: &str, about: &str, happen| Switch::new(name.to_owned(), about, None, Effect::Event(happen));
    [
        setting("eks-auth-session", "credentials that it issues live so long", Some("15m"), |lab, value| {
            lab.eks_auth.set_session(value.map_or(Ok(SESSION_DURATION), duration)?);
            Ok(())
        }),
        setting("imds-hop-limit", "how far the answer with a session token goes", Some("1"), |lab, value| {
            let hops = value.map(|value| value.parse().context("not a number of hops from 1 to 64"));
            let hops = hops.transpose()?.unwrap_or(HOP_LIMIT);
            ensure!((1..=64).contains(&hops), "not a number of hops from 1 to 64");
            lab.imds.set_hop_limit(hops);
            Ok(())
        }),
        setting("imds-v2-required", "requests without a session token are refused", None, |lab, value| {
            lab.imds.v2_required(value.is_some());
            Ok(())
        }),
        setting(
            "kube-api-authorizer-lag",
            "the Node authorizer learns of new pods late",
            Some("5s"),
            |lab, value| {
                lab.cluster.set_authorizer_lag(value.map_or(Ok(Duration::ZERO), duration)?);
                Ok(())
            },
        ),
        setting(
            "kube-api-keys-forbidden",
            "service accounts may not read the keys of tokens",
            None,
            |lab, value| {
                lab.kube_api.allow_issuer_discovery(value.is_none());
                Ok(())
            },
        ),
        setting(
            "kube-api-any-pod-audience",
            "nodes get tokens for EKS Auth for pods without such a volume too, whatever RBAC says",
            None,
            |lab, value| {
                lab.kube_api.allow_node_audience(value.is_some());
                Ok(())
            },
        ),
        event("kube-api-compact", "drops past changes: older watches get 410 (once)", |lab| {
            lab.cluster.compact();
            Ok(())
        }),
        event("kube-api-rotate-key", "signs tokens with a new key (once)", |lab| {
            lab.cluster.rotate_signing_key();
            Ok(())
        }),
        event("kube-api-retire-keys", "accepts only tokens of its newest key (once)", |lab| {
            lab.cluster.retire_old_keys();
            Ok(())
        }),
        event("kubelet-rotate-tokens", "gives every pod with a token volume a new token (once)", |lab| {
            lab.running_pods().iter().try_for_each(|pod| lab.rotate_token(pod))
        }),
    ]
}

fn find(name: &str) -> anyhow::Result<Switch> {
    let switches = all();
    let close: Vec<_> =
        switches.iter().map(|switch| switch.name.clone()).filter(|other| other.contains(name)).collect();
    switches.into_iter().find(|switch| switch.name == name).with_context(|| {
        let hint =
            if close.is_empty() { "`lab fault list` shows them all".to_owned() } else { close.join(", ") };
        format!("there is no switch {name}: {hint}")
    })
}

/// Whether the switch `other` is turned off when another failure of `service` is turned on.
fn replaces(service: Service, other: &str) -> bool {
    find(other).is_ok_and(|other| {
        matches!(other.effect, Effect::Fault(of, _) if of == service) && !other.name.ends_with("-latency")
    })
}

fn duration(value: &str) -> anyhow::Result<Duration> {
    let signed: SignedDuration = value.parse().context("not a duration such as 500ms, 10s or 5m")?;
    Duration::try_from(signed).context("a duration is not negative here")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_switch_has_a_name_of_its_own_and_a_good_default() {
        let switches = all();
        for pair in switches.windows(2) {
            assert_ne!(pair[0].name, pair[1].name);
        }
        for switch in switches {
            if let Effect::Fault(_, fault) = &switch.effect {
                fault(switch.default.unwrap_or_default()).unwrap();
            }
        }
    }

    #[test]
    fn a_switch_that_does_not_exist_is_an_error_with_similar_names() {
        let error = find("throttle").err().unwrap().to_string();
        assert!(error.contains("eks-auth-throttle"), "{error}");
        let error = find("gremlins").err().unwrap().to_string();
        assert!(error.contains("lab fault list"), "{error}");
    }

    #[test]
    fn failures_of_one_service_replace_each_other_and_no_latency() {
        assert!(replaces(Service::EksAuth, "eks-auth-drop"));
        assert!(!replaces(Service::EksAuth, "eks-auth-latency"));
        assert!(!replaces(Service::EksAuth, "imds-drop"));
        assert!(!replaces(Service::EksAuth, "eks-auth-clock"));
    }

    #[test]
    fn durations_have_a_unit_and_no_sign() {
        assert_eq!(duration("250ms").unwrap(), Duration::from_millis(250));
        assert_eq!(duration("5m").unwrap(), Duration::from_mins(5));
        for bad in ["5", "", "-1s", "soon"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        assert_eq!("-10m".parse::<SignedDuration>().unwrap(), SignedDuration::from_mins(-10));
        assert_eq!("+10m".parse::<SignedDuration>().unwrap(), SignedDuration::from_mins(10));
    }
}
