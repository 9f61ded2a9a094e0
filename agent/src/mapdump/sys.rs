//! `bpf(2)` for maps of which nothing is known but a file.
//!
//! Owns the calls that aya has no safe form of: opening a pin read-only, reading keys and values as bytes, fetching a
//! map's type information. Never creates, writes or deletes anything.
#![expect(unsafe_code, reason = "the kernel reads and fills in memory by address")]

use std::{
    ffi::CString,
    fs,
    io::{self, ErrorKind},
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
    ptr,
};

use aya::util::nr_cpus;
use aya_obj::generated::bpf_cmd;

use crate::bpf::bpf;

/// The descriptor can look up and list, nothing else.
const BPF_F_RDONLY: u32 = 1 << 3;
/// A map's values of this alignment, one for each processor.
const PER_CPU_ALIGNMENT: usize = 8;
/// `BPF_MAP_TYPE_PERCPU_HASH`, `_PERCPU_ARRAY`, `_LRU_PERCPU_HASH`, `_PERCPU_CGROUP_STORAGE`.
const PER_CPU_TYPES: [u32; 4] = [5, 6, 10, 21];

/// A map, open for reading.
#[derive(Debug)]
pub(super) struct Map {
    fd: OwnedFd,
    info: MapInfo,
    cpus: usize,
}

/// What the kernel says of a map: the beginning of `bpf_map_info`, as of Linux 4.18.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct MapInfo {
    /// `BPF_MAP_TYPE_*`.
    pub(super) kind: u32,
    pub(super) id: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) flags: u32,
    name: [u8; 16],
    _ifindex: u32,
    _btf_vmlinux_value_type_id: u32,
    _netns_dev: u64,
    _netns_ino: u64,
    /// 0 where the map has no type information; the two below are types in it.
    pub(super) btf_id: u32,
    pub(super) btf_key_type_id: u32,
    pub(super) btf_value_type_id: u32,
    _pad: u32,
}

/// The beginning of `bpf_btf_info`.
#[repr(C)]
#[derive(Default)]
struct BtfInfo {
    btf: u64,
    btf_size: u32,
    _id: u32,
}

#[repr(C)]
struct ObjGet {
    pathname: u64,
    _bpf_fd: u32,
    file_flags: u32,
}

#[repr(C)]
struct Element {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value_or_next_key: u64,
    _flags: u64,
}

#[repr(C)]
struct InfoByFd {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

#[repr(C)]
struct ById {
    id: u32,
    _next_id: u32,
    _open_flags: u32,
}

// === impl Map ===

impl Map {
    /// Opens what is pinned at `path`; `InvalidInput` where that is no map.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let pathname = CString::new(path.as_os_str().as_bytes())?;
        let mut request =
            ObjGet { pathname: address(pathname.as_ptr()), _bpf_fd: 0, file_flags: BPF_F_RDONLY };
        // SAFETY: `pathname` ends with NUL and outlives the call.
        let fd = unsafe { bpf_fd(bpf_cmd::BPF_OBJ_GET, &mut request) }?;
        // Programs and links can be pinned, too, and have other records.
        let kind = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if !kind.as_os_str().as_bytes().ends_with(b"bpf-map") {
            return Err(io::Error::new(ErrorKind::InvalidInput, "this is no map"));
        }
        let mut info = MapInfo::default();
        // SAFETY: `MapInfo` consists of integers, laid out as the beginning of a map's record.
        unsafe { info_by_fd(&fd, &mut info) }?;
        let cpus = nr_cpus().map_err(|(_, error)| error)?;
        Ok(Self { fd, info, cpus })
    }

    pub(super) fn info(&self) -> &MapInfo {
        &self.info
    }

