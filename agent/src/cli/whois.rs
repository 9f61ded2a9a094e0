//! `podgate whois`: asks the running agent.

use std::{path::PathBuf, process::ExitCode};

use super::{ask::ask, fail};
use crate::{config::DEFAULT_SOCKET, whois::Answer};

/// What to ask.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The process, as the host numbers it.
    #[arg(long)]
    pid: i32,
    /// The agent's socket.
    #[arg(long, env = "PODGATE_SOCKET", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// Asks and prints.
pub fn run(args: &Args) -> ExitCode {
    match ask(&args.socket, &format!("/whois/{}", args.pid)) {
        Ok(body) if args.json => println!("{body}"),
        Ok(body) => match serde_json::from_str(&body) {
            Ok(answer) => print!("{}", for_people(&answer)),
            Err(error) => return fail(&format!("the agent's answer cannot be read: {error}")),
        },
        Err(error) => return fail(&error),
    }
    ExitCode::SUCCESS
}

fn for_people(answer: &Answer) -> String {
    let none = || "-".to_owned();
    let rows = [
        ("process", answer.pid.to_string()),
        ("cgroup", answer.cgroup.clone()),
        ("cgroup id", answer.cgroup_id.map_or_else(none, |id| id.to_string())),
        ("pod", answer.pod.clone().unwrap_or_else(none)),
        ("pod UID", answer.pod_uid.clone().unwrap_or_else(none)),
        ("service account", answer.service_account.clone().unwrap_or_else(none)),
        ("IMDS", answer.imds.clone().unwrap_or_else(none)),
        ("listener port", answer.listener_port.map_or_else(none, |port| port.to_string())),
        ("because", answer.because.clone()),
    ];
    let lines = rows.map(|(name, value)| format!("{name:<16} {value}\n"));
    lines.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_what_is_known_and_what_is_not() {
        let answer = Answer {
            pid: 7,
            cgroup: "/sys/fs/cgroup/system.slice".into(),
            cgroup_id: Some(42),
            pod_uid: None,
            pod: None,
            service_account: None,
            imds: None,
            listener_port: None,
            because: "its cgroup is no pod's".into(),
        };
        let text = for_people(&answer);
        assert!(text.contains("cgroup id        42\n") && text.contains("service account  -\n"), "{text}");
    }
}
