//! `podgate whois`: asks the running agent.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use crate::{config::DEFAULT_SOCKET, whois::Answer};

/// The agent answers at once or not at all.
const TIMEOUT: Duration = Duration::from_secs(5);

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
    match ask(args) {
        Ok(body) if args.json => println!("{body}"),
        Ok(body) => match serde_json::from_str(&body) {
            Ok(answer) => print!("{}", for_people(&answer)),
            Err(error) => return fail(&format!("the agent's answer cannot be read: {error}")),
        },
        Err(error) => return fail(&error),
    }
    ExitCode::SUCCESS
}

fn ask(args: &Args) -> Result<String, String> {
    let socket = args.socket.display();
    let (status, body) = get(args).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            format!("no agent answers at {socket}: is `podgate run` running in this container?")
        }
        _ => format!("cannot ask the agent at {socket}: {error}"),
    })?;
    if status == 200 { Ok(body) } else { Err(body) }
}

/// One question on a connection of its own.
fn get(args: &Args) -> io::Result<(u16, String)> {
    let mut stream = UnixStream::connect(&args.socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET /whois/{} HTTP/1.1\r\nHost: podgate\r\nConnection: close\r\n\r\n", args.pid)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or(io::ErrorKind::InvalidData)?, body.to_owned()))
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
        ("because", answer.because.clone()),
    ];
    let lines = rows.map(|(name, value)| format!("{name:<16} {value}\n"));
    lines.concat()
}

fn fail(error: &str) -> ExitCode {
    eprintln!("podgate: {error}");
    ExitCode::FAILURE
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
            because: "its cgroup is no pod's".into(),
        };
        let text = for_people(&answer);
        assert!(text.contains("cgroup id        42\n") && text.contains("service account  -\n"), "{text}");
    }
}
