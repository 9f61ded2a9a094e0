//! Whether this process is root, and what to do where it must be.
//!
//! Owns the question and the hint; never becomes root by itself.

use std::{env, path::PathBuf};

use anyhow::bail;

/// Where root builds: what it made in a person's own directories, that person could neither change nor remove.
const TARGET_DIRECTORY: &str = "/var/cache/podgate";
/// How this machine reaches the network; sudo drops them unless told otherwise.
const NETWORK_VARIABLES: [&str; 8] = [
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "CARGO_HTTP_CAINFO",
];

/// Whether this process may do everything.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Fails unless this is root: cgroups, network namespaces and BPF programs need it.
pub(crate) fn require_root(what: &str) -> anyhow::Result<()> {
    if is_root() {
        return Ok(());
    }
    let arguments: Vec<_> = env::args().skip(1).collect();
    let rustup = env::var_os("RUSTUP_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(env::home_dir()?.join(".rustup")))
        .filter(|home| home.is_dir());
    let network: Vec<_> = NETWORK_VARIABLES.into_iter().filter(|name| env::var_os(name).is_some()).collect();
    bail!(
        "{what} must run as root: to make cgroups and network namespaces, and to load BPF programs. Run it as\n    {}\n\
         Root then builds in {TARGET_DIRECTORY}, and everything here stays yours.",
        sudo(&arguments, rustup, &network)
    )
}

/// The command that does the same as root and leaves nothing of root's in a person's directories.
fn sudo(arguments: &[String], rustup: Option<PathBuf>, network: &[&str]) -> String {
    let mut words = vec!["sudo".to_owned(), "-H".to_owned()];
    if !network.is_empty() {
        words.push(format!("--preserve-env={}", network.join(",")));
    }
    words.extend(["env".to_owned(), r#""PATH=$PATH""#.to_owned()]);
    if let Some(home) = rustup {
        words.push(format!("RUSTUP_HOME={}", home.display()));
    }
    words.extend([format!("CARGO_TARGET_DIR={TARGET_DIRECTORY}"), "cargo xtask".to_owned()]);
    words.extend_from_slice(arguments);
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_told_to_build_in_a_directory_of_its_own() {
        let arguments = ["lab", "up"].map(str::to_owned);
        assert_eq!(
            sudo(&arguments, Some("/home/x/.rustup".into()), &["https_proxy"]),
            "sudo -H --preserve-env=https_proxy env \"PATH=$PATH\" RUSTUP_HOME=/home/x/.rustup \
             CARGO_TARGET_DIR=/var/cache/podgate cargo xtask lab up"
        );
        assert!(sudo(&arguments, None, &[]).starts_with("sudo -H env \"PATH=$PATH\" CARGO_TARGET_DIR="));
    }
}
