//! A value that a program retains in the kernel for as long as it is loaded: in a map that no file leads to. Who wants to
//! read it must open the program and the map by their numbers, for which the kernel wants `CAP_SYS_ADMIN`: a pinned map is
//! protected by its file's mode alone.
//!
//! Owns how it is put there and found again; never knows what it is. Maps of a program that it does not use: Linux 5.10,
//! <https://github.com/torvalds/linux/commit/ef15314aa5de955c6afd87d512e8b00f5ac08d06>. Frozen maps: 5.2,
//! <https://github.com/torvalds/linux/commit/87df15de441bd4add7876ef584da8cabdd9a042a>.

use std::{
    error::Error,
    io,
    os::fd::{AsFd as _, BorrowedFd},
};

use aya::{
    Pod,
    maps::{Array, Map, MapData, MapInfo},
    programs::{ProgramInfo, loaded_programs},
};
use aya_obj::generated::{bpf_cmd, bpf_map_type};

use super::{Link, bpf, raw};

/// `prog_bind_map` of `union bpf_attr`.
#[repr(C)]
struct ProgBindMap {
    prog_fd: u32,
    map_fd: u32,
    flags: u32,
}

/// Gives a program a value to retain under this name, of which the kernel knows 15 characters. Nobody can change it.
pub(crate) fn retain<V: Pod>(program: BorrowedFd<'_>, name: &str, value: V) -> io::Result<()> {
    let sizes = [size_of::<u32>(), size_of::<V>()].map(u32::try_from);
    let [Ok(key_size), Ok(value_size)] = sizes else { return Err(io::ErrorKind::InvalidInput.into()) };
    let map_type = bpf_map_type::BPF_MAP_TYPE_ARRAY as u32;
    let map = aya_obj::Map::new_from_params(map_type, key_size, value_size, 1, 0);
    let mut map = Map::Array(MapData::create(map, name, None).map_err(failed)?);
    Array::try_from(&mut map).and_then(|mut array| array.set(0, value, 0)).map_err(failed)?;
    let Map::Array(data) = &map else { return Err(io::ErrorKind::Other.into()) };
    let mut map_fd = raw(data.fd().as_fd());
    // SAFETY: this command takes the descriptor alone.
    unsafe { bpf(bpf_cmd::BPF_MAP_FREEZE, &mut map_fd)? };
    let mut attr = ProgBindMap { prog_fd: raw(program), map_fd, flags: 0 };
    // SAFETY: this command takes such a record.
    unsafe { bpf(bpf_cmd::BPF_PROG_BIND_MAP, &mut attr).map(drop) }
}

/// What a link's program retains under this name, if it does.
pub(crate) fn retained<V: Pod>(link: &Link, name: &str) -> io::Result<Option<V>> {
    for map in program(link.info()?.prog_id)?.map_ids().map_err(failed)?.unwrap_or_default() {
        let info = MapInfo::from_id(map).map_err(failed)?;
        if info.name() == name.as_bytes() {
            let map = MapData::from_id(map).map_err(failed)?;
            let value = Array::try_from(Map::Array(map)).and_then(|array| array.get(&0, 0));
            return value.map(Some).map_err(failed);
        }
    }
    Ok(None)
}

fn program(id: u32) -> io::Result<ProgramInfo> {
    let mut error = io::ErrorKind::NotFound.into();
    for program in loaded_programs() {
        match program {
            Ok(program) if program.id() == id => return Ok(program),
            Ok(_) => {}
            // Perhaps one that has gone meanwhile.
            Err(other) => error = failed(other),
        }
    }
    Err(error)
}

fn failed(error: impl Error + Send + Sync + 'static) -> io::Error {
    io::Error::other(error)
}
