//! What the pinned maps have in them, for whoever debugs a node: in the formats of `bpftool map`, with the agent up or
//! down.
//!
//! Owns finding the pins, reading keys and values as bytes, and printing them by the type information that the kernel
//! keeps with each map, so that the maps of another podgate read right, too. Never writes to a map, and never prints a
//! secret: a live ticket reads `***`.

use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

use self::pinned::Directory;

mod btf;
mod json;
mod pinned;
mod print;
mod sys;
mod value;

/// How maps are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As bpftool does without options.
    Plain,
    /// As with its `--json`.
    Json,
    /// As with its `--pretty`.
    Pretty,
}

/// Why maps are not printed.
#[derive(Debug, Error)]
pub enum Error {
    /// The directory of the pins is not there.
    #[error(
        "no map of podgate is pinned in {}: podgate has not run on this node, or `podgate detach` has removed what it \
         had; where bpffs is mounted elsewhere, --bpffs says so", path.display()
    )]
    NothingPinned {
        /// The directory.
        path: PathBuf,
    },
    /// The directory of the pins cannot be read.
    #[error("cannot list {}: {source}; only root can", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// There is no map of that name.
    #[error("there is no map {name} in {}; there are: {names}", directory.display())]
    UnknownMap {
        /// What was asked for.
        name: String,
        /// The directory of the pins.
        directory: PathBuf,
        /// What there is.
        names: String,
    },
    /// A pin is no map, or cannot be opened.
    #[error("cannot open the map that is pinned at {}: {source}", path.display())]
    Open {
        /// The pin.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
    /// The kernel does not give the map's type information.
    #[error("cannot get the type information of the map {map}: {source}; it needs CAP_SYS_ADMIN")]
    Types {
        /// Name of the map.
        map: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// The map's type information cannot be read.
    #[error(
        "the type information of the map {map} cannot be read: it is damaged, or newer than this podgate"
    )]
    OddTypes {
        /// Name of the map.
        map: String,
    },
    /// The kernel lists no entries of this kind of map.
    #[error("the kernel does not list the entries of the map {map}, which is a {kind}: {source}")]
    Unlisted {
        /// Name of the map.
        map: String,
        /// Its kind.
        kind: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// What was read cannot be printed.
    #[error("cannot print: {0}")]
    Output(#[from] io::Error),
}

// === impl Error ===

impl Error {
    /// What the process ends with: bpftool's own status where bpftool would refuse as well, else 1.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Unlisted { source, .. } => {
                // It ends with the negative error number, of which the system keeps the lowest byte.
                source.raw_os_error().map_or(1, |number| number.wrapping_neg().to_le_bytes()[0])
            }
            _ => 1,
        }
    }
}

/// Prints what the kernel says of every map that is pinned below `bpffs`: `bpftool map list`, of podgate's maps only.
pub fn list(bpffs: &Path, format: Format, out: impl io::Write) -> Result<(), Error> {
    Ok(print::list(&Directory::open(bpffs)?.maps()?, format, out)?)
}

/// Prints what the kernel says of one map: `bpftool map show`.
pub fn show(bpffs: &Path, name: &str, format: Format, out: impl io::Write) -> Result<(), Error> {
    Ok(print::show(&Directory::open(bpffs)?.map(name)?, format, out)?)
}

/// Prints every entry of a map: `bpftool map dump`. Where the kernel lists no entries this prints, as bpftool does, a
/// map without any, and fails.
pub fn dump(bpffs: &Path, name: &str, format: Format, out: impl io::Write) -> Result<(), Error> {
    print::dump(&Directory::open(bpffs)?.map(name)?, format, out)
}

/// Prints a value by type information that comes with it.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn print_value(types: &[u8], number: u32, data: &[u8], out: impl io::Write) -> io::Result<()> {
    let Some(types) = btf::Btf::parse(types) else { return Ok(()) };
    let mut secret = vec![false; data.len()];
    value::mark(&types, number, &["ticket"], &mut secret);
    let mut json = json::Json::new(out, false);
    let bytes = value::Bytes { data, secret: &secret };
    let printed = value::Printer { btf: &types, json: &mut json, plain: false }.print(number, bytes);
    printed.or_else(value::Stop::io)
}
