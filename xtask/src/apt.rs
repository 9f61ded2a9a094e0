//! Packages of a Debian-like system.
//!
//! Owns saying what will be installed before it is. Never removes or upgrades anything.

use std::process::Command;

use anyhow::Context as _;

use crate::{cmd, privilege};

/// Whether this system has apt-get and this process may use it.
pub(crate) fn is_usable() -> bool {
    cmd::is_in_path("apt-get") && privilege::is_root()
}

/// Installs packages for `purpose`, unless something would have to be removed for them. The lists are fetched only
/// where they do not know the packages.
pub(crate) fn install(purpose: &str, packages: &[&str]) -> anyhow::Result<()> {
    eprintln!("installing with apt-get, for {purpose}: {}", packages.join(" "));
    let possible = || cmd::ask(apt_get("install").arg("--simulate").args(packages));
    if possible().is_err() {
        update()?;
        possible().with_context(|| format!("apt-get cannot install {}", packages.join(" ")))?;
    }
    cmd::run(&packages.join(" "), apt_get("install").args(packages))
}

/// Fetches the package lists.
pub(crate) fn update() -> anyhow::Result<()> {
    cmd::run("package lists", &mut apt_get("update"))
}

fn apt_get(command: &str) -> Command {
    let mut apt_get = Command::new("apt-get");
    apt_get.env("DEBIAN_FRONTEND", "noninteractive").args([command, "-q", "-y"]);
    if command == "install" {
        apt_get.args(["--no-install-recommends", "--no-remove"]);
    }
    apt_get
}
