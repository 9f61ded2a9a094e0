//! Sockets in the node's file system, as a root pod finds them that has a hostPath.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    thread,
};

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::{TIMEOUT, stay};

/// What the next agent says first when it asks for credentials.
const HELLO: &[u8] = b"podgate/hand/v1\n";
/// What each side says then, in bytes.
const NONCE: usize = 32;
/// How the next agent shows that it has the key, in bytes.
const PROOF: usize = 32;
/// What containers have unless they ask for more.
const OF_CONTAINERS: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SYS_CHROOT);

/// Asks every socket everything; the first answer that is no refusal, or else the last word.
pub(super) fn ask(paths: &[PathBuf], requests: &[String]) -> io::Result<String> {
    drop_rights()?;
    let mut last = Ok(String::new());
    for path in paths {
        for request in requests {
            last = exchange(path, request);
            if last.as_ref().is_ok_and(|answer| answer.contains(" 200 OK")) {
                return last;
            }
        }
    }
    last
}

/// Asks for a handover of credentials without the key that it takes.
pub(super) fn ask_handover(path: &Path) -> io::Result<String> {
    drop_rights()?;
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(HELLO)?;
    stream.write_all(&[0; NONCE])?;
    stream.read_exact(&mut [0; NONCE])?;
    stream.write_all(&[0; PROOF])?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Does as if it were an agent with credentials to hand over.
pub(super) fn offer_handover(path: &Path, entries: &str) -> io::Result<()> {
    drop_rights()?;
    let next = path.with_extension("fake");
    let listener = UnixListener::bind(&next)?;
    fs::rename(next, path)?;
    let entries = entries.to_owned();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Who hangs up asks again.
            let _ = offer(stream, &entries);
        }
    });
    stay()
}

fn offer(mut stream: UnixStream, entries: &str) -> io::Result<()> {
    stream.read_exact(&mut [0; HELLO.len() + NONCE])?;
    stream.write_all(&[0; NONCE])?;
    stream.read_exact(&mut [0; PROOF])?;
    stream.write_all(&u32::try_from(entries.len()).unwrap_or_default().to_be_bytes())?;
    stream.write_all(entries.as_bytes())
}

/// Leaves this process what root has in a container.
pub(super) fn drop_rights() -> io::Result<()> {
    let sets = CapabilitySets {
        effective: OF_CONTAINERS,
        permitted: OF_CONTAINERS,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, sets)?)
}

fn exchange(path: &Path, request: &str) -> io::Result<String> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
