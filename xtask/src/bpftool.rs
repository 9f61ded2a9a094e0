//! bpftool, which the kernel tests compare `podgate maps` with.
//!
//! Owns where it comes from; never runs it on a map.

use std::path::PathBuf;

use anyhow::Context as _;

use crate::{apt, cmd, setup::Need};

/// Its name and Debian's package.
const BPFTOOL: &str = "bpftool";

/// It, if it is missing.
pub(crate) fn missing() -> Option<Need> {
    let is_missing = cmd::find_in_path(BPFTOOL).is_none();
    is_missing.then(|| Need::apt(BPFTOOL, "the tests of `podgate maps`"))
}

/// Installs it where it is missing.
pub(crate) fn install() -> anyhow::Result<()> {
    if cmd::find_in_path(BPFTOOL).is_some() {
        return Ok(());
    }
    if !apt::is_usable() {
        let missing = format!("the kernel tests need {BPFTOOL}: it is in Debian's package {BPFTOOL}");
        return Err(cmd::Missing(missing).into());
    }
    apt::install("the tests of `podgate maps`", &[BPFTOOL])
}

/// Where it is.
pub(crate) fn path() -> anyhow::Result<PathBuf> {
    install()?;
    cmd::find_in_path(BPFTOOL).with_context(|| format!("{BPFTOOL} is not in PATH"))
}
