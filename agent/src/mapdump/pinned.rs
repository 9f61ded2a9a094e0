//! The pins of podgate's maps, and one map as the kernel tells of it.
//!
//! Owns where the pins are, which of them are maps, and what of a map is secret; never prints.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use agent_common::abi::{ABI_VERSION, PIN_DIRECTORY, SHARED_DIRECTORY, map};

use super::{
    Error,
    btf::Btf,
    sys::{self, Map, MapInfo},
    value,
};

/// Maps whose keys are secret: who has a live ticket can be taken for somebody else.
const SECRET_KEYS: [&str; 1] = [map::TICKETS];
/// Maps whose values are secret as a whole.
const SECRET_VALUES: [&str; 1] = [map::IMDS_KEY];
/// Members that are secret, of whatever type they are a part.
const SECRET_MEMBERS: [&str; 1] = ["ticket"];

/// The directory with the pins.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    /// The pins of its ABI, and of all ABIs, by name.
    pins: BTreeMap<String, PathBuf>,
}

/// One map, open for reading.
#[derive(Debug)]
pub(super) struct Pinned {
    map: Map,
    /// Its pin's.
    pub(super) name: String,
    /// Bytes that it takes in the kernel.
    pub(super) memlock: Option<String>,
    /// Whether user space can write to it no more.
    pub(super) frozen: bool,
}

/// What a map's keys and values look like.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) types: Option<Types>,
    /// By byte.
    pub(super) key_secret: Vec<bool>,
    pub(super) value_secret: Vec<bool>,
}

/// The types of keys and values. `key` is 0 where keys have none.
#[derive(Debug)]
pub(super) struct Types {
    pub(super) btf: Btf,
    pub(super) key: u32,
    pub(super) value: u32,
}

// === impl Directory ===

impl Directory {
    /// Looks what is pinned below the mount of bpffs, by an agent with this program's kernel interface.
    pub(super) fn open(bpffs: &Path) -> Result<Self, Error> {
        let path = bpffs.join(PIN_DIRECTORY).join(format!("v{ABI_VERSION}/maps"));
        let shared = bpffs.join(PIN_DIRECTORY).join(SHARED_DIRECTORY).join("maps");
        let mut pins = BTreeMap::new();
        for directory in [&path, &shared] {
            let names = names(directory).map_err(|source| match source.kind() {
                io::ErrorKind::NotFound => Error::NothingPinned { path: directory.clone() },
                _ => Error::Directory { path: directory.clone(), source },
            })?;
            pins.extend(names.into_iter().map(|name| (name.clone(), directory.join(name))));
        }
        Ok(Self { path, pins })
    }

    /// The map that is pinned under that name.
    pub(super) fn map(&self, name: &str) -> Result<Pinned, Error> {
        // Only what is listed: a name with a slash in it would lead elsewhere.
        let Some(path) = self.pins.get(name).cloned() else {
            let names: Vec<_> = self.pins.keys().map(String::as_str).collect();
            let (directory, names) = (self.path.clone(), names.join(", "));
            return Err(Error::UnknownMap { name: name.to_owned(), directory, names });
        };
        Pinned::open(&path, name).map_err(|source| Error::Open { path, source })
    }

    /// Every map, in the order in which the kernel made them.
    pub(super) fn maps(&self) -> Result<Vec<Pinned>, Error> {
        let mut maps = self.pins.keys().map(|name| self.map(name)).collect::<Result<Vec<_>, _>>()?;
        maps.sort_by_key(|map| map.info().id);
        Ok(maps)
    }
}

// === impl Pinned ===

impl Pinned {
    fn open(path: &Path, name: &str) -> io::Result<Self> {
        let map = Map::open(path)?;
        let memlock = map.fdinfo("memlock")?;
        let frozen = map.fdinfo("frozen")?.is_some_and(|frozen| frozen != "0");
        Ok(Self { map, name: name.to_owned(), memlock, frozen })
    }

    pub(super) fn info(&self) -> &MapInfo {
        self.map.info()
    }

    /// Whether an entry has one value for each processor.
    pub(super) fn is_per_cpu(&self) -> bool {
        self.map.is_per_cpu()
    }

    /// Every key at this moment; an error where the kernel lists none of this kind of map.
    pub(super) fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        self.map.keys()
    }

    /// The values at `key`; `None` where it has gone.
    pub(super) fn values(&self, key: &[u8]) -> io::Result<Option<Vec<Vec<u8>>>> {
        self.map.values(key)
    }

    /// Fetches the map's type information from the kernel.
    pub(super) fn layout(&self) -> Result<Layout, Error> {
        let info = self.info();
        // By the kernel's name: that of the pin can be changed.
        let is_one_of = |names: &[&str]| names.contains(&info.name().as_str());
        let has_types = info.btf_id != 0 && info.btf_value_type_id != 0;
        // Where members cannot be told apart, all of them are as secret as the key.
        let is_secret = is_one_of(&SECRET_VALUES) || !has_types && is_one_of(&SECRET_KEYS);
        let mut layout = Layout {
            types: None,
            key_secret: vec![is_one_of(&SECRET_KEYS); info.key_size as usize],
            value_secret: vec![is_secret; info.value_size as usize],
        };
        if !has_types {
            return Ok(layout);
        }
        let data = sys::btf(info.btf_id).map_err(|source| Error::Types { map: self.name.clone(), source })?;
        let btf = Btf::parse(&data).ok_or_else(|| Error::OddTypes { map: self.name.clone() })?;
        value::mark(&btf, info.btf_key_type_id, &SECRET_MEMBERS, &mut layout.key_secret);
        value::mark(&btf, info.btf_value_type_id, &SECRET_MEMBERS, &mut layout.value_secret);
        layout.types = Some(Types { btf, key: info.btf_key_type_id, value: info.btf_value_type_id });
        Ok(layout)
    }
}

/// What is in the directory, sorted.
fn names(path: &Path) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(path)?;
    let mut names = entries
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}
