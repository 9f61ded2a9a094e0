//! The origin on a socket: `bpf_sk_storage_get` for both program types.
//!
//! Owns the helper call (aya's wrapper takes a `bpf_sock_addr` only); never interprets an origin.

use core::ptr;

use agent_common::origin::Origin;
use aya_ebpf::{bindings::BPF_SK_STORAGE_GET_F_CREATE, btf_maps::SkStorage, helpers::bpf_sk_storage_get};

use crate::ctx::Socket;

/// The socket's origin, if it has one.
#[inline(always)]
pub(crate) fn get(map: &'static SkStorage<Origin>, socket: Socket) -> Option<&'static mut Origin> {
    raw(map, socket, ptr::null(), 0)
}

/// The socket's origin, all zero if it had none; `None` when the kernel cannot allocate it.
#[inline(always)]
pub(crate) fn get_or_create(map: &'static SkStorage<Origin>, socket: Socket) -> Option<&'static mut Origin> {
    raw(map, socket, ptr::null(), BPF_SK_STORAGE_GET_F_CREATE)
}

/// Puts `origin` on a socket that has none; `None` when the kernel cannot allocate it.
#[inline(always)]
pub(crate) fn create(
    map: &'static SkStorage<Origin>,
    socket: Socket,
    origin: &Origin,
) -> Option<&'static mut Origin> {
    raw(map, socket, origin, BPF_SK_STORAGE_GET_F_CREATE)
}

#[inline(always)]
#[expect(
    clippy::mut_from_ref,
    reason = "the map is but a name: what the helper returns belongs to the socket"
)]
fn raw(
    map: &'static SkStorage<Origin>,
    socket: Socket,
    initial: *const Origin,
    flags: u32,
) -> Option<&'static mut Origin> {
    // SAFETY: the map and the socket are what the helper asks for, which the verifier proves. What it returns lives
    // at least as long as the program runs, and only programs that hold the socket's lock write to it.
    unsafe {
        bpf_sk_storage_get(
            ptr::from_ref(map).cast_mut().cast(),
            socket.as_ptr().cast(),
            initial.cast_mut().cast(),
            u64::from(flags),
        )
        .cast::<Origin>()
        .as_mut()
    }
}
