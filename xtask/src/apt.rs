//! Packages of a Debian-like system.
//!
//! Owns saying what will be installed before it is. Never removes or upgrades anything.

use std::process::Command;

use anyhow::Context as _;

use crate::{cmd, privilege};

/// The name of the step that installs packages.
pub(crate) const STEP: &str = "Debian's packages";

/// Whether this system has apt-get and this process may use it.
pub(crate) fn is_usable() -> bool {
    cmd::is_in_path("apt-get") && privilege::is_root()
}

/// Installs packages for `purpose`, unless something would have to be removed for them. The lists are fetched only
/// where they do not know the packages.
pub(crate) fn install(purpose: &str, packages: &[&str]) -> anyhow::Result<()> {
    eprintln!("installing with apt-get, for {purpose}: {}", packages.join(" "));
    install_all(packages)
}

/// The same for packages that were announced.
pub(crate) fn install_all(packages: &[&str]) -> anyhow::Result<()> {
    let possible = || cmd::ask(apt_get("install").arg("--simulate").args(packages));
    if possible().is_err() {
        update()?;
        possible().with_context(|| format!("apt-get cannot install {}", packages.join(" ")))?;
    }
    cmd::run(STEP, apt_get("install").args(packages))
}

/// Whether there is such a package; the lists are fetched where they do not know it.
pub(crate) fn knows(package: &str) -> bool {
    let is_known = || cmd::succeeds(&["apt-cache", "show", "--no-all-versions", package]);
    is_known() || (is_usable() && update().is_ok() && is_known())
}

/// All that a package depends on, as apt-cache prints it.
pub(crate) fn dependencies(package: &str) -> anyhow::Result<String> {
    cmd::ask(Command::new("apt-cache").args(["depends", "--recurse", "--important", package]))
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
