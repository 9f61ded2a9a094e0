//! How labs are shown: their pods, their agent, what is broken on purpose, and what to try next.
//!
//! Owns the words and the layout; no line is wider than a terminal of 80 columns needs.

use comfy_table::Table;
use lab::{
    EnvKind, Pod,
    process_id::Process,
    remote_control::{self, Request, Status},
    state::State,
    switches::Setting,
};
use owo_colors::{OwoColorize as _, Stream};
use serde_json::json;

use crate::report;

/// How far what belongs to a lab is indented.
const INDENT: usize = 2;

/// Shows every lab of this machine.
pub(super) fn run(as_json: bool) -> anyhow::Result<()> {
    let labs = State::list()?;
    if as_json {
        let labs: Vec<_> = labs
            .iter()
            .map(|lab| json!({"alive": lab.is_alive(), "lab": lab, "status": live(lab)}))
            .collect();
        println!("{}", serde_json::to_string_pretty(&labs)?);
        return Ok(());
    }
    if labs.is_empty() {
        println!("no lab is up: `cargo xtask lab up` starts one");
    }
    for lab in labs {
        print(&lab);
    }
    Ok(())
}

/// Shows a lab that has just come up, and what to try.
pub(super) fn print_up(lab: &State) {
    print(lab);
    println!("\ntry:\n{}", hints(lab).join("\n"));
}

fn print(lab: &State) {
    let live = live(lab);
    println!("{}", headline(lab, live.as_ref()));
    if !lab.is_alive() {
        return;
    }
    for line in pods(lab, Table::new().width().map(usize::from)) {
        println!("{:INDENT$}{line}", "");
    }
    for switch in live.iter().flat_map(|live| &live.switches) {
        if let Some(setting) = &switch.on {
            println!("  fault: {}", broken(describe(&switch.name, setting)));
        }
    }
}

/// What a lab's process says of itself; only labs that take commands have one.
fn live(lab: &State) -> Option<Status> {
    (lab.served && lab.is_alive()).then(|| remote_control::ask(&lab.name, &Request::Status).ok()).flatten()
}

/// The dot is green where everything runs, yellow where the agent does not, red where the lab is dead.
fn headline(lab: &State, live: Option<&Status>) -> String {
    let name = &lab.name;
    if !lab.is_alive() {
        return format!(
            "{} {name}, dead: `cargo xtask lab down --name {name}` removes it",
            report::failure("●")
        );
    }
    let flags = live.map(|live| format!(" ({})", live.agent_flags.join(" "))).unwrap_or_default();
    match lab.agent.filter(Process::is_running) {
        Some(agent) => {
            format!(
                "{} {name}, process {}; agent: process {}{flags}",
                report::success("●"),
                lab.owner.pid,
                agent.pid
            )
        }
        None => format!("{} {name}, process {}; agent: not running", broken("●"), lab.owner.pid),
    }
}

