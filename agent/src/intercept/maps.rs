//! What every use of a map has in common: its shape, another handle on it, and what an error of the kernel means.
//!
//! Owns which maps are pinned and in which shape; never reads or writes an entry of its own accord.

use std::{fs, os::fd::AsFd as _, path::Path};

use agent_common::{
    abi::{self, EXEMPT_MAX, LISTENERS_MAX, NETDEVS_MAX, POLICIES_MAX, RESERVED_MAX, TICKETS_MAX, map},
    net::Endpoint,
    origin::PendingOrigin,
    pod_listener::PodListener,
    policy::PodPolicy,
    target::Target,
};
use aya::{
    Ebpf, Pod,
    maps::{HashMap, Map, MapData, MapError, MapInfo},
    sys::SyscallError,
};

use super::Error;

/// The maps that outlive the agent, with the sizes of a key and a value, and how many there are.
pub(super) const PINNED: [(&str, usize, usize, u32); 17] = [
    (map::ORIGINS, size_of::<u32>(), size_of::<PendingOrigin>(), 0),
    (map::TICKETS, size_of::<u64>(), size_of::<PendingOrigin>(), TICKETS_MAX),
    (map::POD_TICKETS, size_of::<u64>(), size_of::<u64>(), POLICIES_MAX),
    (map::POLICIES, size_of::<u64>(), size_of::<PodPolicy>(), POLICIES_MAX),
    (map::UNKNOWN_POD, size_of::<u32>(), size_of::<PodPolicy>(), 2),
    (map::QOS_CLASSES, size_of::<u32>(), size_of::<u64>(), 2),
    (map::EXEMPT, size_of::<u64>(), size_of::<u64>(), EXEMPT_MAX),
    (map::TARGETS, size_of::<u32>(), size_of::<Target>(), 2),
    (map::TARGET_INDEX, size_of::<u32>(), size_of::<u32>(), 1),
    (map::GENERATION, size_of::<u32>(), size_of::<u64>(), 1),
    (map::HEARTBEAT, size_of::<u32>(), size_of::<u64>(), 1),
    (map::LISTENERS, size_of::<u32>(), size_of::<u32>(), 2 * LISTENERS_MAX),
    (map::POD_LISTENERS, size_of::<u64>(), size_of::<PodListener>(), POLICIES_MAX),
    (map::RESERVED, size_of::<Endpoint>(), size_of::<u32>(), RESERVED_MAX),
    (map::COUNTERS, size_of::<u32>(), size_of::<u64>(), abi::COUNTERS_MAX),
    (map::NETDEVS, size_of::<u32>(), size_of::<u64>(), NETDEVS_MAX),
    (map::IMDS_KEY, size_of::<u32>(), size_of::<ImdsKey>(), 1),
];

/// The key by which IMDS tokens are made.
pub(super) type ImdsKey = [u8; 32];

/// Checks a map that is pinned already: the kernel would take it for whatever the object says.
pub(super) fn check_shape(
    path: &Path,
    name: &'static str,
    (key, value, entries): (usize, usize, u32),
) -> Result<(), Error> {
    if !fs::exists(path).map_err(|source| Error::Pin { path: path.to_owned(), source })? {
        return Ok(());
    }
    let is_so = |is: u32, wanted: usize| usize::try_from(is) == Ok(wanted);
    let info = MapInfo::from_pin(path).map_err(reading(name))?;
    let fits =
        is_so(info.key_size(), key) && is_so(info.value_size(), value) && info.max_entries() == entries;
    if fits { Ok(()) } else { Err(Error::Shape { path: path.to_owned() }) }
}

/// Whether a map's pin was removed, or is another map's. One that cannot be asked is there: too many open files, which pods may
/// bring about, remove nothing.
pub(super) fn is_removed(path: &Path, id: u32) -> bool {
    match MapInfo::from_pin(path) {
        Ok(pinned) => pinned.id() != id,
        Err(error) => errno(&error) == Some(libc::ENOENT),
    }
}

/// Takes a map out of the object, as the type that the agent expects.
pub(super) fn take<M>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, Error>
where
    M: TryFrom<Map, Error = MapError>,
{
    ebpf.take_map(name).and_then(|map| map.try_into().ok()).ok_or(Error::Mismatch { what: name })
}

/// Removing what is not there has done its work.
pub(super) fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(error) if matches!(errno(&error), Some(libc::ENOENT | libc::EINVAL)) => Ok(()),
        result => result,
    }
}

/// Removes an entry, if it is there.
pub(super) fn remove<K: Pod, V: Pod>(map: &mut HashMap<MapData, K, V>, key: K) -> Result<(), MapError> {
    match map.remove(&key) {
        Err(error) if errno(&error) == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

/// What the kernel says, where it was the kernel.
pub(super) fn errno(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(SyscallError { io_error, .. }) => io_error.raw_os_error(),
        _ => None,
    }
}

pub(super) fn reading(map: &'static str) -> impl FnOnce(MapError) -> Error {
    move |source| Error::Map { action: "reading", map, source: source.into() }
}

pub(super) fn writing(map: &'static str) -> impl FnOnce(MapError) -> Error {
    move |source| Error::Map { action: "writing", map, source: source.into() }
}

/// Another descriptor of a map.
pub(super) fn another(map: &MapData, name: &'static str) -> Result<MapData, Error> {
    let fd = map.fd().as_fd().try_clone_to_owned();
    let fd = fd.map_err(|source| Error::Map { action: "opening", map: name, source: source.into() })?;
    MapData::from_fd(fd).map_err(reading(name))
}
