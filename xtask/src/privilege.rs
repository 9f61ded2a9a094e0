//! Whether this process is root, and what to do where it must be.
//!
//! Owns the question and the hint; never becomes root by itself.

use anyhow::bail;

/// Whether this process may do everything.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Fails unless this is root: cgroups, network namespaces and BPF programs need it.
pub(crate) fn require_root(what: &str) -> anyhow::Result<()> {
    if !is_root() {
        bail!(
            "{what} must run as root: to make cgroups and network namespaces, and to load BPF programs.\n\
             Run it as `sudo -E env \"PATH=$PATH\" cargo xtask …`"
        );
    }
    Ok(())
}
