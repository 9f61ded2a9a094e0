//! Listeners in a pod's own network: connections for podgate never leave the pod, so that no policy, proxy, VPN or
//! translation on the node stands in their way.
//!
//! Owns where on the loopback they are, and the proof that they answer. All of it for a thread that is in that network;
//! `identity::netns` brings one there.

use std::{
    collections::hash_map::RandomState,
    fs,
    hash::BuildHasher as _,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    ops::RangeInclusive,
    time::Duration,
};

use nix::ifaddrs::getifaddrs;
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, connect, socket_with},
};
use tokio::time::timeout;

use super::listen;

/// Where the kernel chooses no port of its own by default: `net.ipv4.ip_local_port_range` ends at 60999.
const PORTS: RangeInclusive<u16> = 61_000..=u16::MAX;
/// How many ports are tried before the pod does without.
const ATTEMPTS: usize = 64;
/// A connection on a loopback takes microseconds.
const PROBE_TIMEOUT: Duration = Duration::from_millis(200);

/// The listeners of one network. Dropped, they are closed.
#[derive(Debug)]
pub struct PodSockets {
    /// At 127.0.0.1.
    pub v4: Option<TcpListener>,
    /// At `::1`.
    pub v6: Option<TcpListener>,
    /// The port of both.
    pub port: u16,
}

// === impl PodSockets ===

impl PodSockets {
    /// Listens on the loopback of this thread's network: at a random port that the kernel gives to nobody by itself, that is
    /// none of `avoided`, and that is free.
    ///
    /// # Errors
    /// When no port is found, or there is no loopback of either family.
    pub fn listen(avoided: &[u16]) -> io::Result<Self> {
        let candidates = candidates(&local_port_range()?, avoided);
        let start = usize::try_from(RandomState::new().hash_one(0) % (1 << 16)).unwrap_or(0);
        let mut failed = io::Error::from(io::ErrorKind::AddrInUse);
        for attempt in 0..ATTEMPTS.min(candidates.len()) {
            let Some(&port) = candidates.get((start + attempt) % candidates.len()) else { break };
            match Self::listen_at(port) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => failed = error,
                listening => return listening,
            }
        }
        Err(failed)
    }

    fn listen_at(port: u16) -> io::Result<Self> {
        let v4 = unless_absent(listen((Ipv4Addr::LOCALHOST, port).into()))?;
        let v6 = unless_absent(listen((Ipv6Addr::LOCALHOST, port).into()))?;
        if v4.is_none() && v6.is_none() {
            Err(io::ErrorKind::AddrNotAvailable.into())
        } else {
            Ok(Self { v4, v6, port })
        }
    }

    /// The sockets.
    pub fn iter(&self) -> impl Iterator<Item = &TcpListener> {
        self.v4.iter().chain(&self.v6)
    }

    /// Where they listen.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let v4 = self.v4.iter().map(|_| IpAddr::V4(Ipv4Addr::LOCALHOST));
        let v6 = self.v6.iter().map(|_| IpAddr::V6(Ipv6Addr::LOCALHOST));
        v4.chain(v6).map(|address| SocketAddr::new(address, self.port)).collect()
    }
}

/// Begins to connect to listeners on this thread's own loopback, as the pod does.
///
/// # Errors
/// When a connection cannot even begin.
pub fn begin_probe(listeners: &[SocketAddr]) -> io::Result<Vec<TcpStream>> {
    listeners.iter().copied().map(begin).collect()
}

fn begin(address: SocketAddr) -> io::Result<TcpStream> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, None)?;
    match connect(&socket, &address) {
        Err(Errno::INPROGRESS) | Ok(()) => Ok(socket.into()),
        Err(error) => Err(error.into()),
    }
}

/// Waits until the listeners have answered; in whatever network this thread is. Needs a tokio runtime.
///
/// # Errors
/// When nothing answers: the loopback is down, or rules of the pod's own drop or divert what is sent there.
pub async fn finish_probe(probes: Vec<TcpStream>) -> io::Result<()> {
    for probe in probes {
        let probe = tokio::net::TcpStream::from_std(probe)?;
        timeout(PROBE_TIMEOUT, probe.writable()).await.map_err(|_| io::ErrorKind::TimedOut)??;
        if let Some(error) = probe.take_error()? {
            return Err(error);
        }
    }
    Ok(())
}

/// The addresses of this thread's network.
///
/// # Errors
/// When the kernel does not list them.
pub fn addresses() -> io::Result<Vec<IpAddr>> {
    let all = getifaddrs()?.filter_map(|interface| interface.address);
    let ips = all.filter_map(|address| {
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    });
    Ok(ips.collect())
}

/// `None` where the family or its loopback address is missing: `disable_ipv6`, or 127.0.0.1 was removed.
fn unless_absent(listening: io::Result<TcpListener>) -> io::Result<Option<TcpListener>> {
    match listening {
        Ok(listener) => Ok(Some(listener)),
        Err(error)
            if error.kind() == io::ErrorKind::AddrNotAvailable
                || error.raw_os_error() == Some(libc::EAFNOSUPPORT) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// From which the kernel chooses ports in this thread's network.
fn local_port_range() -> io::Result<RangeInclusive<u16>> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let mut bounds = text.split_whitespace().filter_map(|bound| bound.parse().ok());
    match (bounds.next(), bounds.next()) {
        (Some(low), Some(high)) => Ok(low..=high),
        _ => Err(io::Error::other(format!("ip_local_port_range is {text:?}"))),
    }
}

/// The ports that may be tried. Where the kernel chooses from all of them, one of these is still unlikely to be wanted.
fn candidates(chosen_by_kernel: &RangeInclusive<u16>, avoided: &[u16]) -> Vec<u16> {
    let is_free = |port: &u16| !avoided.contains(port);
    let apart: Vec<_> = PORTS.filter(|port| is_free(port) && !chosen_by_kernel.contains(port)).collect();
    if apart.is_empty() { PORTS.filter(is_free).collect() } else { apart }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_apart_from_those_of_the_kernel_and_the_containers() {
        let found = candidates(&(32_768..=60_999), &[61_000, 61_002]);
        assert_eq!(found.first(), Some(&61_001));
        assert!(!found.contains(&61_002) && found.contains(&65_535));
        let found = candidates(&(1_024..=65_000), &[]);
        assert_eq!(found.first(), Some(&65_001));
        assert_eq!(candidates(&(1_024..=65_535), &[]).len(), PORTS.len());
    }
}
