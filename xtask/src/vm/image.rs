//! Debian's kernel images: fetched as packages and unpacked, never installed.
//!
//! Owns the files below `target/vm`; what is there is not fetched again.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::{apt, cmd};

/// A kernel, unpacked.
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    modules: PathBuf,
}

// === impl Image ===

impl Image {
    /// The file of a module, by its path below the kernel's modules without a suffix; newer ones are compressed.
    pub(super) fn module(&self, name: &str) -> anyhow::Result<PathBuf> {
        let files = ["ko", "ko.xz"].map(|suffix| self.modules.join(format!("{name}.{suffix}")));
        let found = files.into_iter().find(|file| file.is_file());
        found.with_context(|| format!("there is no module {name} in {}", self.modules.display()))
    }
}

/// The image of the kernel that `package` stands for.
pub(super) fn get(package: &str, directory: &Path) -> anyhow::Result<Image> {
    if !cmd::is_in_path("apt-cache") {
        let missing =
            format!("the kernel of Debian's package {package} is fetched with apt, which is not here");
        return Err(cmd::Missing(missing).into());
    }
    let package = match newest(package) {
        Ok(newest) => newest,
        Err(_) if apt::is_usable() => {
            apt::update()?;
            newest(package)?
        }
        Err(error) => return Err(error),
    };
    let unpacked = directory.join(&package);
    if !unpacked.is_dir() {
        fetch(&package, directory, &unpacked)?;
    }
    let version = package.trim_start_matches("linux-image-");
    let kernel = unpacked.join(format!("boot/vmlinuz-{version}"));
    if !kernel.is_file() {
        bail!("the package {package} has no {}", kernel.display());
    }
    Ok(Image { kernel, modules: unpacked.join(format!("lib/modules/{version}/kernel")) })
}

/// Whether the image that `package` stands for is there, as far as the lists know that are there already.
pub(super) fn is_unpacked(package: &str, directory: &Path) -> bool {
    newest(package).is_ok_and(|newest| directory.join(newest).is_dir())
}

/// The image that the package `meta` depends on.
fn newest(meta: &str) -> anyhow::Result<String> {
    let depends = cmd::ask(Command::new("apt-cache").args(["depends", "--important", meta]))?;
    image_among(&depends).with_context(|| {
        format!(
            "apt knows no kernel image of the package {meta}: it is in Debian 12 and its security updates"
        )
    })
}

fn image_among(depends: &str) -> Option<String> {
    let mut packages = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    packages.find(|package| package.starts_with("linux-image-")).map(str::to_owned)
}

fn fetch(package: &str, directory: &Path, unpacked: &Path) -> anyhow::Result<()> {
    // Its name has the version in it: found again in a directory of its own.
    let partial = directory.join(format!("{package}.partial"));
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))?;
    }
    let download = partial.join("download");
    fs::create_dir_all(&download).with_context(|| format!("cannot create {}", download.display()))?;
    let mut get = Command::new("apt-get");
    cmd::run(
        &format!("download of {package}"),
        get.args(["-q", "download", package]).current_dir(&download),
    )?;
    let files: Vec<_> = fs::read_dir(&download)?.collect::<Result<_, _>>()?;
    let [file] = &files[..] else {
        bail!("apt-get has put {} files into {}", files.len(), download.display())
    };
    let contents = partial.join("contents");
    let mut unpack = Command::new("dpkg-deb");
    cmd::run(&format!("contents of {package}"), unpack.arg("--extract").arg(file.path()).arg(&contents))?;
    fs::rename(&contents, unpacked).with_context(|| format!("cannot create {}", unpacked.display()))?;
    fs::remove_dir_all(&partial).with_context(|| format!("cannot remove {}", partial.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_the_package_that_the_other_depends_on() {
        let depends =
            "linux-image-cloud-amd64\n  Depends: linux-base\n  Depends: linux-image-6.1.0-56-cloud-amd64";
        assert_eq!(image_among(depends).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(image_among("linux-image-cloud-amd64"), None);
    }
}
