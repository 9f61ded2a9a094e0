//! podgate's kernel side: what runs when a pod connects, and when the agent accepts.
//!
//! Owns the entry points and their return values; never decides anything itself. `connect` decides whether a connection is
//! redirected and puts its origin on the socket, `limit` counts each pod's tickets, `ticket` sends the ticket with the
//! handshake, `attest` redeems it on the agent's side, `peername` shows the pod its original destination, `egress` drops
//! packets that no connection allows, `fence` those that leave the node for IMDS all the same, `events` reports to the agent. Whatever fails inside a program leaves other
//! destinations alone and refuses podgate's own.
#![no_std]
#![no_main]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]
#![expect(unsafe_code, reason = "symbols for the loader, and the kernel's context is raw pointers")]
#![expect(clippy::inline_always, reason = "structs do not fit BPF's registers, so calls must vanish")]

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock_addr, classifier, sk_lookup, sock_ops},
    programs::{SkBuffContext, SkLookupContext, SockAddrContext, SockOpsContext, TcContext},
};

use crate::ctx::{FrameCtx, SkLookupCtx, SkbCtx, SockAddrCtx, SockOpsCtx};

mod attest;
mod bind;
mod connect;
mod counters;
mod ctx;
mod egress;
mod events;
mod fence;
mod globals;
mod limit;
mod log;
mod lookup;
mod maps;
mod peername;
mod source_pod;
mod storage;
mod target;
mod ticket;

/// What every `sock_ops` program returns; the kernel ignores it for the callbacks used here.
const SOCK_OPS_OK: u32 = 1;

/// The only value that the verifier lets `getpeername` programs return. Linux 5.8:
/// <https://github.com/torvalds/linux/commit/1b66d253610c7f8f257103808a9460223a087469>
const PEERNAME_OK: i32 = 1;

/// `cgroup/bind4` on kubepods.
#[cgroup_sock_addr(bind4)]
fn bind4(ctx: SockAddrContext) -> i32 {
    bind::bind4(&SockAddrCtx::new(ctx)).code()
}

/// `cgroup/bind6` on kubepods.
#[cgroup_sock_addr(bind6)]
fn bind6(ctx: SockAddrContext) -> i32 {
    bind::bind6(&SockAddrCtx::new(ctx)).code()
}

/// `sk_lookup` on the host's network.
#[sk_lookup]
fn lookup(ctx: SkLookupContext) -> u32 {
    lookup::lookup(&SkLookupCtx::new(ctx)).code()
}

/// `cgroup/connect4` on kubepods.
#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    connect::connect4(&SockAddrCtx::new(ctx)).code()
}

/// `cgroup/connect6` on kubepods: IPv6 and v4-mapped addresses.
#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    connect::connect6(&SockAddrCtx::new(ctx)).code()
}

/// `cgroup/getpeername4` on kubepods.
#[cgroup_sock_addr(getpeername4)]
fn getpeername4(ctx: SockAddrContext) -> i32 {
    peername::getpeername4(&SockAddrCtx::new(ctx));
    PEERNAME_OK
}

/// `cgroup/getpeername6` on kubepods.
#[cgroup_sock_addr(getpeername6)]
fn getpeername6(ctx: SockAddrContext) -> i32 {
    peername::getpeername6(&SockAddrCtx::new(ctx));
    PEERNAME_OK
}

/// `sock_ops` on kubepods: sends the ticket.
#[sock_ops]
fn active(ctx: SockOpsContext) -> u32 {
    ticket::active(&SockOpsCtx::new(ctx));
    SOCK_OPS_OK
}

/// `sock_ops` on the agent's cgroup: redeems the ticket.
#[sock_ops]
fn passive(ctx: SockOpsContext) -> u32 {
    attest::passive(&SockOpsCtx::new(ctx));
    SOCK_OPS_OK
}

/// `cgroup_skb/egress` on kubepods, while it is needed.
#[cgroup_skb(egress)]
fn egress(ctx: SkBuffContext) -> i32 {
    egress::egress(&SkbCtx::new(ctx)).code()
}

/// tc egress of the node's netdevs that have an Ethernet header.
#[classifier]
fn fence(ctx: TcContext) -> i32 {
    fence::fence(&FrameCtx::ethernet(ctx)).code()
}

/// tc egress of those that have none.
#[classifier]
fn fence_l3(ctx: TcContext) -> i32 {
    fence::fence(&FrameCtx::ip(ctx)).code()
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
