//! Listeners and accepted connections.
//!
//! Owns the sockets' options, on which the kernel side depends, and the one look-up that tells who dialled.
//! Never reads a byte of a request.

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

use crate::{drain::DrainWatch, intercept::OriginLookup};

/// Connections that wait to be accepted. The kernel caps it at `net.core.somaxconn`, 4096 on Amazon Linux 2023.
const BACKLOG: i32 = 4096;
/// How long a handshake that has begun may take to reach the queue: on the node it takes microseconds.
const HANDSHAKES: Duration = Duration::from_millis(100);
/// What is sent and not read for so long ends its connection, as the EKS Pod Identity Agent's write timeout does after 30 s: a client
/// that asks and never reads would keep it, and a draining agent, forever.
const UNREAD: Duration = Duration::from_secs(10);
/// After an error that lasts, as too many open files.
const RETRY_DELAY: Duration = Duration::from_millis(50);

/// An accepted connection.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub stream: TcpStream,
    /// What the kernel vouches for; none for an anonymous caller.
    pub origin: Option<Origin>,
    /// The address that it came from.
    pub peer: IpAddr,
}

/// Makes a listener whose accepted sockets can carry an origin.
///
/// # Errors
/// When the address cannot be bound, or the kernel refuses an option that identity depends on.
pub fn listen(address: SocketAddr) -> io::Result<StdListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    // Plain TCP: an MPTCP listener has no saved SYN.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    // Accepted sockets inherit it: connections of podgate's keep nobody from listening at every address.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if !holds(Defense::OwnListeners) {
        sockopt::set_socket_reuseport(&socket, true)?;
    }
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    // Accepted sockets inherit it.
    sockopt::set_tcp_user_timeout(&socket, u32::try_from(UNREAD.as_millis()).unwrap_or(u32::MAX))?;
    rustix::net::bind(&socket, &address)?;
    // The ticket is looked for in the SYN; without it every caller would be anonymous.
    set_tcp_option(socket.as_fd(), libc::TCP_SAVE_SYN, 1)?;
    rustix::net::listen(&socket, BACKLOG)?;
    // After `listen`, which switches it on where the sysctl says so: data in a SYN would leave no room for the
    // ticket.
    set_tcp_option(socket.as_fd(), libc::TCP_FASTOPEN, 0)?;
    Ok(StdListener::from(socket))
}

/// Whether somebody in the agent's network listens at this very address; whoever listens at all of them does not count.
///
/// # Errors
/// When the kernel's tables of sockets cannot be read.
pub fn is_listened_at(address: SocketAddr) -> Result<bool, ProcError> {
    let sockets = if address.is_ipv4() { net::tcp()? } else { net::tcp6()? };
    Ok(sockets.iter().any(|socket| socket.state == TcpState::Listen && socket.local_address == address))
}

/// Accepts until `drain` begins, and hands each connection to `serve`: at the end those too whose handshake is under way
/// or that wait in the queue, which closing the listener would reset.
///
/// # Errors
/// When the listener cannot be watched.
pub async fn accept(
    listener: StdListener,
    origins: Arc<dyn OriginLookup>,
    mut drain: DrainWatch,
    serve: impl Fn(Accepted),
) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let mut ended = pin!(async {
        drain.begun().await;
        tokio::time::sleep(HANDSHAKES).await;
    });
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut ended => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                if let Some(accepted) = identify(stream, peer.ip(), &*origins) {
                    serve(accepted);
                }
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                warn!(%error, "cannot accept connections; trying again");
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
    Ok(())
}

/// `None`, and the connection is closed, when the kernel cannot be asked: nobody is taken for anonymous because
/// of a failure.
fn identify(stream: TcpStream, peer: IpAddr, origins: &dyn OriginLookup) -> Option<Accepted> {
    // Small answers to small requests.
    let _ = stream.set_nodelay(true);
    match origins.origin(stream.as_fd()) {
        Ok(origin) => Some(Accepted { stream, origin, peer }),
        Err(error) => {
            error!(%error, "cannot ask the kernel who dialled; the connection is closed");
            None
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
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
