//! Attaching the programs, to the cgroups and to the host's network, and putting new ones in the place of an earlier
//! agent's.
//!
//! Owns what they are attached to, held open, and the pinned links; never touches a map.

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
use crate::{bpf::Link, files};

/// The host's network, as the thread that opens it sees it: the agent's.
const HOST_NETWORK: &str = "/proc/thread-self/ns/net";

/// What programs are attached to, held open.
#[derive(Debug)]
pub(super) struct Hooks {
    kubepods: Hook,
    agent: Hook,
    network: Hook,
}

/// Where a program's link is pinned, and what it should be attached to. Needs neither programs nor a lock.
#[derive(Debug)]
pub(super) struct Attachment {
    link: PathBuf,
    hook_id: u64,
}

/// A cgroup, or a network namespace.
#[derive(Debug)]
struct Hook {
    path: PathBuf,
    file: File,
    /// The cgroup's id or the namespace's inode.
    id: u64,
}

// === impl Hooks ===

impl Hooks {
    /// Opens both cgroups and the network.
    pub(super) fn open(kubepods: &Path, agent: &Path) -> Result<Self, Error> {
        let network = Hook::open(Path::new(HOST_NETWORK))?;
        Ok(Self { kubepods: Hook::open(kubepods)?, agent: Hook::open(agent)?, network })
    }

    /// Attaches the program that redeems tickets to the agent's own cgroup, as long as the link lives.
    pub(super) fn attach_passive(&self, object: &Object) -> Result<Link, Error> {
        let name = program::PASSIVE;
        let program = object.program(name)?;
        Link::create(program, &self.agent.file, attach_type(name)).map_err(cannot_attach(name, &self.agent))
    }

    /// Attaches a program for good, or puts it in the place of the one that the predecessor has left: at once, there is
    /// no moment in which neither runs.
    pub(super) fn attach(&self, object: &Object, pins: &Pins, name: &'static str) -> Result<(), Error> {
        let program = object.program(name)?;
        let hook = self.of(name);
        hook.put(program, &pins.links(), name).map_err(cannot_attach(name, hook))
    }

    /// Whether a program of this ABI is attached.
    pub(super) fn is_attached(&self, pins: &Pins, name: &str) -> bool {
        self.attachment(pins, name).is_attached()
    }

    /// To ask later whether a program of this ABI is attached.
    pub(super) fn attachment(&self, pins: &Pins, name: &str) -> Attachment {
        Attachment { link: pins.links().join(name), hook_id: self.of(name).id }
    }

    /// Detaches a program, if it is attached.
    pub(super) fn detach(&self, pins: &Pins, name: &'static str) -> Result<(), Error> {
        let removed = pins::remove(&pins.links().join(name));
        removed.map_err(|source| Error::Detach { program: name, from: self.of(name).path.clone(), source })
    }

    fn of(&self, name: &str) -> &Hook {
        if name == program::LOOKUP { &self.network } else { &self.kubepods }
    }
}

// === impl Attachment ===

impl Attachment {
    /// Whether the program is attached. One that cannot be asked is: too many open files, which pods may bring about,
    /// detach nothing.
    pub(super) fn is_attached(&self) -> bool {
        match Link::open(&self.link).and_then(|link| link.target()) {
            Ok(id) => id == self.hook_id,
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }
}

// === impl Hook ===

impl Hook {
    fn open(path: &Path) -> Result<Self, Error> {
        let open = || {
            let file = File::open(path)?;
            let id = file.metadata()?.ino();
            Ok(Self { path: path.to_owned(), file, id })
        };
        open().map_err(|source| Error::Cgroup { path: path.to_owned(), source })
    }

    fn put(&self, program: BorrowedFd<'_>, links: &Path, name: &str) -> io::Result<()> {
        let path = links.join(name);
        match Link::open(&path) {
            Ok(link) if link.target()? == self.id => return link.replace(program),
            // Of a kubepods that is gone and was made anew.
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        pin(&Link::create(program, &self.file, attach_type(name))?, links, name)
    }
}

/// Pins a link, in place of another of this name.
pub(super) fn pin(link: &Link, links: &Path, name: &str) -> io::Result<()> {
    // By way of another name, because a pin cannot take the place of one.
    let next = links.join(format!("{name}-next"));
    files::remove_if_present(&next)?;
    link.pin(&next)?;
    fs::rename(next, links.join(name))
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
        program::LOOKUP => bpf_attach_type::BPF_SK_LOOKUP,
        _ => bpf_attach_type::BPF_CGROUP_SOCK_OPS,
    }
}

fn cannot_attach(program: &'static str, to: &Hook) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Attach { program, to: to.path.clone(), source }
}
