//! Too many of everything.

use std::{
    collections::VecDeque,
    fs,
    io::{self, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    thread,
    time::Duration,
};

use rustix::{
    io::{Errno, ioctl_fionbio},
    net::connect,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};

use super::{Got, forge::Forger, repeat, socket, stay};

/// How long one connection may take: there are many.
const HASTE: Duration = Duration::from_millis(200);
/// Pause between the segments of a flood that goes on.
const PACE: Duration = Duration::from_micros(200);
/// Pause between connections.
const RETRY_DELAY: Duration = Duration::from_millis(16);

/// Begins connections that get no answer, since the pod is mute.
pub(super) fn begin_connects(to: &[SocketAddr], count: u32) -> io::Result<Got> {
    allow_files(count)?;
    // As many ports as there are: each connection to the agent has one of its own.
    fs::write("/proc/sys/net/ipv4/ip_local_port_range", "1024 65535")?;
    // None gives up before all are under way.
    fs::write("/proc/sys/net/ipv4/tcp_syn_retries", "20")?;
    let mut held: Vec<OwnedFd> = Vec::new();
    for (_, to) in (0..count).zip(to.iter().cycle()) {
        let socket = socket::tcp(*to)?;
        ioctl_fionbio(&socket, true)?;
        if connect(&socket, to) == Err(Errno::INPROGRESS) {
            held.push(socket);
        }
    }
    stay()?;
    Ok(Got { number: held.len().try_into().ok(), ..Got::default() })
}

/// Computes nothing, in so many threads that end with this process.
pub(super) fn burn_cpu(threads: usize) -> io::Result<()> {
    for _ in 0..threads {
        thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    stay()
}

/// Opens connections, and says this again and again on each.
pub(super) fn hold_connections(to: SocketAddr, count: u32, saying: &str) -> io::Result<Got> {
    allow_files(count)?;
    let held: Vec<_> = (0..count).filter_map(|_| TcpStream::connect_timeout(&to, HASTE).ok()).collect();
    repeat(|| {
        for mut stream in &held {
            // One that the other side has closed is counted in the end.
            let _ = stream.write_all(saying.as_bytes());
        }
        thread::sleep(HASTE);
        Ok(())
    })?;
    let open = held.iter().filter(|stream| is_open(stream)).count();
    Ok(Got { said: format!("{} connected, {open} of them still open", held.len()), ..Got::default() })
}

/// Opens connections, and holds so many of them: the oldest gives way. Stays when it has half.
pub(super) fn churn_connections(to: SocketAddr, count: u32) -> io::Result<Got> {
    allow_files(count)?;
    let (mut held, mut opened) = (VecDeque::new(), 0);
    let mut open = || {
        if let Ok(stream) = TcpStream::connect_timeout(&to, HASTE) {
            held.push_back(stream);
            opened += 1;
        }
        if held.len() > count as usize {
            held.pop_front();
        }
        // An emulated machine's processor is left to the agent: files and the queue are to be used up, not that.
        thread::sleep(RETRY_DELAY);
    };
    (0..count / 2).for_each(|_| open());
    repeat(|| {
        open();
        Ok(())
    })?;
    Ok(Got { number: Some(opened), ..Got::default() })
}

/// Begins handshakes by hand, and goes on when all were begun.
pub(super) fn handshakes(forger: &Forger, count: u32) -> io::Result<Got> {
    let begin = |number: u32| {
        let port = u16::try_from(1024 + number % 60_000).unwrap_or(1024);
        forger.begin(port, Some(u64::from(number)))
    };
    (0..count).try_for_each(begin)?;
    let mut number = count;
    repeat(|| {
        begin(number)?;
        number += 1;
        thread::sleep(PACE);
        Ok(())
    })?;
    Ok(Got { said: format!("{number} handshakes begun"), ..Got::default() })
}

/// Whether the other side has not hung up, whatever it has said.
fn is_open(mut stream: &TcpStream) -> bool {
    let said = stream.set_nonblocking(true).and_then(|()| io::copy(&mut stream, &mut io::sink()));
    matches!(said, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
}

fn allow_files(count: u32) -> io::Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let wanted = u64::from(count) + 100;
    if current.is_some_and(|current| current < wanted) {
        let maximum = maximum.map(|maximum| maximum.max(wanted));
        setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum })?;
    }
    Ok(())
}
