//! Sockets that are passed on and connected twice.

use std::{
    fs,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream},
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    thread,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt::DontRoute};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, bind, connect, connect_unspec, recvmsg,
    sendmsg, socket_with, sockopt,
};

use super::{TIMEOUT, stay};

pub(super) fn tcp(to: SocketAddr) -> io::Result<OwnedFd> {
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    Ok(socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// Connects a socket that is there already. One with a port of its own ends with a reset, so that the port is free at
/// once.
pub(super) fn connect_to(socket: OwnedFd, from_port: Option<u16>, to: SocketAddr) -> io::Result<TcpStream> {
    if let Some(port) = from_port {
        let any: IpAddr =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_linger(&socket, Some(Duration::ZERO))?;
        bind(&socket, &SocketAddr::new(any, port))?;
    }
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(TIMEOUT))?;
    connect(&socket, &to)?;
    Ok(socket.into())
}

/// Connects, hangs up, and gives the socket away.
pub(super) fn give(path: &Path, to: SocketAddr) -> io::Result<()> {
    let socket = tcp(to)?;
    connect(&socket, &to)?;
    connect_unspec(&socket)?;
    pass_on(socket, path)
}

/// Gives away a socket whose connect has failed before it sent anything: it may use no router, and needs one. On a loopback
/// it needs none: then one that has not tried to connect.
pub(super) fn give_unsent(path: &Path, to: SocketAddr) -> io::Result<()> {
    let socket = tcp(to)?;
    setsockopt(&socket, DontRoute, &true)?;
    if connect(&socket, &to).is_ok() {
        return pass_on(tcp(to)?, path);
    }
    setsockopt(&socket, DontRoute, &false)?;
    pass_on(socket, path)
}

/// Gives a socket to whoever comes to `path`, and stays.
fn pass_on(socket: OwnedFd, path: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    let giver = thread::spawn(move || -> io::Result<()> {
        let (there, _) = listener.accept()?;
        let descriptors = [socket.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut message = SendAncillaryBuffer::new(&mut space);
        message.push(SendAncillaryMessage::ScmRights(&descriptors));
        sendmsg(&there, &[IoSlice::new(b"!")], &mut message, SendFlags::empty())?;
        Ok(())
    });
    stay()?;
    giver.join().map_err(|_| io::Error::other("BUG: the thread that gives the socket has panicked"))??;
    fs::remove_file(path)
}

/// The socket that is given.
pub(super) fn take(path: &Path) -> io::Result<OwnedFd> {
    let here = UnixStream::connect(path)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    recvmsg(&here, &mut [IoSliceMut::new(&mut [0])], &mut message, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = message.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptors.next().ok_or_else(|| io::Error::other("no socket came"))
}
