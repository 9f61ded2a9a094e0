//! The second fence on the node's netdevs: where packets leave the node, its program comes before those of others.
//!
//! Owns how it is attached: by tcx, pinned, where the kernel has it, else as a tc filter, which outlives the agent too. Either
//! is replaced in place, and never removed from a netdev that packets go on to leave by. Never decides which netdev is a
//! pod's, never reads the node's network.

use std::{collections::BTreeMap, fs, io, mem, os::fd::AsFd as _, path::Path};

use agent_common::abi::program;
use aya::programs::{
    ProgramError, SchedClassifier, TcAttachType,
    links::Link as _,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact},
};

use super::{
    Error, links,
    object::Object,
    pins::{self, Pins},
};
use crate::{bpf, bpf::Link, files};

/// The preference and the handle of the fence's filter, where it is one: no other is earlier, and `podgate detach` finds it.
pub const FENCE_FILTER: (u16, u32) = (1, 0x706f_6467);

/// The node's netdevs, as the fence sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Netdevs {
    /// Those that packets leave the node by.
    pub outward: Vec<Netdev>,
    /// Those of pods, by index, with the pods' cgroups.
    pub pods: BTreeMap<u32, u64>,
}

/// A netdev that packets leave the node by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netdev {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether its packets begin with an Ethernet header; others with that of IP.
    pub has_ethernet: bool,
    /// The fence's filter on it, if it has one.
    pub filter: Option<Filter>,
}

/// A tc filter with the handle of [`FENCE_FILTER`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Its program.
    pub program_id: Option<u32>,
    /// Whether no other comes before it.
    pub is_first: bool,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Fenced {
    /// Netdevs that have the fence, with nothing before it.
    pub first: Vec<String>,
    /// Netdevs where another program comes before it, and may send a packet on.
    pub behind: Vec<String>,
    /// Netdevs without it, and why.
    pub open: Vec<(String, Error)>,
}

/// What is attached by this agent.
#[derive(Debug, Default)]
pub(super) struct Fence {
    /// The kernel has shown that it has no tcx.
    is_without_tcx: bool,
    /// Netdevs with a filter, by index.
    filtered: BTreeMap<u32, String>,
}

// === impl Netdev ===

impl Netdev {
    fn program(&self) -> &'static str {
        if self.has_ethernet { program::FENCE } else { program::FENCE_L3 }
    }
}

// === impl Fence ===

impl Fence {
    /// Attaches the programs where packets leave, and nowhere else. The pins must be locked.
    pub(super) fn apply(
        &mut self,
        netdevs: &Netdevs,
        object: &mut Object,
        pins: &Pins,
    ) -> Result<Fenced, Error> {
        object.set_netdevs(&netdevs.pods)?;
        let mut fenced = Fenced::default();
        for netdev in &netdevs.outward {
            let name = netdev.name.clone();
            match self.put(netdev, object, &pins.links()) {
                Ok(true) => fenced.first.push(name),
                Ok(false) => fenced.behind.push(name),
                // Removed meanwhile.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {}
                Err(source) => {
                    let program = netdev.program();
                    fenced.open.push((name.clone(), Error::Fence { program, netdev: name, source }));
                }
            }
        }
        let is_outward = |index| netdevs.outward.iter().any(|netdev| netdev.index == index);
        for name in names(&pins.links())? {
            let index = name.strip_prefix(pins::FENCE).and_then(|index| index.parse().ok());
            if index.is_some_and(|index| !is_outward(index)) {
                let path = pins.links().join(name);
                pins::remove(&path).map_err(|source| Error::Pin { path, source })?;
            }
        }
        // Of a netdev that is gone there is no filter either.
        let inward: Vec<_> = self.filtered.extract_if(.., |index, _| !is_outward(*index)).collect();
        for (_, name) in inward.into_iter().filter(|(index, _)| netdevs.pods.contains_key(index)) {
            remove_filter(&name)?;
        }
        Ok(fenced)
    }

