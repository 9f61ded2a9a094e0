//! Asking the running agent, by its socket.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

/// The agent answers at once or not at all.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The agent's answer.
///
/// # Errors
/// Why there is none, or the agent's own word for it, for people.
pub(super) fn ask(socket: &Path, path: &str) -> Result<String, String> {
    let shown = socket.display();
    let (status, body) = get(socket, path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            format!("no agent answers at {shown}: is `podgate run` running in this container?")
        }
        _ => format!("cannot ask the agent at {shown}: {error}"),
    })?;
    if status == 200 { Ok(body) } else { Err(body) }
}

/// One question on a connection of its own.
fn get(socket: &Path, path: &str) -> io::Result<(u16, String)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: podgate\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::UnexpectedEof)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok((status.ok_or(io::ErrorKind::InvalidData)?, body.to_owned()))
}
