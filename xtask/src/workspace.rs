//! Where the workspace is, and where what is made of it goes.
//!
//! Owns these two paths and the cargo to use; builds nothing. Imports nothing of xtask: everything else imports it.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// The workspace.
pub(crate) fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// Where cargo and this command put what they make.
pub(crate) fn target_directory() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), |directory| root().join(directory))
}

/// The command that installs a program from crates.io below [`tools`]. Not optimized: it would run for seconds less, and
/// take minutes more to build.
pub(crate) fn cargo_install(package: &str, version: &str) -> Command {
    let mut command = cargo();
    command.args(["install", package, "--version", version, "--locked", "--debug", "--root"]).arg(tools());
    command.env("CARGO_PROFILE_DEV_DEBUG", "false").env("CARGO_PROFILE_DEV_OPT_LEVEL", "0");
    command
}

/// Where programs are that the commands need and install themselves.
pub(crate) fn tools() -> PathBuf {
    target_directory().join("tools")
}

/// The cargo that runs this command, working on the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}
