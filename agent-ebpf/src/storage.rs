//! The origin on a socket: `bpf_sk_storage_get` for both program types.
//!
//! Owns the helper call (aya's wrapper takes a `bpf_sock_addr` only); never interprets an origin. Socket storage: Linux
//! 5.2,
//! <https://github.com/torvalds/linux/commit/6ac99e8f23d4b10258406ca0dd7bffca5f31da9d>.

use core::ptr;

use aya_ebpf::{bindings::BPF_SK_STORAGE_GET_F_CREATE, btf_maps::SkStorage, helpers::bpf_sk_storage_get};

use crate::ctx::Socket;

/// The socket's value, if it has one.
#[inline(always)]
pub(crate) fn get<T>(map: &'static SkStorage<T>, socket: Socket) -> Option<&'static mut T> {
    raw(map, socket, ptr::null(), 0)
}

/// The same, all zero if it had none; `None` when the kernel cannot allocate it.
#[inline(always)]
pub(crate) fn get_or_create<T>(map: &'static SkStorage<T>, socket: Socket) -> Option<&'static mut T> {
    raw(map, socket, ptr::null(), BPF_SK_STORAGE_GET_F_CREATE)
}

/// Puts `initial` on a socket that has no value; `None` when the kernel cannot allocate it.
#[inline(always)]
pub(crate) fn create<T>(map: &'static SkStorage<T>, socket: Socket, initial: &T) -> Option<&'static mut T> {
    raw(map, socket, initial, BPF_SK_STORAGE_GET_F_CREATE)
}

#[inline(always)]
#[expect(
    clippy::mut_from_ref,
    reason = "the map is only a name: what the helper returns belongs to the socket"
)]
fn raw<T>(
    map: &'static SkStorage<T>,
    socket: Socket,
    initial: *const T,
    flags: u32,
) -> Option<&'static mut T> {
    // SAFETY: the map and the socket are what the helper asks for, which the verifier proves. What it returns lives
    // at least as long as the program runs, and only programs that hold the socket's lock write to it.
    unsafe {
        bpf_sk_storage_get(
            ptr::from_ref(map).cast_mut().cast(),
            socket.as_ptr().cast(),
            initial.cast_mut().cast(),
            u64::from(flags),
        )
        .cast::<T>()
        .as_mut()
    }
}
