//! An initramfs: a cpio archive of the kind `newc`, without compression.
//!
//! Owns the format (the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`); never decides what is
//! in it.

/// The type bits of a mode, `include/uapi/linux/stat.h`.
const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
/// Ends the archive.
const TRAILER: &str = "TRAILER!!!";
/// Names, headers and contents start at multiples of this.
const ALIGNMENT: usize = 4;

/// An archive that grows.
#[derive(Debug, Default)]
pub(crate) struct Initramfs {
    bytes: Vec<u8>,
    entries: u32,
}

// === impl Initramfs ===

impl Initramfs {
    /// Adds an empty directory. Its parent must be there.
    pub(crate) fn directory(&mut self, name: &str) -> anyhow::Result<()> {
        self.entry(name, S_IFDIR | 0o755, &[])
    }

    /// Adds a file that can be read and executed. Its directory must be there.
    pub(crate) fn file(&mut self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        self.entry(name, S_IFREG | 0o755, content)
    }

    /// The whole archive.
    pub(crate) fn finish(mut self) -> anyhow::Result<Vec<u8>> {
        self.entry(TRAILER, 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        self.entries += 1;
        let name_size = u32::try_from(name.len() + 1)?;
        let size = u32::try_from(content.len())?;
        // Magic; then inode, mode, uid, gid, links, mtime, size, the device's numbers twice, name size, checksum.
        self.bytes.extend(b"070701");
        for field in [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.bytes.extend(format!("{field:08x}").into_bytes());
        }
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(content);
        self.align();
        Ok(())
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_trailer_comes_last() {
        let mut initramfs = Initramfs::default();
        initramfs.directory("tmp").unwrap();
        initramfs.file("tmp/odd", b"12345").unwrap();
        let bytes = initramfs.finish().unwrap();

        let text = String::from_utf8(bytes.clone()).unwrap();
        let starts: Vec<_> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(starts.len(), 3);
        assert!(starts.iter().all(|at| at % ALIGNMENT == 0), "{starts:?}");
        // The header is 110 bytes; mode and size are its second and seventh field.
        let field = |entry: usize, index: usize| &text[starts[entry] + 6 + 8 * index..][..8];
        assert_eq!((field(0, 1), field(0, 6)), ("000041ed", "00000000"));
        assert_eq!((field(1, 1), field(1, 6)), ("000081ed", "00000005"));
        assert_eq!(&text[starts[1] + 110..][..8], "tmp/odd\0");
        assert_eq!(&text[starts[1] + 120..][..5], "12345");
        assert_eq!(&text[starts[2] + 110..][..TRAILER.len()], TRAILER);
    }
}
