//! Changing what a running lab simulates: faults, pods, associations, namespaces.
//!
//! Owns the arguments and the words of the answers. The lab's process does it.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail, ensure};
use clap::{Args, Subcommand, ValueEnum};
use lab::{
    EnvKind, Pod,
    remote_control::{self, NewPod, Request, Status},
    switches::Setting,
};

use super::{LabName, NAMESPACE, lab_status};
use crate::report;

/// Stands for the list of all switches in place of a name.
const LIST: &str = "list";
/// Stands for all switches in place of a name.
const ALL: &str = "all";

#[derive(Debug, Args)]
pub(crate) struct Fault {
    #[command(flatten)]
    lab: LabName,
    /// The switch; `list` prints them, and `all off` turns all of them off.
    switch: String,
    /// Whether to turn it on or off; without it the switch is shown.
    #[arg(value_enum)]
    to: Option<OnOff>,
    /// How much, where the switch takes a value: a duration such as 250ms, 10s or 5m, or a number a second.
    #[arg(long, allow_hyphen_values = true)]
    value: Option<String>,
    /// The part of the requests that it applies to, up to 1: at 0.25 every fourth.
    #[arg(long)]
    ratio: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnOff {
    On,
    Off,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PodCommand {
    /// Start one more pod.
    Add(AddArguments),
    /// End a pod and delete it at the API server.
    #[command(name = "rm", visible_alias = "remove")]
    Remove {
        #[command(flatten)]
        lab: LabName,
        /// The pod, as NAME or NAMESPACE/NAME.
        pod: String,
    },
    /// Set or remove annotations of a pod.
    Annotate {
        #[command(flatten)]
        lab: LabName,
        /// The pod, as NAME or NAMESPACE/NAME.
        pod: String,
        /// KEY=VALUE to set one, KEY- to remove it.
        #[arg(required = true)]
        annotations: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct AddArguments {
    #[command(flatten)]
    lab: LabName,
    /// The pod, as NAME or NAMESPACE/NAME; the namespace is made if it is missing.
    pod: String,
    /// Its service account: one of the pod's name where it is not given.
    #[arg(long, value_name = "NAME")]
    service_account: Option<String>,
    /// The role to associate with the service account: POD-role where neither is given.
    #[arg(long, conflicts_with = "no_role")]
    role: Option<String>,
    /// Leave the service account without an association.
    #[arg(long)]
    no_role: bool,
    /// An annotation of the pod; can be repeated.
    #[arg(long = "annotation", value_name = "KEY=VALUE")]
    annotations: Vec<String>,
    /// Credential environment of its commands; with `webhook` it has the token volume too.
    #[arg(long, value_enum, default_value_t)]
    env: EnvKind,
    /// Put it on the node's network.
    #[arg(long)]
    host_network: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Association {
    #[command(flatten)]
    lab: LabName,
    /// The service account, as NAME (in the namespace `shop`) or NAMESPACE/NAME.
    service_account: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NamespaceCommand {
    /// Set or remove annotations of a namespace.
    Annotate {
        #[command(flatten)]
        lab: LabName,
        /// The namespace.
        namespace: String,
        /// KEY=VALUE to set one, KEY- to remove it.
        #[arg(required = true)]
        annotations: Vec<String>,
    },
}

/// Lists, turns on or turns off.
pub(super) fn fault(fault: &Fault) -> anyhow::Result<()> {
    let Fault { lab: LabName { name: lab }, switch, to, value, ratio } = fault;
    ensure!(
        *to == Some(OnOff::On) || (value.is_none() && ratio.is_none()),
        "--value and --ratio go with `on`"
    );
    match (switch.as_str(), to) {
        (LIST, None) => list(lab, |_| true),
        (LIST, Some(_)) => bail!("`lab fault list` takes no more"),
        (ALL, Some(OnOff::Off)) => {
            remote_control::ask::<()>(lab, &Request::FaultOff { name: None })?;
            println!("all switches are off");
            Ok(())
        }
        (ALL, _) => bail!("only `lab fault all off` turns all switches; `lab fault list` shows them"),
        (switch, None) => list(lab, |name| name == switch),
        (switch, Some(OnOff::On)) => {
            let setting = Setting { value: value.clone(), ratio: *ratio };
            let setting: Setting =
                remote_control::ask(lab, &Request::FaultOn { name: switch.to_owned(), setting })?;
            println!("{}", lab_status::broken(lab_status::describe(switch, &setting)));
            println!("undo: cargo xtask lab fault {switch} off{}", lab_status::name_flag(lab));
            Ok(())
        }
        (switch, Some(OnOff::Off)) => {
            remote_control::ask::<()>(lab, &Request::FaultOff { name: Some(switch.to_owned()) })?;
            println!("{switch} is off");
            Ok(())
        }
    }
}

/// Prints the switches: two columns, and below a switch how it is set where it is on.
fn list(lab: &str, wanted: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    let status: Status = remote_control::ask(lab, &Request::Status)?;
    let switches: Vec<_> = status.switches.into_iter().filter(|switch| wanted(&switch.name)).collect();
    ensure!(!switches.is_empty(), "there is no such switch: `cargo xtask lab fault list` shows them all");
    let width = switches.iter().map(|switch| switch.name.len()).max().unwrap_or_default();
    for switch in switches {
        let default = switch.default.as_ref().map(|value| format!(" [{value}]")).unwrap_or_default();
        let mark = if switch.on.is_some() { lab_status::broken("●") } else { " ".to_owned() };
        println!("{mark} {:width$}  {}{default}", switch.name, switch.about);
        if let Some(setting) = &switch.on {
            println!("  on: {}", lab_status::broken(lab_status::describe(&switch.name, setting)));
        }
    }
    Ok(())
}

/// Adds, removes or annotates a pod.
pub(super) fn pod(command: PodCommand) -> anyhow::Result<()> {
    match command {
        PodCommand::Add(arguments) => add(arguments),
        PodCommand::Remove { lab, pod } => {
            remote_control::ask::<()>(&lab.name, &Request::RemovePod { pod: pod.clone() })?;
            println!("{pod} is removed");
            Ok(())
        }
        PodCommand::Annotate { lab, pod, annotations } => {
            let annotations = changes(&annotations)?;
            remote_control::ask::<()>(&lab.name, &Request::AnnotatePod { pod: pod.clone(), annotations })?;
            println!("{pod} is annotated");
            Ok(())
        }
    }
}

fn add(arguments: AddArguments) -> anyhow::Result<()> {
    let (namespace, name) = split(&arguments.pod);
    let role = match (arguments.role, arguments.no_role, &arguments.service_account) {
        (Some(role), _, _) => Some(role),
        (None, false, None) => Some(format!("{name}-role")),
        _ => None,
    };
    let annotations = arguments.annotations.iter().map(|text| {
        let (key, value) = text.split_once('=').with_context(|| format!("{text:?} is not KEY=VALUE"))?;
        Ok((key.to_owned(), value.to_owned()))
    });
    let pod = NewPod {
        annotations: annotations.collect::<anyhow::Result<_>>()?,
        namespace,
        name,
        service_account: arguments.service_account,
        role,
        environment: arguments.env,
        host_network: arguments.host_network,
    };
    let pod: Pod = remote_control::ask(&arguments.lab.name, &Request::AddPod(pod))?;
    println!("{} is running, process {}", report::success(pod.full_name()), pod.sandbox.pid);
    let role = pod.role.as_deref().unwrap_or("no role");
    println!("service account {}/{}: {role}", pod.namespace, pod.service_account);
    Ok(())
}

/// Gives a service account a role.
pub(super) fn associate(of: &Association, role: String) -> anyhow::Result<()> {
    let (namespace, service_account) = split(&of.service_account);
    let shown = format!("{namespace}/{service_account}: {role}");
    remote_control::ask::<()>(&of.lab.name, &Request::Associate { namespace, service_account, role })?;
    println!("{shown}");
    Ok(())
}

/// Takes a service account's role away.
pub(super) fn dissociate(of: &Association) -> anyhow::Result<()> {
    let (namespace, service_account) = split(&of.service_account);
    let shown = format!("{namespace}/{service_account}: no role");
    remote_control::ask::<()>(&of.lab.name, &Request::Dissociate { namespace, service_account })?;
    println!("{shown}");
    Ok(())
}

/// Annotates a namespace.
pub(super) fn namespace(command: NamespaceCommand) -> anyhow::Result<()> {
    let NamespaceCommand::Annotate { lab, namespace, annotations } = command;
    let annotations = changes(&annotations)?;
    let request = Request::AnnotateNamespace { namespace: namespace.clone(), annotations };
    remote_control::ask::<()>(&lab.name, &request)?;
    println!("{namespace} is annotated");
    Ok(())
}

/// `NAMESPACE/NAME`, or `NAME` in the lab's usual namespace.
fn split(name: &str) -> (String, String) {
    let (namespace, name) = name.split_once('/').unwrap_or((NAMESPACE, name));
    (namespace.to_owned(), name.to_owned())
}

/// `KEY=VALUE` sets an annotation, `KEY-` removes it, as kubectl has it.
fn changes(annotations: &[String]) -> anyhow::Result<BTreeMap<String, Option<String>>> {
    let change = |text: &String| match (text.split_once('='), text.strip_suffix('-')) {
        (Some((key, value)), _) if !key.is_empty() => Ok((key.to_owned(), Some(value.to_owned()))),
        (None, Some(key)) if !key.is_empty() => Ok((key.to_owned(), None)),
        _ => bail!("{text:?} is neither KEY=VALUE nor KEY-"),
    };
    annotations.iter().map(change).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_are_written_as_for_kubectl() {
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let changes = |given: &[&str]| changes(&words(given));
        let expected = [("a".to_owned(), Some("b=c-".to_owned())), ("d/e".to_owned(), None)];
        assert_eq!(changes(&["a=b=c-", "d/e-"]).unwrap(), expected.into());
        for bad in ["", "a", "=b", "-"] {
            assert!(changes(&[bad]).is_err(), "{bad}");
        }
    }
}
