//! Two socket options that neither rustix nor nix has.
#![expect(unsafe_code, reason = "getsockopt and setsockopt")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

/// Keeps the SYN of a connection until it is accepted.
pub(crate) fn save_syn(listener: impl AsFd) {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open, the value is as large as said.
    let result = unsafe {
        libc::setsockopt(
            listener.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_SAVE_SYN,
            (&raw const on).cast(),
            size_of_val(&on).try_into().unwrap(),
        )
    };
    assert_eq!(result, 0, "TCP_SAVE_SYN: {}", io::Error::last_os_error());
}

/// The number of the socket's network namespace.
pub(crate) fn netns_cookie(socket: impl AsFd) -> u64 {
    let mut cookie = 0_u64;
    let mut length = size_of_val(&cookie).try_into().unwrap();
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
    assert_eq!(result, 0, "SO_NETNS_COOKIE: {}", io::Error::last_os_error());
    cookie
}
