//! Socket options that neither rustix nor nix has.
#![expect(unsafe_code, reason = "setsockopt")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

/// Puts the SYN of a later `connect` off until there is data to send with it.
pub(crate) fn set_fastopen_connect(socket: impl AsFd) {
    set(socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, &1_i32);
}

/// Lets `socket` see only the segments that the classic BPF `program` accepts. It begins at the TCP header.
pub(crate) fn attach_filter(socket: impl AsFd, program: &mut [libc::sock_filter]) {
    let program = libc::sock_fprog { len: program.len().try_into().unwrap(), filter: program.as_mut_ptr() };
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program);
}

/// Lets `socket` see everything again.
pub(crate) fn detach_filter(socket: impl AsFd) {
    set(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, &0_i32);
}

fn set<T>(socket: impl AsFd, level: i32, option: i32, value: &T) {
    // SAFETY: the descriptor is open, the value is as large as said, and what it points to outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(value).cast(),
            size_of::<T>().try_into().unwrap(),
        )
    };
    assert_eq!(result, 0, "socket option {option}: {}", io::Error::last_os_error());
}
