//! The shared libraries of programs: the virtual machine runs the programs of this machine, and has nothing installed.
//!
//! Owns finding them; asks the dynamic loader, by way of `ldd`.

use std::{
    collections::BTreeSet,
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

use crate::cmd;

/// How ELF files begin.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Where the type is in an ELF header.
const E_TYPE: usize = 16;
/// The types of programs, `ET_EXEC` and `ET_DYN`; not that of kernel modules and BPF objects, which are relocatable.
const PROGRAMS: [[u8; 2]; 2] = [2_u16.to_le_bytes(), 3_u16.to_le_bytes()];

/// What the programs among `files` need, each where the loader looks for it.
pub(super) fn of(files: &[&Path]) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut libraries = BTreeSet::new();
    for file in files {
        if is_program(file)? {
            libraries.extend(paths(&cmd::ask(Command::new("ldd").arg(file))?));
        }
    }
    Ok(libraries)
}

fn is_program(file: &Path) -> anyhow::Result<bool> {
    let mut header = Vec::new();
    let read = File::open(file).and_then(|opened| opened.take(20).read_to_end(&mut header));
    read.with_context(|| format!("cannot read {}", file.display()))?;
    let kind = header.get(E_TYPE..E_TYPE + 2);
    Ok(header.starts_with(&ELF_MAGIC) && PROGRAMS.iter().any(|program| kind == Some(program)))
}

/// The paths in what ldd prints.
fn paths(needed: &str) -> impl Iterator<Item = PathBuf> + use<'_> {
    needed.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_the_output_of_ldd() {
        let needed = "\tlinux-vdso.so.1 (0x00007f86160a0000)\n\
                      \tlibelf.so.1 => /lib/x86_64-linux-gnu/libelf.so.1 (0x00007f8615fee000)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f86160a2000)\n";
        let expected =
            ["/lib/x86_64-linux-gnu/libelf.so.1", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert!(paths(needed).eq(expected));
    }

    #[test]
    fn this_program_has_libraries_and_a_text_has_none() {
        let program = std::env::current_exe().unwrap();
        assert!(!of(&[&program]).unwrap().is_empty());
        let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        assert!(of(&[&text]).unwrap().is_empty());
    }
}