    /// Attaches the program to a netdev, or puts it in the place of a predecessor's. Whether none comes before it.
    fn put(&mut self, netdev: &Netdev, object: &mut Object, links: &Path) -> io::Result<bool> {
        let program = object.classifier(netdev.program()).map_err(io::Error::other)?;
        let id = program.info().map_err(io::Error::other)?.id();
        if !self.is_without_tcx {
            match put_link(netdev, program, id, links) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.is_without_tcx = true,
                Err(error) => return Err(error),
                Ok(()) => return Ok(bpf::first_at_tcx_egress(netdev.index)? == Some(id)),
            }
        }
        if netdev.filter.is_none_or(|filter| filter.program_id != Some(id)) {
            put_filter(netdev, program).map_err(kernel_error)?;
        }
        self.filtered.insert(netdev.index, netdev.name.clone());
        // Of one preference the filter that was added last comes first.
        Ok(netdev.filter.is_none_or(|filter| filter.is_first))
    }
}

/// Attaches by tcx.
fn put_link(netdev: &Netdev, program: &SchedClassifier, id: u32, links: &Path) -> io::Result<()> {
    let name = format!("{}{}", pins::FENCE, netdev.index);
    let program = program.fd().map_err(io::Error::other)?.as_fd();
    if let Some(link) = files::if_present(Link::open(&links.join(&name)))?
        && link.target()? == u64::from(netdev.index)
    {
        return if link.program_id()? == id { Ok(()) } else { link.replace(program) };
    }
    links::pin(&Link::create_tcx_egress(program, netdev.index)?, links, &name)
}

/// Attaches as a filter.
fn put_filter(netdev: &Netdev, program: &mut SchedClassifier) -> Result<(), ProgramError> {
    let (priority, handle) = (FENCE_FILTER.0, TcHandle::from(FENCE_FILTER.1));
    let link = if netdev.filter.is_some() {
        program.attach_to_link(filter(&netdev.name).map_err(TcError::IoError)?)?
    } else {
        match qdisc_add_clsact(&netdev.name) {
            Err(TcError::NetlinkError(error)) if error.raw_os_error() == Some(libc::EEXIST) => {}
            added => added?,
        }
        let options = NlOptions { priority, handle, classid: None };
        program.attach_with_options(&netdev.name, TcAttachType::Egress, TcAttachOptions::Netlink(options))?
    };
    // It stays when this agent is gone.
    mem::forget(program.take_link(link)?);
    Ok(())
}

/// Removes the fence's filter from a netdev; none is fine.
pub fn remove_filter(netdev: &str) -> Result<(), Error> {
    let failed = |source| Error::Detach { program: program::FENCE, from: netdev.into(), source };
    match filter(netdev).map(|filter| filter.detach().map_err(kernel_error)) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) | Err(error) => match error.raw_os_error() {
            // The netdev is gone, or has neither clsact nor the filter.
            Some(libc::ENODEV | libc::ENXIO | libc::ENOENT | libc::EINVAL) => Ok(()),
            _ => Err(failed(error)),
        },
    }
}

fn filter(netdev: &str) -> io::Result<SchedClassifierLink> {
    let (preference, handle) = FENCE_FILTER;
    SchedClassifierLink::attached(netdev, TcAttachType::Egress, preference, TcHandle::from(handle), None)
}

/// What the kernel said of a filter.
fn kernel_error(error: ProgramError) -> io::Error {
    let errno = match &error {
        ProgramError::NetlinkError(error) | ProgramError::TcError(TcError::NetlinkError(error)) => {
            error.raw_os_error()
        }
        ProgramError::TcError(TcError::IoError(error)) => error.raw_os_error(),
        _ => None,
    };
    errno.map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}

/// The names in the directory of links.
fn names(links: &Path) -> Result<Vec<String>, Error> {
    let read = || -> io::Result<Vec<String>> {
        let entries = fs::read_dir(links)?;
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    };
    read().map_err(|source| Error::Pin { path: links.to_owned(), source })
}
