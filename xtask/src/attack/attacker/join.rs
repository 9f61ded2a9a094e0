//! Listening where the agent does, to get what is meant for it.

use std::{
    io::{self, Read as _},
    net::{SocketAddr, TcpListener},
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd},
    time::Duration,
};

use rustix::net::{bind, listen, sockopt};

use super::{socket, stay};

/// Joins the listeners of `at`, and stays; what is sent on the first connection that comes here.
pub(super) fn join(at: SocketAddr) -> io::Result<String> {
    let socket = socket::tcp(at)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    bind(&socket, &at)?;
    listen(&socket, 128)?;
    take_all(socket.as_fd())?;
    stay()?;
    let listener = TcpListener::from(socket);
    listener.set_nonblocking(true)?;
    let (mut stream, _) = listener.accept()?;
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let (mut request, mut buffer) = (Vec::new(), [0; 4096]);
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(length) => request.extend(&buffer[..length]),
        }
    }
    Ok(String::from_utf8_lossy(&request).into_owned())
}

/// Listens at every address, shares the port with nobody, and stays.
pub(super) fn squat(port: u16) -> io::Result<()> {
    let at = SocketAddr::from(([0, 0, 0, 0], port));
    let socket = socket::tcp(at)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &at)?;
    listen(&socket, 128)?;
    stay()
}

/// Replaces the group's program by one that chooses the second listener: the first is the agent's.
#[expect(unsafe_code, reason = "neither rustix nor nix has this option")]
fn take_all(socket: BorrowedFd<'_>) -> io::Result<()> {
    let code = u16::try_from(libc::BPF_RET | libc::BPF_K).unwrap_or_default();
    let mut second = libc::sock_filter { code, jt: 0, jf: 0, k: 1 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut second };
    // SAFETY: the option takes a `sock_fprog`; the pointer and the length are those of `program`, which outlives the
    // call, as does the instruction that it points to.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            size_of_val(&program).try_into().unwrap_or(0),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
