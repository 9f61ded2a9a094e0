//! What `bpf(2)` does that aya does not: links that are pinned, found again and given another program.
//!
//! Owns the system calls; never decides which link is whose. Links to network namespaces: Linux 5.8,
//! <https://github.com/torvalds/linux/commit/7f045a49fee04b5662cbdeaf0838f9322ae8c63a>; detaching: 5.9,
//! <https://github.com/torvalds/linux/commit/73b11c2ab072d5b0599d1e12cc126f55ee306daf>. Links to cgroups: 5.7,
//! <https://github.com/torvalds/linux/commit/af6eea57437a830293eab56246b6025cc7d46ee7>, and their update:
//! <https://github.com/torvalds/linux/commit/0c991ebc8c69d29b7fc44db17075c5aa5253e2ab>. Links to netdevs have a page of their
//! own: [`Link::create_tcx_egress`].
#![expect(unsafe_code, reason = "bpf(2) is no safe function")]

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya_obj::generated::{bpf_attach_type, bpf_cmd};

pub(crate) mod retained;

/// A link of a program to a cgroup, a network namespace or a netdev, in the kernel as long as it is open or pinned.
#[derive(Debug)]
pub(crate) struct Link(OwnedFd);

/// `link_create` of `union bpf_attr`.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// `link_create` of `union bpf_attr`, of a link to a netdev.
#[repr(C)]
struct LinkCreateTcx {
    prog_fd: u32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
    relative_fd: u32,
    _pad: u32,
    expected_revision: u64,
}

/// `query` of `union bpf_attr`.
#[repr(C)]
#[expect(clippy::struct_field_names, reason = "the kernel's names")]
struct Query {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    _pad: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// `link_update` of `union bpf_attr`.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// What `BPF_OBJ_PIN` and `BPF_OBJ_GET` take, of `union bpf_attr`.
#[repr(C)]
struct Object {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// `info` of `union bpf_attr`.
#[repr(C)]
#[expect(clippy::struct_field_names, reason = "the kernel's names")]
struct Info {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The beginning of `struct bpf_link_info`, of a link to a cgroup, a network namespace or a netdev.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    link_type: u32,
    id: u32,
    prog_id: u32,
    _pad: u32,
    /// The cgroup's id; or the namespace's inode or the netdev's index in the lower half, and the type of attachment in the
    /// other.
    target: u64,
    _end: u64,
}

/// `BPF_LINK_TYPE_CGROUP`.
const CGROUP: u32 = 3;
/// `BPF_LINK_TYPE_NETNS`.
const NETNS: u32 = 5;
/// `BPF_LINK_TYPE_TCX`.
const TCX: u32 = 11;
/// `BPF_F_BEFORE`: before the program that is named, or where none is, before all.
const BEFORE: u32 = 1 << 3;

// === impl Link ===

impl Link {
    /// Attaches a program to a cgroup or a network namespace, beside those that others have attached.
    pub(crate) fn create(
        program: BorrowedFd<'_>,
        target: impl AsFd,
        attach_type: bpf_attach_type,
    ) -> io::Result<Self> {
        let mut attr = LinkCreate {
            prog_fd: raw(program),
            target_fd: raw(target.as_fd()),
            attach_type: attach_type as u32,
            flags: 0,
        };
        // SAFETY: this command takes such a record.
        let fd = unsafe { bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr)? };
        // SAFETY: the kernel has just made the descriptor, for us alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Attaches a program to what leaves by a netdev, before all others. `EINVAL` where the kernel has no tcx: Linux 6.6,
    /// <https://github.com/torvalds/linux/commit/e420bed025071a623d2720a92bc2245c84757ecb>.
    pub(crate) fn create_tcx_egress(program: BorrowedFd<'_>, netdev: u32) -> io::Result<Self> {
        let mut attr = LinkCreateTcx {
            prog_fd: raw(program),
            target_ifindex: netdev,
            attach_type: bpf_attach_type::BPF_TCX_EGRESS as u32,
            flags: BEFORE,
            relative_fd: 0,
            _pad: 0,
            expected_revision: 0,
        };
        // SAFETY: this command takes such a record.
        let fd = unsafe { bpf(bpf_cmd::BPF_LINK_CREATE, &mut attr)? };
        // SAFETY: the kernel has just made the descriptor, for us alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Opens a pinned one.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let name = name(path)?;
        let mut attr = Object { pathname: name.as_ptr().addr() as u64, bpf_fd: 0, file_flags: 0 };
        // SAFETY: this command takes such a record, and the name outlives the call.
        let fd = unsafe { bpf(bpf_cmd::BPF_OBJ_GET, &mut attr)? };
        // SAFETY: the kernel has just made the descriptor, for us alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Pins it. There must be nothing yet.
    pub(crate) fn pin(&self, path: &Path) -> io::Result<()> {
        let name = name(path)?;
        let mut attr =
            Object { pathname: name.as_ptr().addr() as u64, bpf_fd: raw(self.0.as_fd()), file_flags: 0 };
        // SAFETY: this command takes such a record, and the name outlives the call.
        unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop) }
    }

