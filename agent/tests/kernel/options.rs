//! Socket options that neither rustix nor nix has.
#![expect(unsafe_code, reason = "setsockopt")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

use crate::wire::{ACK, SYN};

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

/// A filter that loses segments with no flag but ACK.
pub(crate) fn no_bare_acks() -> [libc::sock_filter; 4] {
    only_if(libc::BPF_JEQ, u32::from(ACK), false)
}

/// A filter that loses segments without SYN.
pub(crate) fn only_syns() -> [libc::sock_filter; 4] {
    only_if(libc::BPF_JSET, u32::from(SYN), true)
}

/// A filter that loses all segments.
pub(crate) fn everything() -> [libc::sock_filter; 4] {
    only_if(libc::BPF_JSET, 0, true)
}

/// A filter that keeps the segments whose flags pass the test, or do not.
fn only_if(test: u32, flags: u32, keep: bool) -> [libc::sock_filter; 4] {
    let op = |code: u32, k, jt, jf| libc::sock_filter { code: code.try_into().unwrap(), jt, jf, k };
    let (jt, jf) = if keep { (0, 1) } else { (1, 0) };
    [
        // The flags are the header's byte 13.
        op(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 13, 0, 0),
        op(libc::BPF_JMP | test | libc::BPF_K, flags, jt, jf),
        op(libc::BPF_RET | libc::BPF_K, u32::MAX, 0, 0),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ]
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
