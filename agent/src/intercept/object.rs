//! The eBPF object: embedded bytes, globals, programs and maps.
//!
//! Owns every use of a map and of a name in the object; never attaches anything.

use std::{io, os::fd::AsFd as _};

use agent_common::{
    abi::{global, map, program},
    counter::Counter,
    egress::{JOB_AUDIT_PATHS, JOB_GUARD},
    origin::{Dialled, Origin},
    policy::PodPolicy,
    target::Target,
};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf, SkStorage},
    programs::{CgroupSkb, CgroupSockAddr, Program, ProgramError, SockOps},
    sys::SyscallError,
};

use super::{Error, Settings};

/// The object, or nothing where the build had none.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/podgate.o"));

/// How much of a verifier's log an error repeats; the reason is at its end.
const LOG_TAIL_LINES: usize = 20;

/// The object in the kernel. Its programs go, and their links with them, when it is dropped.
pub(super) struct Object {
    programs: Ebpf,
    accepted: MapData,
    tickets: HashMap<MapData, u64, Dialled>,
    pod_tickets: HashMap<MapData, u64, u64>,
    policies: HashMap<MapData, u64, PodPolicy>,
    unknown_pod: Array<MapData, PodPolicy>,
    targets: Array<MapData, Target>,
    target_index: Array<MapData, u32>,
    counters: PerCpuArray<MapData, u64>,
    events: Option<RingBuf<MapData>>,
}

// === impl Object ===

impl Object {
    /// Creates the maps and loads the programs.
    pub(super) fn load(settings: &Settings) -> Result<Self, Error> {
        if OBJECT.is_empty() {
            return Err(Error::NoObject);
        }
        let mut ebpf = EbpfLoader::new()
            .override_global(global::TICKET_KEY, &settings.ticket_key.0, true)
            .override_global(global::KUBEPODS_LEVEL, &settings.kubepods_level, true)
            .override_global(global::KUBEPODS_ID, &settings.kubepods_id, true)
            .override_global(global::HOST_NETNS, &settings.host_netns_cookie, true)
            .load(OBJECT)
            .map_err(|source| Error::Load { source: source.into() })?;
        for name in program::ALL {
            load_program(&mut ebpf, name)?;
        }
        let Some(Map::SkStorage(accepted)) = ebpf.take_map(map::ACCEPTED) else {
            return Err(Error::Mismatch { what: map::ACCEPTED });
        };
        let mut egress_jobs: Array<_, u32> = take(&mut ebpf, map::EGRESS_JOBS)?;
        egress_jobs.set(0, jobs(settings), 0).map_err(writing(map::EGRESS_JOBS))?;
        Ok(Self {
            accepted,
            tickets: take(&mut ebpf, map::TICKETS)?,
            pod_tickets: take(&mut ebpf, map::POD_TICKETS)?,
            policies: take(&mut ebpf, map::POLICIES)?,
            unknown_pod: take(&mut ebpf, map::UNKNOWN_POD)?,
            targets: take(&mut ebpf, map::TARGETS)?,
            target_index: take(&mut ebpf, map::TARGET_INDEX)?,
            counters: take(&mut ebpf, map::COUNTERS)?,
            events: Some(take(&mut ebpf, map::EVENTS)?),
            programs: ebpf,
        })
    }

