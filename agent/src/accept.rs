//! Listeners and accepted connections.
//!
//! Owns the socket options that the eBPF programs depend on, and the one lookup of a connection's origin. Never reads a byte
//! of a request.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener as StdListener},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use agent_common::{
    defense::{Defense, holds},
    origin::Origin,
};
use procfs::{
    ProcError,
    net::{self, TcpState},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::net::{TcpListener, TcpStream};
use tracing::{error, warn};

pub mod in_pod;

use crate::{drain::DrainWatch, identity::PodUid, intercept::OriginLookup};

/// Most connections that wait to be accepted. The kernel caps it at `net.core.somaxconn`, 4096 on Amazon Linux 2023.
const BACKLOG: i32 = 4096;
/// How long a handshake in progress may take to reach the accept queue: on the same node it takes microseconds.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_millis(100);
/// A connection is closed when a response stays unacknowledged for this long (the EKS Pod Identity Agent's write timeout is
/// 30 s): a client that never reads would hold it, and a draining agent, forever.
const UNREAD_TIMEOUT: Duration = Duration::from_secs(10);
/// After an error that may last, such as too many open files.
const RETRY_DELAY: Duration = Duration::from_millis(50);

/// An accepted connection.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub stream: TcpStream,
    /// What the kernel attests; `None` for an anonymous caller.
    pub origin: Option<Origin>,
    /// The address that it came from.
    pub peer: IpAddr,
    /// The pod in whose own network it was accepted; `None` on the node's addresses.
    pub in_network_of: Option<PodUid>,
}

/// How the loop of [`accept`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Drained,
    /// Somebody has closed the listener: `ss -K` does so, by who may administer its network.
    Destroyed,
}

/// Creates a listener whose accepted sockets can carry an origin.
///
/// # Errors
/// When the address cannot be bound, or the kernel refuses an option that identity depends on.
pub fn listen(address: SocketAddr) -> io::Result<StdListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    // Plain TCP: an MPTCP listener has no saved SYN, Linux 6.1 answers `EOPNOTSUPP`
    // (<https://github.com/torvalds/linux/blob/v6.1/net/mptcp/sockopt.c>).
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // Inherited by accepted sockets, so that podgate's connections keep no other process from listening on the wildcard.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if !holds(Defense::OwnListeners) {
        sockopt::set_socket_reuseport(&socket, true)?;
    }
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    // Inherited by accepted sockets. Linux 2.6.37:
    // <https://github.com/torvalds/linux/commit/dca43c75e7e545694a9dd6288553f55c53e2a3a3>
    sockopt::set_tcp_user_timeout(&socket, u32::try_from(UNREAD_TIMEOUT.as_millis()).unwrap_or(u32::MAX))?;
    rustix::net::bind(&socket, &address)?;
    // The ticket is in the SYN: without the saved SYN every caller would be anonymous. Linux 4.2:
    // <https://github.com/torvalds/linux/commit/cd8ae85299d54155702a56811b2e035e63064d3d>
    set_tcp_option(socket.as_fd(), libc::TCP_SAVE_SYN, 1)?;
    rustix::net::listen(&socket, BACKLOG)?;
    // After `listen`, which enables it where `net.ipv4.tcp_fastopen` says so (`__inet_listen_sk` in
    // <https://github.com/torvalds/linux/blob/4db102dcb0396a4ccf89b1eac0f4eb3fd167a080/net/ipv4/af_inet.c>): a SYN with data
    // would leave no room for the ticket.
    set_tcp_option(socket.as_fd(), libc::TCP_FASTOPEN, 0)?;
    Ok(StdListener::from(socket))
}

/// Whether a process in the agent's network listens at exactly this address; a wildcard listener does not count.
///
/// # Errors
/// When the kernel's socket tables cannot be read.
pub fn is_listened_at(address: SocketAddr) -> Result<bool, ProcError> {
    let sockets = if address.is_ipv4() { net::tcp()? } else { net::tcp6()? };
    Ok(sockets.iter().any(|socket| socket.state == TcpState::Listen && socket.local_address == address))
}

/// Accepts until `drain` begins, and passes each connection to `serve`. Then it accepts those in the queue and those whose
/// handshake is in progress, too: closing the listener would reset them.
///
/// # Errors
/// When the listener cannot be watched.
pub async fn accept(
    listener: StdListener,
    origins: Arc<dyn OriginLookup>,
    mut drain: DrainWatch,
    serve: impl Fn(Accepted),
) -> io::Result<Ended> {
    let listener = TcpListener::from_std(listener)?;
    let mut drained = pin!(async {
        drain.begun().await;
        tokio::time::sleep(HANDSHAKE_TIMEOUT).await;
    });
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut drained => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                if let Some(accepted) = identify(stream, peer.ip(), &*origins) {
                    serve(accepted);
                }
            }
            Err(error) if concerns_one_connection(&error) => {}
            // It listens no more, and never will.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Ok(Ended::Destroyed),
            Err(error) => {
                warn!(%error, "cannot accept connections; retrying");
                tokio::time::sleep(RETRY_DELAY).await;
            }
        }
    }
    let listener = listener.into_std()?;
    while let Ok((stream, peer)) = listener.accept() {
        stream.set_nonblocking(true)?;
        if let Some(accepted) = identify(TcpStream::from_std(stream)?, peer.ip(), &*origins) {
            serve(accepted);
        }
    }
    Ok(Ended::Drained)
}

/// `None`, and the connection is closed, when the origin cannot be read: a failure must not make a caller anonymous.
fn identify(stream: TcpStream, peer: IpAddr, origins: &dyn OriginLookup) -> Option<Accepted> {
    // Small responses to small requests.
    let _ = stream.set_nodelay(true);
    match origins.origin(stream.as_fd()) {
        Ok(origin) => Some(Accepted { stream, origin, peer, in_network_of: None }),
        Err(error) => {
            error!(%error, "cannot read the origin of a connection; closing it");
            None
        }
    }
}

fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
}

#[expect(unsafe_code, reason = "no crate has these two options")]
fn set_tcp_option(socket: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: both options take an `int`; the pointer and the length are those of `value`, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast(),
            std::mem::size_of_val(&value).try_into().unwrap_or(4),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
