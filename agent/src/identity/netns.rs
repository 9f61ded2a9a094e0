//! The cookie of a network namespace: the number by which the eBPF programs know it.
//!
//! Owns the socket option and the thread that enters another namespace to read it; never changes a namespace.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

/// The cookie of this thread's network namespace.
pub fn own_cookie() -> io::Result<u64> {
    cookie(socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// The cookie of a namespace that is open as a file, such as `/proc/PID/ns/net`. A thread enters it and exits.
pub fn cookie_of(namespace: File) -> io::Result<u64> {
    let thread = std::thread::Builder::new().name("netns".to_owned()).spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        own_cookie()
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
}

/// The cookie of the network namespace that a socket was made in. `SO_NETNS_COOKIE`, Linux 5.14:
/// <https://github.com/torvalds/linux/commit/e8b9eab99232c4e62ada9d7976c80fd5e8118289>
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