    /// A loaded program.
    pub(super) fn program<'a, P>(&'a mut self, name: &str) -> Result<&'a mut P, ProgramError>
    where
        &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
    {
        self.programs.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()
    }

    /// Fills one of the two slots.
    pub(super) fn set_target(&mut self, slot: u32, target: Target) -> Result<(), Error> {
        self.targets.set(slot, target, 0).map_err(writing(map::TARGETS))
    }

    /// Makes a slot the one in force.
    pub(super) fn set_target_index(&mut self, slot: u32) -> Result<(), Error> {
        self.target_index.set(0, slot, 0).map_err(writing(map::TARGET_INDEX))
    }

    /// What a pod gets that has no policy, by where its socket is.
    pub(super) fn set_unknown_pod(&mut self, slot: u32, policy: PodPolicy) -> Result<(), Error> {
        self.unknown_pod.set(slot, policy, 0).map_err(writing(map::UNKNOWN_POD))
    }

    /// What a pod gets.
    pub(super) fn set_policy(&mut self, pod_cgroup_id: u64, policy: PodPolicy) -> Result<(), Error> {
        self.policies.insert(pod_cgroup_id, policy, 0).map_err(writing(map::POLICIES))
    }

    /// Forgets a pod, if it is there.
    pub(super) fn remove_policy(&mut self, pod_cgroup_id: u64) -> Result<(), Error> {
        remove(&mut self.policies, pod_cgroup_id).map_err(writing(map::POLICIES))?;
        self.forget_idle_counts()
    }

    /// How many tickets can be redeemed, of all pods.
    pub(super) fn live_tickets(&self) -> Result<u64, Error> {
        let count = self.tickets.keys().try_fold(0, |count, key| key.map(|_| count + 1));
        count.map_err(reading(map::TICKETS))
    }

    /// How many of them count for this pod.
    pub(super) fn live_tickets_of(&self, pod_cgroup_id: u64) -> Result<Option<u64>, Error> {
        match self.pod_tickets.get(&pod_cgroup_id, 0) {
            Err(MapError::KeyNotFound) => Ok(None),
            result => result.map(Some).map_err(reading(map::POD_TICKETS)),
        }
    }

    /// Forgets the counts of those that are no known pods and have no ticket: pods that are gone, and what was counted
    /// while nothing was known of its pod.
    ///
    /// A count that goes while its pod dials leaves that one ticket uncounted, no more.
    fn forget_idle_counts(&mut self) -> Result<(), Error> {
        let counts =
            self.pod_tickets.iter().collect::<Result<Vec<_>, _>>().map_err(reading(map::POD_TICKETS))?;
        for (cgroup_id, count) in counts {
            if count == 0 && matches!(self.policies.get(&cgroup_id, 0), Err(MapError::KeyNotFound)) {
                remove(&mut self.pod_tickets, cgroup_id).map_err(writing(map::POD_TICKETS))?;
            }
        }
        Ok(())
    }

    /// The ring buffer; `None` when it was given away before.
    pub(super) fn events(&mut self) -> Option<RingBuf<MapData>> {
        self.events.take()
    }

    /// A counter, summed over the processors.
    pub(super) fn counter(&self, counter: Counter) -> Result<u64, Error> {
        let values = self.counters.get(&(counter as u32), 0).map_err(reading(map::COUNTERS))?;
        Ok(values.iter().sum())
    }

    /// A handle of its own on the accepted sockets' origins.
    pub(super) fn accepted(&self) -> Result<SkStorage<MapData, Origin>, Error> {
        let fd = self.accepted.fd().as_fd().try_clone_to_owned();
        let fd =
            fd.map_err(|source| Error::Map { action: "opening", map: map::ACCEPTED, source: source.into() })?;
        MapData::from_fd(fd).and_then(|data| Map::SkStorage(data).try_into()).map_err(reading(map::ACCEPTED))
    }
}

/// What the egress program is to do.
fn jobs(settings: &Settings) -> u32 {
    let job = |bit, wanted| if wanted { bit } else { 0 };
    job(JOB_GUARD, settings.guard) | job(JOB_AUDIT_PATHS, settings.audit_paths)
}

/// Lets the kernel verify and compile one program.
fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), Error> {
    let program = ebpf.program_mut(name).ok_or(Error::Mismatch { what: name })?;
    let result = match program {
        Program::CgroupSockAddr(program) => CgroupSockAddr::load(program),
        Program::SockOps(program) => SockOps::load(program),
        Program::CgroupSkb(program) => CgroupSkb::load(program),
        _ => return Err(Error::Mismatch { what: name }),
    };
    result.map_err(|error| match error {
        ProgramError::LoadError { io_error, verifier_log } => {
            let log = verifier_log.to_string();
            let lines: Vec<_> = log.lines().filter(|line| !line.is_empty()).collect();
            let tail = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
            Error::Rejected { program: name, source: io_error.into(), log_tail: tail.join("\n") }
        }
        other => Error::Rejected { program: name, source: other.into(), log_tail: String::new() },
    })
}

/// Takes a map out of the object, as the type that the agent expects.
fn take<M>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, Error>
where
    M: TryFrom<Map, Error = MapError>,
{
    ebpf.take_map(name).and_then(|map| map.try_into().ok()).ok_or(Error::Mismatch { what: name })
}

/// Removes an entry, if it is there.
fn remove<V: Pod>(map: &mut HashMap<MapData, u64, V>, key: u64) -> Result<(), MapError> {
    match map.remove(&key) {
        Err(MapError::SyscallError(SyscallError { io_error, .. }))
            if io_error.kind() == io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        result => result,
    }
}

fn reading(map: &'static str) -> impl FnOnce(MapError) -> Error {
    move |source| Error::Map { action: "reading", map, source: source.into() }
}

fn writing(map: &'static str) -> impl FnOnce(MapError) -> Error {
    move |source| Error::Map { action: "writing", map, source: source.into() }
}
