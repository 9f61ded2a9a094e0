//! Attaching the programs to the cgroups.
//!
//! Owns the order and the cgroups' file descriptors; never touches a map.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use agent_common::abi::program;
use aya::programs::{
    CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSockAddr, ProgramError, SockOps,
    cgroup_skb::CgroupSkbLinkId,
};

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

/// Attaches the permanent programs. What is attached when one fails stays until the object is dropped.
pub(super) fn attach(object: &mut Object, cgroups: &Cgroups) -> Result<(), Error> {
    for name in program::PERMANENT {
        let cgroup = if name == program::PASSIVE { &cgroups.agent } else { &cgroups.kubepods };
        attach_one(object, name, cgroup).map_err(cannot_attach(name, cgroup))?;
    }
    Ok(())
}

/// Attaches the program on outgoing packets.
pub(super) fn attach_egress(object: &mut Object, cgroups: &Cgroups) -> Result<CgroupSkbLinkId, Error> {
    let cgroup = &cgroups.kubepods;
    let attach =
        |program: &mut CgroupSkb| program.attach(&cgroup.directory, CgroupSkbAttachType::Egress, MODE);
    object.program(program::EGRESS).and_then(attach).map_err(cannot_attach(program::EGRESS, cgroup))
}

/// Detaches it.
pub(super) fn detach_egress(
    object: &mut Object,
    cgroups: &Cgroups,
    link: CgroupSkbLinkId,
) -> Result<(), Error> {
    let detach = |program: &mut CgroupSkb| program.detach(link);
    let detached = object.program(program::EGRESS).and_then(detach);
    detached.map_err(|source| Error::Detach {
        program: program::EGRESS,
        cgroup: cgroups.kubepods.path.clone(),
        source: source.into(),
    })
}

fn attach_one(object: &mut Object, name: &str, cgroup: &Cgroup) -> Result<(), ProgramError> {
    if let Ok(program) = object.program::<SockOps>(name) {
        program.attach(&cgroup.directory, MODE).map(drop)
    } else {
        object.program::<CgroupSockAddr>(name)?.attach(&cgroup.directory, MODE).map(drop)
    }
}

fn cannot_attach(program: &'static str, cgroup: &Cgroup) -> impl FnOnce(ProgramError) -> Error {
    move |source| Error::Attach { program, cgroup: cgroup.path.clone(), source: source.into() }
}
