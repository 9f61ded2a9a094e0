//! Types that podgate's own maps do not have, and a map of them.
#![expect(unsafe_code, reason = "aya loads type information from an object only")]

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    ptr,
};

use aya::maps::{Array, Map, MapData};

/// Bytes of a sample.
const SIZE: usize = 160;

/// Type information in the kernel.
pub(super) struct Btf {
    fd: OwnedFd,
    /// Number of the samples' type, and of keys'.
    samples: u32,
    key: u32,
}

/// Type information in the making.
#[derive(Default)]
struct Builder {
    types: Vec<u32>,
    strings: Vec<u8>,
    count: u32,
}

#[repr(C)]
struct BtfLoad {
    btf: u64,
    log: u64,
    btf_size: u32,
    log_size: u32,
    log_level: u32,
    _pad: u32,
}

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    _unused: [u32; 3],
    name: [u8; 16],
    _ifindex: u32,
    btf_fd: u32,
    btf_key_type_id: u32,
    btf_value_type_id: u32,
}

// === impl Btf ===

impl Btf {
    /// Loads a struct with a member of every type that bpftool prints.
    pub(super) fn load_samples() -> Self {
        let mut builder = Builder { strings: vec![0], ..Builder::default() };
        let (key, samples) = builder.samples();
        let data = builder.finish();
        let mut log = vec![0_u8; 4096];
        let mut request = BtfLoad {
            btf: data.as_ptr().addr() as u64,
            log: log.as_mut_ptr().addr() as u64,
            btf_size: data.len().try_into().unwrap(),
            log_size: log.len().try_into().unwrap(),
            log_level: 1,
            _pad: 0,
        };
        // SAFETY: this command takes such a record; both buffers have the sizes it says.
        let fd = unsafe { bpf(18, &mut request) };
        let fd = fd.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&log)));
        Self { fd, samples, key }
    }

    /// An array of samples.
    pub(super) fn array(&self, name: &str, entries: u32) -> Array<MapData, [u8; SIZE]> {
        let mut request = MapCreate {
            kind: 2,
            key_size: 4,
            value_size: SIZE.try_into().unwrap(),
            max_entries: entries,
            _unused: [0; 3],
            name: [0; 16],
            _ifindex: 0,
            btf_fd: self.fd.as_raw_fd().cast_unsigned(),
            btf_key_type_id: self.key,
            btf_value_type_id: self.samples,
        };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: this command takes such a record.
        let fd = unsafe { bpf(0, &mut request) }.unwrap();
        Map::Array(MapData::from_fd(fd).unwrap()).try_into().unwrap()
    }
}

// === impl Builder ===

impl Builder {
    /// The numbers of the key's type and the samples'. The kernel's `BTF_KIND_*` are the numbers below.
    fn samples(&mut self) -> (u32, u32) {
        let key = self.int("u32", 4, 0, 32);
        let byte = self.int("u8", 1, 0, 8);
        let mut members = Vec::new();
        for (name, size, encoding) in [
            ("u64", 8, 0),
            ("u16", 2, 0),
            ("i64", 8, 1),
            ("i32", 4, 1),
            ("i16", 2, 1),
            ("i8", 1, 1),
            ("bool", 1, 4),
            ("u128", 16, 0),
            ("i128", 16, 1),
            ("letter", 1, 2),
        ] {
            members.push((name, self.int(name, size, encoding, size * 8), size));
        }
        let char = self.int("char", 1, 1, 8);
        for (name, count) in [("text", 15), ("longer", 16)] {
            members.push((name, self.array(char, key, count), count));
        }
        let pairs = self.array(byte, key, 2);
        members.push(("matrix", self.array(pairs, key, 3), 6));
        members.push(("none", self.array(byte, key, 0), 0));
        let words = ["zero", "negative"].map(|name| self.string(name));
        members.push(("small", self.add("choice", 6 << 24 | 2, 1, &[words[0], 0, words[1], u32::MAX]), 1));
        members.push(("choice", self.add("choice4", 6 << 24 | 2, 4, &[words[0], 0, words[1], u32::MAX]), 4));
        let wide = [words[0], 0, 0, words[1], u32::MAX, u32::MAX];
        members.push(("wide", self.add("choice8", 19 << 24 | 2, 8, &wide), 8));
        members.push(("pointer", self.add("", 2 << 24, byte, &[]), 8));
        let constant = self.add("", 10 << 24, key, &[]);
        members.push(("alias", self.add("alias", 8 << 24, constant, &[]), 4));
        let fields = [("low", 3), ("middle", 11), ("high", 2)];
        members.push(("bits", self.bit_fields(key, &fields), 4));
        let either = ["as_number", "as_byte"].map(|name| self.string(name));
        members.push((
            "either",
            self.add("either", 5 << 24 | 2, 4, &[either[0], key, 0, either[1], byte, 0]),
            4,
        ));
        // The kernel wants it aligned, and bpftool prints nothing after it.
        members.push(("padding", self.array(byte, key, 3), 3));
        members.push(("float", self.add("float", 16 << 24, 4, &[]), 4));
        (key, self.structure("sample", &members))
    }

    /// A packed struct of that many bytes.
    fn structure(&mut self, name: &str, members: &[(&str, u32, u32)]) -> u32 {
        let mut offset = 0;
        let mut words = Vec::new();
        for (name, kind, size) in members {
            words.extend([self.string(name), *kind, offset * 8]);
            offset += size;
        }
        let count = u32::try_from(members.len()).unwrap();
        assert!(offset <= SIZE.try_into().unwrap(), "{offset} bytes");
        self.add(name, 4 << 24 | count, SIZE.try_into().unwrap(), &words)
    }

    fn bit_fields(&mut self, kind: u32, fields: &[(&str, u32)]) -> u32 {
        let mut offset = 0;
        let mut words = Vec::new();
        for (name, bits) in fields {
            words.extend([self.string(name), kind, bits << 24 | offset]);
            offset += bits;
        }
        self.add("bits", 1 << 31 | 4 << 24 | u32::try_from(fields.len()).unwrap(), 4, &words)
    }

    fn int(&mut self, name: &str, size: u32, encoding: u32, bits: u32) -> u32 {
        self.add(name, 1 << 24, size, &[encoding << 24 | bits])
    }

    fn array(&mut self, element: u32, index: u32, count: u32) -> u32 {
        self.add("", 3 << 24, 0, &[element, index, count])
    }

    fn add(&mut self, name: &str, info: u32, size_or_type: u32, rest: &[u32]) -> u32 {
        let name = if name.is_empty() { 0 } else { self.string(name) };
        self.types.extend([name, info, size_or_type]);
        self.types.extend(rest);
        self.count += 1;
        self.count
    }

    fn string(&mut self, text: &str) -> u32 {
        let offset = self.strings.len().try_into().unwrap();
        self.strings.extend(text.bytes());
        self.strings.push(0);
        offset
    }

    fn finish(self) -> Vec<u8> {
        let types = u32::try_from(self.types.len() * 4).unwrap();
        let strings = u32::try_from(self.strings.len()).unwrap();
        let mut data = [0x0001_eb9f_u32, 24, 0, types, types, strings].map(u32::to_ne_bytes).concat();
        data.extend(self.types.into_iter().flat_map(u32::to_ne_bytes));
        data.extend(self.strings);
        data
    }
}

/// `bpf(2)`, of commands that give a descriptor.
///
/// # Safety
/// The record must be what the command takes, and addresses in it must be good for the call.
unsafe fn bpf<T>(command: u32, request: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller says.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, ptr::from_mut(request), size_of::<T>()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made the descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd.try_into().map_err(io::Error::other)?) })
}
