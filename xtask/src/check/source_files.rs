//! The Rust sources below a directory.
//!
//! Owns the walk; what is left out, its callers say.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

/// The sources in their order, without the files and directories that are left out.
pub(super) fn source_files(
    directory: &Path,
    is_left_out: &impl Fn(&Path) -> bool,
) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if is_left_out(&path) {
            continue;
        }
        if path.is_dir() {
            found.extend(source_files(&path, is_left_out)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