    /// A line of the descriptor's entry in `/proc`, if there is one of that name.
    pub(super) fn fdinfo(&self, name: &str) -> io::Result<Option<String>> {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd()))?;
        let mut values = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        Ok(values.next().map(str::to_owned))
    }

    /// Whether an entry has one value for each processor.
    pub(super) fn is_per_cpu(&self) -> bool {
        PER_CPU_TYPES.contains(&self.info.kind)
    }

    /// Every key at this moment, in the kernel's order.
    pub(super) fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        // The kernel begins again where a key was deleted while it stood there. Such a walk must end, too.
        for _ in 0..=self.info.max_entries {
            match self.next_key(keys.last().map(Vec::as_slice)) {
                Ok(key) => keys.push(key),
                Err(error) if error.kind() == ErrorKind::NotFound => break,
                Err(error) => return Err(error),
            }
        }
        Ok(keys)
    }

    /// The values at `key`: one, or one for each processor. `None` where there is no such entry any more.
    pub(super) fn values(&self, key: &[u8]) -> io::Result<Option<Vec<Vec<u8>>>> {
        assert_eq!(key.len(), self.key_size(), "BUG: this is another map's key");
        let size = self.info.value_size as usize;
        let (stride, count) =
            if self.is_per_cpu() { (size.next_multiple_of(PER_CPU_ALIGNMENT), self.cpus) } else { (size, 1) };
        let mut buffer = vec![0_u8; stride * count];
        let mut request = self.element(key.as_ptr(), buffer.as_mut_ptr());
        // SAFETY: the kernel reads `key_size` bytes of the key, which it has, and writes `value_size` bytes, or as many
        // for each possible processor, rounded up.
        match unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut request) } {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        }
        Ok(Some((0..count).map(|cpu| buffer[cpu * stride..][..size].to_vec()).collect()))
    }

    fn next_key(&self, key: Option<&[u8]>) -> io::Result<Vec<u8>> {
        let mut next = vec![0_u8; self.key_size()];
        let mut request = self.element(key.map_or(ptr::null(), <[u8]>::as_ptr), next.as_mut_ptr());
        // SAFETY: both keys have the map's `key_size` bytes; the first is absent or came from this very function.
        unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut request) }?;
        Ok(next)
    }

    fn element(&self, key: *const u8, value_or_next_key: *mut u8) -> Element {
        Element {
            map_fd: number(self.fd.as_raw_fd()),
            _pad: 0,
            key: address(key),
            value_or_next_key: address(value_or_next_key),
            _flags: 0,
        }
    }

    fn key_size(&self) -> usize {
        self.info.key_size as usize
    }
}

// === impl MapInfo ===

impl MapInfo {
    /// Its name, which the kernel has cut at 15 bytes.
    pub(super) fn name(&self) -> String {
        let name = self.name.split(|&byte| byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(name).into_owned()
    }
}

/// Type information as the kernel has it. `CAP_SYS_ADMIN`.
pub(super) fn btf(id: u32) -> io::Result<Vec<u8>> {
    let mut request = ById { id, _next_id: 0, _open_flags: 0 };
    // SAFETY: the record has no addresses.
    let fd = unsafe { bpf_fd(bpf_cmd::BPF_BTF_GET_FD_BY_ID, &mut request) }?;
    let mut info = BtfInfo::default();
    // SAFETY: without room for the information the kernel tells its size only.
    unsafe { info_by_fd(&fd, &mut info) }?;
    let mut data = vec![0_u8; info.btf_size as usize];
    info.btf = address(data.as_mut_ptr());
    // SAFETY: there are `btf_size` bytes, and the kernel writes no more. What is loaded never changes.
    unsafe { info_by_fd(&fd, &mut info) }?;
    Ok(data)
}

/// Asks the kernel what `fd` is.
///
/// # Safety
/// `T` is laid out as the beginning of the record for this kind of object, and its addresses are valid.
unsafe fn info_by_fd<T>(fd: &OwnedFd, info: &mut T) -> io::Result<()> {
    let info_len = u32::try_from(size_of::<T>()).map_err(io::Error::other)?;
    let mut request =
        InfoByFd { bpf_fd: number(fd.as_raw_fd()), info_len, info: address(ptr::from_mut(info)) };
    // SAFETY: the kernel fills in `info_len` bytes; the rest is the caller's promise.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut request) }.map(drop)
}

/// A command that gives a new descriptor.
///
/// # Safety
/// As for [`bpf`].
unsafe fn bpf_fd<T>(command: bpf_cmd, request: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, request) }?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn address<T>(pointer: *const T) -> u64 {
    pointer.addr() as u64
}

fn number(fd: RawFd) -> u32 {
    fd.cast_unsigned()
}