    /// Puts another program in the place of the link's, at once: there is no moment in which none runs.
    pub(crate) fn replace(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut attr =
            LinkUpdate { link_fd: raw(self.0.as_fd()), new_prog_fd: raw(program), flags: 0, old_prog_fd: 0 };
        // SAFETY: this command takes such a record.
        unsafe { bpf(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop) }
    }

    /// Detaches the program now, whoever else has the link. Removing a pin does so only a while later. What it was attached
    /// to may be gone.
    pub(crate) fn detach(&self) -> io::Result<()> {
        let mut link_fd = raw(self.0.as_fd());
        // SAFETY: this command takes the descriptor alone.
        match unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut link_fd) } {
            Err(error) if error.raw_os_error() != Some(libc::ENOLINK) => Err(error),
            _ => Ok(()),
        }
    }

    /// The id of the program that is attached.
    pub(crate) fn program_id(&self) -> io::Result<u32> {
        self.info().map(|info| info.prog_id)
    }

    /// What it is attached to: a cgroup's id, a network namespace's inode, or a netdev's index; 0 when that is gone.
    pub(crate) fn target(&self) -> io::Result<u64> {
        let info = self.info()?;
        match info.link_type {
            CGROUP => Ok(info.target),
            NETNS | TCX => Ok(info.target & u64::from(u32::MAX)),
            _ => Err(io::Error::other("it is a link of another kind")),
        }
    }

    fn info(&self) -> io::Result<LinkInfo> {
        let mut info = LinkInfo::default();
        let mut attr = Info {
            bpf_fd: raw(self.0.as_fd()),
            info_len: u32::try_from(size_of::<LinkInfo>()).map_err(io::Error::other)?,
            info: (&raw mut info).addr() as u64,
        };
        // SAFETY: this command takes such a record; the kernel writes no more than `info_len` bytes.
        unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr)? };
        Ok(info)
    }
}

/// The id of the program that sees first what leaves by a netdev, of those that are attached by tcx.
pub(crate) fn first_at_tcx_egress(netdev: u32) -> io::Result<Option<u32>> {
    let mut first = 0_u32;
    let mut attr = Query {
        target_ifindex: netdev,
        attach_type: bpf_attach_type::BPF_TCX_EGRESS as u32,
        query_flags: 0,
        attach_flags: 0,
        prog_ids: (&raw mut first).addr() as u64,
        count: 1,
        _pad: 0,
        prog_attach_flags: 0,
        link_ids: 0,
        link_attach_flags: 0,
        revision: 0,
    };
    // SAFETY: this command takes such a record; the kernel writes no more than `count` ids.
    match unsafe { bpf(bpf_cmd::BPF_PROG_QUERY, &mut attr) } {
        // There are more.
        Err(error) if error.raw_os_error() != Some(libc::ENOSPC) => Err(error),
        _ => Ok((first != 0).then_some(first)),
    }
}

/// `bpf(2)`.
///
/// # Safety
/// The record must be what the command takes, and pointers in it must be good for the call.
pub(crate) unsafe fn bpf<T>(command: bpf_cmd, attr: &mut T) -> io::Result<i32> {
    // SAFETY: as the caller says; the kernel takes what is missing of the union for 0.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as u32, &raw mut *attr, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}

fn name(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}
