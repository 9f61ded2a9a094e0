//! A socket option that neither rustix nor nix has.
#![expect(unsafe_code, reason = "getsockopt")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

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
