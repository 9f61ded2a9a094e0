//! Attaching the programs to the cgroups.
//!
//! Owns the order and the cgroups' file descriptors; never touches a map.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use agent_common::abi::program;
use aya::programs::{CgroupAttachMode, CgroupSockAddr, ProgramError, SockOps};

use super::{Error, object::Object};

/// Links allow this mode only on 6.1. It is not exclusive: links of other programs may be there.
const MODE: CgroupAttachMode = CgroupAttachMode::Single;

/// The cgroups that programs are attached to, held open.
#[derive(Debug)]
pub(super) struct Cgroups {
    kubepods: Cgroup,
    agent: Cgroup,
}

#[derive(Debug)]
struct Cgroup {
    path: PathBuf,
    directory: File,
}

// === impl Cgroups ===

impl Cgroups {
    /// Opens both directories.
    pub(super) fn open(kubepods: &Path, agent: &Path) -> Result<Self, Error> {
        Ok(Self { kubepods: Cgroup::open(kubepods)?, agent: Cgroup::open(agent)? })
    }
}

// === impl Cgroup ===

impl Cgroup {
    fn open(path: &Path) -> Result<Self, Error> {
        let directory = File::open(path).map_err(|source| Error::Cgroup { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), directory })
    }
}

/// Attaches every program. What is attached when one fails stays until the object is dropped.
pub(super) fn attach(object: &mut Object, cgroups: &Cgroups) -> Result<(), Error> {
    for name in program::ALL {
        let cgroup = if name == program::PASSIVE { &cgroups.agent } else { &cgroups.kubepods };
        attach_one(object, name, cgroup).map_err(|source| Error::Attach {
            program: name,
            cgroup: cgroup.path.clone(),
            source: source.into(),
        })?;
    }
    Ok(())
}

fn attach_one(object: &mut Object, name: &str, cgroup: &Cgroup) -> Result<(), ProgramError> {
    if let Ok(program) = object.program::<SockOps>(name) {
        program.attach(&cgroup.directory, MODE).map(drop)
    } else {
        object.program::<CgroupSockAddr>(name)?.attach(&cgroup.directory, MODE).map(drop)
    }
}
