//! A program as Cilium has it at a pod's netdev: it translates a Service by itself, and sends packets on to the uplink past
//! the node's own forwarding.
//!
//! Owns its instructions: no compiler for eBPF is at hand in a test, and the agent's object is no place for it.

use std::{
    ffi::CString,
    io,
    net::Ipv4Addr,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use agent_common::net::IMDS_V4;
use aya::programs::{SchedClassifier, TcAttachType, tc::qdisc_add_clsact};

use super::network::{BEYOND, UPLINK, index};
use crate::kernel_node::netlink;

/// What the program translates into IMDS, and the node's packet filter does not.
pub(super) const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 79);

const PROG_LOAD: libc::c_long = 5;
const OBJ_PIN: libc::c_long = 6;
const SCHED_CLS: u32 = 3;
// Of `include/uapi/linux/bpf.h`.
const STORE_BYTES: i32 = 9;
const L3_CSUM_REPLACE: i32 = 10;
const L4_CSUM_REPLACE: i32 = 11;
const REDIRECT: i32 = 23;
const REDIRECT_NEIGH: i32 = 152;
/// `BPF_F_PSEUDO_HDR`, `BPF_F_MARK_MANGLED_0`, and four bytes.
const UDP_CHECKSUM: i32 = 0x10 | 0x20 | 4;
const ETHERNET: i32 = 14;
const UDP: i32 = 17;

/// How the program sends a packet on.
#[derive(Clone, Copy)]
pub(super) enum Redirect {
    /// `bpf_redirect`, with the neighbor's hardware address.
    Frame,
    /// `bpf_redirect_neigh`: the kernel finds the neighbor.
    Packet,
}

/// `struct bpf_insn`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    value: i32,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

#[repr(C)]
struct ObjPin {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// Attaches it where packets come in by `netdev`, for as long as there is one.
pub(super) fn attach(bpffs: &Path, netdev: &str, redirect: Redirect) {
    let uplink = netlink(async |handle| index(&handle, UPLINK).await);
    let file = bpffs.join(format!("redirect-{}", redirect as u8));
    load(&program(uplink.try_into().unwrap(), redirect), &file).unwrap();
    let mut program = SchedClassifier::from_pin(&file).unwrap();
    // What attaches where the kernel has no tcx.
    qdisc_add_clsact(netdev).unwrap();
    let link = program.attach(netdev, TcAttachType::Ingress).unwrap();
    // Until the netdev goes.
    std::mem::forget(program.take_link(link).unwrap());
}

/// UDP alone, so that neighbors are found as ever; an IPv4 datagram must be to [`SERVICE`].
fn program(uplink: i32, redirect: Redirect) -> Vec<Instruction> {
    let [from, to] = [SERVICE, IMDS_V4].map(|ip| i32::from_ne_bytes(ip.octets()));
    let v6 = [vec![load_byte(ETHERNET + 6)], only_if(UDP)].concat();
    let v4 = [
        only_if(0x0800),
        vec![load_byte(ETHERNET + 9)],
        only_if(UDP),
        vec![context(), set(2, ETHERNET + 26), set(3, from), set(4, to), set(5, UDP_CHECKSUM)],
        vec![call(L4_CSUM_REPLACE)],
        vec![context(), set(2, ETHERNET + 10), set(3, from), set(4, to), set(5, 4)],
        vec![call(L3_CSUM_REPLACE)],
        store(ETHERNET + 16, &to.to_ne_bytes()),
        vec![skip(v6.len())],
    ]
    .concat();
    let send = match redirect {
        Redirect::Frame => {
            [store(0, &BEYOND), vec![set(1, uplink), set(2, 0), call(REDIRECT), exit()]].concat()
        }
        Redirect::Packet => {
            vec![set(1, uplink), set(2, 0), set(3, 0), set(4, 0), call(REDIRECT_NEIGH), exit()]
        }
    };
    // Loads from a packet want the context in the sixth register.
    let keep_context = new(0xbf, 6, 1, 0, 0);
    let load_type = new(0x28, 0, 0, 0, 12);
    let skip_if_v6 = new(0x15, 0, 0, v4.len().try_into().unwrap(), 0x86dd);
    [vec![keep_context, load_type, skip_if_v6], v4, v6, send].concat()
}

const fn new(code: u8, to: u8, from: u8, offset: i16, value: i32) -> Instruction {
    Instruction { code, registers: from << 4 | to, offset, value }
}

/// A byte of the packet, into the register of results.
fn load_byte(offset: i32) -> Instruction {
    new(0x30, 0, 0, 0, offset)
}

/// Leaves the packet alone unless this is the result.
fn only_if(value: i32) -> Vec<Instruction> {
    vec![new(0x15, 0, 0, 2, value), new(0xb7, 0, 0, 0, -1), exit()]
}

/// The context as the first argument.
fn context() -> Instruction {
    new(0xbf, 1, 6, 0, 0)
}

fn set(register: u8, value: i32) -> Instruction {
    new(0xb4, register, 0, 0, value)
}

fn call(helper: i32) -> Instruction {
    new(0x85, 0, 0, 0, helper)
}

fn skip(count: usize) -> Instruction {
    new(0x05, 0, 0, count.try_into().unwrap(), 0)
}

fn exit() -> Instruction {
    new(0x95, 0, 0, 0, 0)
}

/// Writes bytes into the packet, by way of the stack.
fn store(offset: i32, bytes: &[u8]) -> Vec<Instruction> {
    let place = |at: usize| i16::try_from(at).unwrap() - 8;
    let put = |(at, byte): (usize, &u8)| new(0x72, 10, 0, place(at), i32::from(*byte));
    let mut instructions: Vec<_> = bytes.iter().enumerate().map(put).collect();
    let stack = [new(0xbf, 3, 10, 0, 0), new(0x07, 3, 0, 0, -8)];
    instructions.extend([context(), set(2, offset)]);
    instructions.extend(stack);
    instructions.extend([set(4, bytes.len().try_into().unwrap()), set(5, 0), call(STORE_BYTES)]);
    instructions
}

/// Gives a program to the kernel, and to a file of a bpffs.
#[expect(unsafe_code, reason = "aya loads ELF files only")]
fn load(instructions: &[Instruction], file: &Path) -> io::Result<()> {
    let attributes = ProgLoad {
        prog_type: SCHED_CLS,
        insn_cnt: instructions.len().try_into().unwrap(),
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
    };
    let descriptor = bpf(PROG_LOAD, &attributes)?;
    // SAFETY: the kernel has just given it to nobody else.
    let program = unsafe { OwnedFd::from_raw_fd(descriptor.try_into().unwrap()) };
    let path = CString::new(file.as_os_str().as_bytes()).unwrap();
    let bpf_fd = program.as_raw_fd().try_into().unwrap();
    bpf(OBJ_PIN, &ObjPin { pathname: path.as_ptr() as u64, bpf_fd, file_flags: 0 }).map(drop)
}

#[expect(unsafe_code, reason = "a system call that no crate has")]
fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the record and what it refers to live until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
