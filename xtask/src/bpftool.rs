//! bpftool, which the kernel tests compare `podgate maps` with.
//!
//! Owns where it comes from and what it takes along; never runs it on a map.

use std::{path::PathBuf, process::Command};

use anyhow::Context as _;

use crate::{apt, cmd};

/// Its name and Debian's package.
const BPFTOOL: &str = "bpftool";

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

/// The program and the libraries it needs, each where it looks for them.
pub(crate) fn files() -> anyhow::Result<Vec<PathBuf>> {
    install()?;
    let program = cmd::find_in_path(BPFTOOL).with_context(|| format!("{BPFTOOL} is not in PATH"))?;
    let needed = cmd::ask(Command::new("ldd").arg(&program))?;
    let mut files = libraries(&needed);
    files.push(program);
    Ok(files)
}

/// The paths in what ldd prints.
fn libraries(needed: &str) -> Vec<PathBuf> {
    needed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_libraries_are_found_among_what_ldd_prints() {
        let needed = "\tlinux-vdso.so.1 (0x00007f86160a0000)\n\
                      \tlibelf.so.1 => /lib/x86_64-linux-gnu/libelf.so.1 (0x00007f8615fee000)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f86160a2000)\n";
        let paths = ["/lib/x86_64-linux-gnu/libelf.so.1", "/lib64/ld-linux-x86-64.so.2"].map(Path::new);
        assert_eq!(libraries(needed), paths);
    }
}
