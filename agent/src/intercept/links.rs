//! Attaching the programs to the cgroups, and putting new ones in the place of an earlier agent's.
//!
//! Owns the cgroups' file descriptors and the pinned links; never touches a map.

use std::{
    fs::{self, File},
    io,
    os::{fd::BorrowedFd, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use agent_common::abi::program;
use aya_obj::generated::bpf_attach_type;

use super::{
    Error,
    object::Object,
    pins::{self, Pins},
};
use crate::bpf::CgroupLink;

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
    id: u64,
}

// === impl Cgroups ===

impl Cgroups {
    /// Opens both directories.
    pub(super) fn open(kubepods: &Path, agent: &Path) -> Result<Self, Error> {
        Ok(Self { kubepods: Cgroup::open(kubepods)?, agent: Cgroup::open(agent)? })
    }

    /// Attaches the program that redeems tickets to the agent's own cgroup, as long as the link lives.
    pub(super) fn attach_passive(&self, object: &Object) -> Result<CgroupLink, Error> {
        let name = program::PASSIVE;
        let program = object.program(name)?;
        CgroupLink::create(program, &self.agent.directory, attach_type(name))
            .map_err(cannot_attach(name, &self.agent))
    }

    /// Attaches a program to kubepods for good, or puts it in the place of the one that an agent before has left: at
    /// once, there is no moment in which neither runs.
    pub(super) fn attach(&self, object: &Object, pins: &Pins, name: &'static str) -> Result<(), Error> {
        let program = object.program(name)?;
        self.put(program, &pins.links(), name).map_err(cannot_attach(name, &self.kubepods))
    }

    /// Whether a program of this ABI is attached to kubepods.
    pub(super) fn is_attached(&self, pins: &Pins, name: &str) -> bool {
        let id = CgroupLink::open(&pins.links().join(name)).and_then(|link| link.cgroup_id());
        id.is_ok_and(|id| id == self.kubepods.id)
    }

    /// Detaches a program from kubepods, if it is attached.
    pub(super) fn detach(&self, pins: &Pins, name: &'static str) -> Result<(), Error> {
        pins::remove(&pins.links().join(name)).map_err(|source| Error::Detach {
            program: name,
            cgroup: self.kubepods.path.clone(),
            source,
        })
    }

    fn put(&self, program: BorrowedFd<'_>, links: &Path, name: &str) -> io::Result<()> {
        let path = links.join(name);
        match CgroupLink::open(&path) {
            Ok(link) if link.cgroup_id()? == self.kubepods.id => return link.replace(program),
            // Of a kubepods that is gone and was made anew.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let link = CgroupLink::create(program, &self.kubepods.directory, attach_type(name))?;
        // By way of another name, because a pin cannot take the place of one.
        let next = links.join(format!("{name}-next"));
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        link.pin(&next)?;
        fs::rename(next, path)
    }
}

// === impl Cgroup ===

impl Cgroup {
    fn open(path: &Path) -> Result<Self, Error> {
        let open = || {
            let directory = File::open(path)?;
            let id = directory.metadata()?.ino();
            Ok(Self { path: path.to_owned(), directory, id })
        };
        open().map_err(|source| Error::Cgroup { path: path.to_owned(), source })
    }
}

fn attach_type(program: &str) -> bpf_attach_type {
    match program {
        program::BIND4 => bpf_attach_type::BPF_CGROUP_INET4_BIND,
        program::BIND6 => bpf_attach_type::BPF_CGROUP_INET6_BIND,
        program::CONNECT4 => bpf_attach_type::BPF_CGROUP_INET4_CONNECT,
        program::CONNECT6 => bpf_attach_type::BPF_CGROUP_INET6_CONNECT,
        program::GETPEERNAME4 => bpf_attach_type::BPF_CGROUP_INET4_GETPEERNAME,
        program::GETPEERNAME6 => bpf_attach_type::BPF_CGROUP_INET6_GETPEERNAME,
        program::EGRESS => bpf_attach_type::BPF_CGROUP_INET_EGRESS,
        _ => bpf_attach_type::BPF_CGROUP_SOCK_OPS,
    }
}

fn cannot_attach(program: &'static str, cgroup: &Cgroup) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Attach { program, cgroup: cgroup.path.clone(), source }
}
