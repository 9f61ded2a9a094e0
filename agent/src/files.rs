//! Directories that are podgate's alone, and files that may be gone already.
//!
//! Owns who may have made a directory, and which errors of a removal are none; never what is in the files.

use std::{
    fs::{self, DirBuilder, Permissions},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    path::Path,
};

/// Nobody but the owner.
const PRIVATE: u32 = 0o700;
/// Everybody else.
const OTHERS: u32 = 0o077;

/// Makes a directory of podgate's own user with mode 0700, or finds one.
///
/// # Errors
/// When something else is there: whoever has made it, or may write in it, could put anything in podgate's place.
pub(crate) fn private_directory(path: &Path) -> io::Result<()> {
    if own_directory(path)? & OTHERS != 0 {
        return Err(io::Error::other(format!(
            "{} must have mode 0700: close it or remove it",
            path.display()
        )));
    }
    Ok(())
}

/// The same, and one that is open to others is closed: the kubelet makes the directory of a `hostPath` readable for all.
pub(crate) fn closed_directory(path: &Path) -> io::Result<()> {
    if own_directory(path)? & 0o777 == PRIVATE {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(PRIVATE))
}

/// Removes a file or an empty directory. What somebody else has removed is fine.
pub(crate) fn remove_if_present(path: &Path) -> io::Result<()> {
    if_present(if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) }).map(drop)
}

/// The result of what needs a file; `None` where it is not there.
pub(crate) fn if_present<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// Makes a directory, or finds one of podgate's own user; its mode.
fn own_directory(path: &Path) -> io::Result<u32> {
    DirBuilder::new().recursive(true).mode(PRIVATE).create(path)?;
    let metadata = fs::symlink_metadata(path)?;
    if !metadata.is_dir() || metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other(format!(
            "{} must be a directory of podgate's own user with mode 0700: remove it",
            path.display()
        )));
    }
    Ok(metadata.mode())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_private_directory_is_made_with_its_parents() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        private_directory(&path).unwrap();
        private_directory(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
    }

    #[test]
    fn an_open_directory_is_refused_or_closed() {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), Permissions::from_mode(0o755)).unwrap();
        let refusal = private_directory(root.path()).unwrap_err().to_string();
        assert!(
            refusal.contains("0700") && refusal.contains(&root.path().display().to_string()),
            "{refusal}"
        );
        closed_directory(root.path()).unwrap();
        assert_eq!(mode(root.path()), 0o700);
    }

    #[test]
    fn a_link_to_a_directory_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let link = root.path().join("link");
        std::os::unix::fs::symlink(root.path(), &link).unwrap();
        private_directory(&link).unwrap_err();
        closed_directory(&link).unwrap_err();
    }

    #[test]
    fn what_is_not_there_is_removed_already() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file");
        fs::write(&path, "").unwrap();
        remove_if_present(&path).unwrap();
        remove_if_present(&path).unwrap();
        assert!(remove_if_present(root.path()).is_ok() && !root.path().exists(), "it is empty");
    }
}
