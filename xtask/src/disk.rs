//! Room on the disks that builds write to.
//!
//! Owns the measuring and the message. How much a command needs, the caller says.

use std::{
    collections::BTreeMap,
    env,
    fmt::Write as _,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use nix::sys::statvfs::statvfs;

use crate::workspace;

const MIB: u64 = 1 << 20;
/// What compilers and linkers put into the temporary directory while they work.
const TEMPORARY_MIB: u64 = 256;
/// With less than this a disk counts as full: a linker writes its output in larger pieces.
const FULL_MIB: u64 = 64;

/// A directory that is written to, and the disk it is on.
#[derive(Clone, Debug)]
struct Directory {
    path: PathBuf,
    device: u64,
    free_mib: u64,
    needed_mib: u64,
}

/// Fails if there is not enough room for `needed_mib` in the target directory and for temporary files.
pub(crate) fn require(needed_mib: u64) -> anyhow::Result<()> {
    let directories =
        [measure(&workspace::target_directory(), needed_mib)?, measure(&env::temp_dir(), TEMPORARY_MIB)?];
    match shortage(&directories) {
        Some(message) => bail!(message),
        None => Ok(()),
    }
}

/// Free space in the target directory.
pub(crate) fn free_mib() -> anyhow::Result<u64> {
    Ok(measure(&workspace::target_directory(), 0)?.free_mib)
}

/// Why a build may have failed, if that was the disk: a full one kills linkers with signals.
pub(crate) fn explain_failure(log: &str) -> Option<String> {
    let said_so = log.contains("No space left on device") || log.contains("os error 28");
    let directories = [workspace::target_directory(), env::temp_dir()];
    let directories = directories.iter().filter_map(|path| measure(path, FULL_MIB).ok()).collect::<Vec<_>>();
    match shortage(&directories) {
        Some(message) => Some(format!("This is not a fault of the compiler's or the linker's: {message}")),
        None if said_so => {
            Some("A disk was full for a moment: free some space and run this again.".to_owned())
        }
        None => None,
    }
}

/// As people read it: `350 MiB`, `2.5 GiB`.
pub(crate) fn size(mib: u64) -> String {
    if mib < 1024 {
        format!("{mib} MiB")
    } else {
        let tenths = mib * 10 / 1024;
        format!("{}.{} GiB", tenths / 10, tenths % 10)
    }
}

/// The room where a directory is or, as long as it does not exist, will be.
fn measure(path: &Path, needed_mib: u64) -> anyhow::Result<Directory> {
    let existing = path.ancestors().find(|path| path.is_dir()).unwrap_or(Path::new("/"));
    let measured = || -> io::Result<(u64, u64)> {
        let disk = statvfs(existing)?;
        Ok((existing.metadata()?.dev(), disk.blocks_available() * disk.fragment_size() / MIB))
    };
    let (device, free_mib) =
        measured().with_context(|| format!("cannot measure the free space in {}", existing.display()))?;
    Ok(Directory { path: path.to_owned(), device, free_mib, needed_mib })
}

/// What to tell a person if a disk has not enough room for all that is written to it.
fn shortage(directories: &[Directory]) -> Option<String> {
    let mut disks = BTreeMap::<u64, Vec<&Directory>>::new();
    for directory in directories {
        disks.entry(directory.device).or_default().push(directory);
    }
    let mut message = String::new();
    for on_disk in disks.values() {
        let needed = on_disk.iter().map(|directory| directory.needed_mib).sum();
        let free = on_disk.iter().map(|directory| directory.free_mib).min().unwrap_or_default();
        if free < needed {
            let paths: Vec<_> =
                on_disk.iter().map(|directory| directory.path.display().to_string()).collect();
            let _ = writeln!(
                message,
                "not enough disk space in {}: {} needed, {} free.",
                paths.join(" and "),
                size(needed),
                size(free)
            );
        }
    }
    if message.is_empty() {
        return None;
    }
    message.push_str("Free some space, or set CARGO_TARGET_DIR (and TMPDIR) to directories on another disk.");
    Some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(path: &str, device: u64, free_mib: u64, needed_mib: u64) -> Directory {
        Directory { path: path.into(), device, free_mib, needed_mib }
    }

    #[test]
    fn directories_on_one_disk_share_its_room() {
        let on_one = [directory("/w/target", 1, 2100, 2000), directory("/tmp", 1, 2100, 256)];
        let message = shortage(&on_one).unwrap();
        assert!(
            message.starts_with("not enough disk space in /w/target and /tmp: 2.2 GiB needed, 2.0 GiB free."),
            "{message}"
        );
        assert!(message.contains("CARGO_TARGET_DIR"), "{message}");
        let on_two = [directory("/w/target", 1, 2100, 2000), directory("/tmp", 2, 300, 256)];
        assert_eq!(shortage(&on_two), None);
    }

    #[test]
    fn a_small_temporary_directory_is_named() {
        let directories = [directory("/w/target", 1, 9000, 2000), directory("/tmp", 2, 100, 256)];
        let message = shortage(&directories).unwrap();
        assert!(message.contains("in /tmp: 256 MiB needed, 100 MiB free"), "{message}");
        assert!(!message.contains("/w/target"), "{message}");
    }

    #[test]
    fn room_is_measured_where_a_directory_will_be() {
        let parent = tempfile::tempdir().unwrap();
        let found = measure(&parent.path().join("not/yet/there"), 1).unwrap();
        assert_eq!(found.device, parent.path().metadata().unwrap().dev());
    }

    #[test]
    fn a_log_that_names_a_full_disk_is_explained() {
        let hint = explain_failure("error: failed to write: No space left on device (os error 28)").unwrap();
        assert!(hint.contains("space"), "{hint}");
        assert_eq!(explain_failure("error: mismatched types"), None);
    }
}
