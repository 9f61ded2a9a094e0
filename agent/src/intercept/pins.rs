//! Where the programs and maps stay when the agent is gone: the pins on bpffs.
//!
//! Owns the directories below `podgate` on bpffs, one per ABI; never looks into a map or a link.
//!
//! Whoever reads or writes these files is the node's root: they are protected by file mode alone.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

#[cfg(not(feature = "undefended"))]
use agent_common::abi::ABI_VERSION;
use agent_common::abi::{PIN_DIRECTORY, SHARED_DIRECTORY, map};
use rustix::fs::{FlockOperation, flock};

use super::Error;
use crate::{bpf::Link, files};

/// How long another agent may take to change the pins: less than the age of a heartbeat that the programs allow.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
const LOCK_RETRY_DELAY: Duration = Duration::from_millis(20);
/// The directory of an ABI's links.
pub(super) const LINKS: &str = "links";
/// Beginning of the names of the second fence's links; the netdev's index follows.
pub(super) const FENCE: &str = "fence-";
/// The directory of its maps.
const MAPS: &str = "maps";
/// Maps that agents of all ABIs share: which is active, which pods the programs of none of them touch, and the key of
/// sessions that clients have. Their shape never changes.
const SHARED: [&str; 4] = [map::GENERATION, map::HEARTBEAT, map::EXEMPT, map::IMDS_KEY];

/// This ABI's pins.
#[derive(Debug)]
pub(super) struct Pins {
    root: PathBuf,
    own: PathBuf,
}

/// Nobody else changes the pins as long as this lives.
#[derive(Debug)]
pub(super) struct Lock {
    _directory: File,
}

// === impl Pins ===

impl Pins {
    /// This ABI's, in directories private to root.
    pub(super) fn open(bpffs: &Path) -> Result<Self, Error> {
        let root = bpffs.join(PIN_DIRECTORY);
        #[cfg(not(feature = "undefended"))]
        let abi = ABI_VERSION;
        #[cfg(feature = "undefended")]
        let abi = crate::undefended::abi_version();
        let own = root.join(format!("v{abi}"));
        let pins = Self { root, own };
        pins.make_directories()?;
        Ok(pins)
    }

    /// Makes the directories that are not there: agents of another ABI remove those of this one.
    pub(super) fn make_directories(&self) -> Result<(), Error> {
        let shared = self.root.join(SHARED_DIRECTORY);
        let maps = [self.own.join(MAPS), shared.join(MAPS)];
        for directory in [&self.root, &self.own, &shared, &maps[0], &maps[1], &self.links()] {
            // On bpffs of mode 1777 anybody may have made it.
            files::private_directory(directory)
                .map_err(|source| Error::Pin { path: directory.clone(), source })?;
        }
        Ok(())
    }

    /// Waits until no other agent changes the pins.
    pub(super) fn lock(&self) -> Result<Lock, Error> {
        let failed = |source| Error::Pin { path: self.root.clone(), source };
        let directory = File::open(&self.root).map_err(failed)?;
        let deadline = Instant::now() + LOCK_TIMEOUT;
        while let Err(error) = flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(failed(error.into()));
            }
            if Instant::now() > deadline {
                return Err(Error::Locked { path: self.root.clone() });
            }
            thread::sleep(LOCK_RETRY_DELAY);
        }
        Ok(Lock { _directory: directory })
    }

    /// Where a map is.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        let directory = if is_shared(name) { self.root.join(SHARED_DIRECTORY) } else { self.own.clone() };
        directory.join(MAPS).join(name)
    }

    /// Where the links are.
    pub(super) fn links(&self) -> PathBuf {
        self.own.join(LINKS)
    }

    /// Detaches this program of other ABIs; its pin stays.
    pub(super) fn detach_others(&self, program: &str) -> Result<(), Error> {
        for path in self.others()? {
            let link = path.join(LINKS).join(program);
            let detached = files::if_present(Link::open(&link).and_then(|link| link.detach()));
            detached.map_err(|source| Error::Pin { path: link, source })?;
        }
        Ok(())
    }

    /// Removes what programs of other ABIs have left, and so detaches them.
    pub(super) fn remove_others(&self) -> Result<(), Error> {
        for path in self.others()? {
            // Programs first: none may run alongside this agent's for longer than necessary.
            remove_all(&path.join(LINKS))?;
            files::if_present(fs::remove_dir_all(&path)).map_err(|source| Error::Pin { path, source })?;
        }
        Ok(())
    }

    /// Detaches the programs of all ABIs but for the second fence.
    pub(super) fn remove_links(&self) -> Result<(), Error> {
        let own = self.links();
        let others = self.others()?.into_iter().map(|path| path.join(LINKS));
        for directory in others.chain([own]) {
            let is_other = |link: &&PathBuf| {
                !link.file_name().is_some_and(|name| name.to_string_lossy().starts_with(FENCE))
            };
            let found = children(&directory);
            let removed =
                found.and_then(|links| links.iter().filter(is_other).try_for_each(|link| remove(link)));
            removed.map_err(|source| Error::Pin { path: directory, source })?;
        }
        Ok(())
    }

    /// The directories of other ABIs.
    fn others(&self) -> Result<Vec<PathBuf>, Error> {
        let mut others =
            children(&self.root).map_err(|source| Error::Pin { path: self.root.clone(), source })?;
        others.retain(|path| *path != self.own && !path.ends_with(SHARED_DIRECTORY));
        Ok(others)
    }
}

/// Whether agents of all ABIs have this map together.
pub(super) fn is_shared(map: &str) -> bool {
    SHARED.contains(&map)
}

/// Removes all links of a directory.
fn remove_all(links: &Path) -> Result<(), Error> {
    let removed = children(links).and_then(|links| links.iter().try_for_each(|link| remove(link)));
    removed.map_err(|source| Error::Pin { path: links.to_owned(), source })
}

/// Every pin of every ABI, links first, with the directories they are in, each after what is in it.
pub(super) fn all(bpffs: &Path) -> io::Result<Vec<PathBuf>> {
    let root = bpffs.join(PIN_DIRECTORY);
    let mut found = Vec::new();
    for part in [LINKS, MAPS] {
        for abi in children(&root)? {
            found.extend(children(&abi.join(part))?);
            found.extend(Some(abi.join(part)).filter(|path| path.exists()));
        }
    }
    found.extend(children(&root)?);
    found.extend(Some(root).filter(|path| path.exists()));
    Ok(found)
}

/// Removes what [`all`] has found; a link's program is detached at once. What somebody else has removed is fine.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    if path.parent().is_some_and(|parent| parent.ends_with(LINKS)) {
        files::if_present(Link::open(path).and_then(|link| link.detach()))?;
    }
    files::remove_if_present(path)
}

fn children(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let Some(entries) = files::if_present(fs::read_dir(directory))? else { return Ok(Vec::new()) };
    let mut paths: Vec<_> = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    paths.sort();
    Ok(paths)
}