/// One line a pod, or two where that is wider than the terminal.
fn pods(lab: &State, terminal: Option<usize>) -> Vec<String> {
    let mut rows = vec![["pod", "service account", "role", "env", "pid"].map(str::to_owned)];
    rows.extend(lab.pods.iter().map(|pod| {
        [
            pod.full_name(),
            pod.service_account.clone(),
            pod.role.clone().unwrap_or_else(|| "-".to_owned()),
            environment(pod.environment).to_owned(),
            pod.sandbox.pid.to_string(),
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..5).map(width).collect();
    let left: Vec<String> = rows
        .iter()
        .map(|row| {
            let cells: Vec<_> =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            cells.join("  ")
        })
        .collect();
    let right: Vec<String> =
        std::iter::once("addresses".to_owned()).chain(lab.pods.iter().map(addresses)).collect();
    let one_line: Vec<_> = left.iter().zip(&right).map(|(left, right)| format!("{left}  {right}")).collect();
    if terminal.is_none_or(|terminal| one_line.iter().all(|line| INDENT + line.len() <= terminal)) {
        return one_line;
    }
    let two_lines = left.iter().zip(&right).skip(1);
    let two_lines = two_lines.flat_map(|(left, right)| [left.trim_end().to_owned(), format!("    {right}")]);
    std::iter::once(left[0].trim_end().to_owned()).chain(two_lines).collect()
}

fn addresses(pod: &Pod) -> String {
    if pod.host_network {
        return "host network".to_owned();
    }
    let addresses: Vec<_> = pod.addresses.list().iter().map(ToString::to_string).collect();
    addresses.join(", ")
}

fn environment(environment: EnvKind) -> &'static str {
    match environment {
        EnvKind::None => "none",
        EnvKind::Webhook => "webhook",
        EnvKind::Ecs => "ecs",
    }
}

/// A switch that is on, as one would set it again.
pub(super) fn describe(switch: &str, setting: &Setting) -> String {
    let value = setting.value.as_ref().map(|value| format!(" --value {value}")).unwrap_or_default();
    let ratio = setting.ratio.map(|ratio| format!(" --ratio {ratio}")).unwrap_or_default();
    format!("{switch}{value}{ratio}")
}

/// Something that is not as it should be, on purpose.
pub(super) fn broken(text: impl std::fmt::Display) -> String {
    text.if_supports_color(Stream::Stdout, |text| text.yellow()).to_string()
}

/// How a command names a lab; nothing for the usual one.
pub(super) fn name_flag(lab: &str) -> String {
    if lab == "dev" { String::new() } else { format!(" --name {lab}") }
}

/// Commands that work as they stand, with what they do.
fn hints(lab: &State) -> Vec<String> {
    let name = name_flag(&lab.name);
    let hint = |command: &str, about: &str| {
        format!("  cargo xtask lab {:34} {about}", format!("{command}{name}")).trim_end().to_owned()
    };
    let apps: Vec<&Pod> = lab.pods.iter().filter(|pod| pod.namespace == super::NAMESPACE).collect();
    let has_agent = lab.agent.is_some();
    let mut hints = Vec::new();
    if !has_agent {
        hints.push(hint("agent start --build", "build and start the agent"));
    }
    for pod in apps.iter().take(2) {
        hints.push(hint(&format!("credentials {}", pod.name), "what an SDK gets"));
    }
    if let Some(pod) = apps.first() {
        // What follows `--` is not the lab's.
        hints.push(format!("  cargo xtask lab exec{name} {} -- bash", pod.name));
        if has_agent {
            hints.push(format!("  cargo xtask lab podgate{name} -- whois --pid {}", pod.sandbox.pid));
        }
    } else {
        hints.push(hint("pod add app-1", "add a pod"));
    }
    hints.extend([
        hint("fault eks-auth-throttle on", "break something"),
        hint("fault list", "what can be broken"),
        hint("logs --follow", "the agent's log"),
        hint("status", ""),
        hint("down", ""),
    ]);
    hints
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lab() -> State {
        let pod = |namespace: &str, name: &str, host_network: bool| {
            json!({
                "namespace": namespace, "name": name, "uid": "uid", "service_account": name, "role": "app-1-role",
                "host_network": host_network, "addresses": {"v4": "10.10.128.1", "v6": "fd10::1:1"},
                "cgroup": "/c", "container": "/c/c", "sandbox": Process::own().unwrap(), "token_volume": null,
                "environment": "webhook",
            })
        };
        serde_json::from_value(json!({
            "name": "dev", "owner": Process::own().unwrap(), "served": false, "node": null, "agent": null,
            "pods": [pod("kube-system", "podgate-x7k2m", true), pod("shop", "app-1", false)],
        }))
        .unwrap()
    }

    #[test]
    fn no_line_is_wider_than_the_terminal_and_no_address_is_broken() {
        for (columns, count) in [(80, 5), (120, 3)] {
            let lines = pods(&lab(), Some(columns));
            assert_eq!(lines.len(), count, "{lines:?}");
            for line in &lines {
                assert!(line.len() + INDENT <= columns, "{line}");
            }
            assert!(lines.iter().any(|line| line.contains("10.10.128.1, fd10::1:1")), "{lines:?}");
        }
        for line in hints(&lab()) {
            assert!(line.len() <= 80, "{line}");
        }
    }

    #[test]
    fn a_lab_whose_agent_does_not_run_says_so_first() {
        let line = headline(&lab(), None);
        assert!(line.contains("agent: not running"), "{line}");
    }
}
