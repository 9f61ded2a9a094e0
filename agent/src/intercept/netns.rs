//! The cookie of a network namespace: the number by which the programs know it.
//!
//! Owns the socket option; never enters a namespace.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// The cookie of this thread's network namespace.
pub fn own_cookie() -> io::Result<u64> {
    cookie(socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// The cookie of the network namespace that a socket was made in. `SO_NETNS_COOKIE`, Linux 5.14.
#[expect(unsafe_code, reason = "neither rustix nor nix has this socket option")]
pub fn cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie)).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, the value is as large as said.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
