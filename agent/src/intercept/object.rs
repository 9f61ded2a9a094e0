//! The eBPF object: embedded bytes, globals, programs and maps.
//!
//! Owns the maps and every name in the object; never attaches anything.

use std::{
    collections::BTreeMap,
    io,
    net::TcpListener,
    os::fd::{AsFd as _, BorrowedFd},
    path::PathBuf,
};

use agent_common::{
    abi::{LISTENERS_MAX, global, map, program},
    egress::{JOB_AUDIT_PATHS, JOB_FILTER},
    net::Endpoint,
    origin::{Origin, PendingOrigin},
    pod_listener::PodListener,
    policy::{PodPolicy, QosClass},
    target::Target,
};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf, SkStorage, SockMap},
    programs::SchedClassifier,
};

use super::{
    Error, Settings,
    load_program::load_program,
    log::{self, DebugLog},
    maps::{
        ImdsKey, PINNED, absent_is_fine, another, check_shape, is_removed, reading, remove, take, writing,
    },
    pins::{self, Pins},
};

/// The object, or nothing where the build had none.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/podgate.o"));

/// The object in the kernel. The programs that are attached stay when it is dropped.
pub(super) struct Object {
    programs: Ebpf,
    /// The maps of `PINNED` once more, to pin them again, with the kernel's ids.
    pinned: Vec<(&'static str, u32, MapData)>,
    accepted: MapData,
    pub(super) tickets: HashMap<MapData, u64, PendingOrigin>,
    pub(super) pod_tickets: HashMap<MapData, u64, u64>,
    pub(super) policies: HashMap<MapData, u64, PodPolicy>,
    unknown_pod: Array<MapData, PodPolicy>,
    classes: Array<MapData, u64>,
    exempt: HashMap<MapData, u64, u64>,
    listeners: SockMap<MapData>,
    pod_listeners: HashMap<MapData, u64, PodListener>,
    reserved: HashMap<MapData, Endpoint, u32>,
    netdevs: HashMap<MapData, u32, u64>,
    imds_key: Array<MapData, ImdsKey>,
    targets: Array<MapData, Target>,
    target_index: Array<MapData, u32>,
    events: Option<RingBuf<MapData>>,
}

/// Maps that others use than the owner of the object.
pub(super) struct OtherMaps {
    pub(super) heartbeat: Array<MapData, u64>,
    pub(super) generation: Array<MapData, u64>,
    pub(super) counters: PerCpuArray<MapData, u64>,
}

// === impl Object ===

impl Object {
    /// Loads the programs, with the maps that are pinned; those that are not there yet are made.
    pub(super) fn load(settings: &Settings, pins: &Pins) -> Result<(Self, OtherMaps), Error> {
        if OBJECT.is_empty() {
            return Err(Error::NoObject);
        }
        let ticket_life = u64::try_from(settings.ticket_life.as_nanos()).unwrap_or(u64::MAX);
        let (log_level, log_bytes) = log::level();
        // Not held while the programs are verified, which takes its time.
        let alone = pins.lock()?;
        let mut loader = EbpfLoader::new();
        for (name, key, value, entries) in PINNED {
            let path = pins.map(name);
            check_shape(&path, name, (key, value, entries))?;
            loader.map_pin_path(name, path);
        }
        #[cfg(feature = "undefended")]
        let without = agent_common::defense::without();
        #[cfg(feature = "undefended")]
        loader.override_global("PODGATE_WITHOUT", &without, true);
        let mut ebpf = loader
            .override_global(global::TICKET_KEY, &settings.ticket_key.0, true)
            .override_global(global::KUBEPODS_LEVEL, &settings.kubepods_level, true)
            .override_global(global::KUBEPODS_ID, &settings.kubepods_id, true)
            .override_global(global::HOST_NETNS, &settings.host_netns_cookie, true)
            .override_global(global::TICKET_LIFE, &ticket_life, true)
            .override_global(global::LOG_LEVEL, &log_level, true)
            .map_max_entries(map::LOG, log_bytes)
            .load(OBJECT)
            .map_err(|source| Error::Load { source: source.into() })?;
        let pinned = PINNED.map(|(name, ..)| {
            let data = MapData::from_pin(pins.map(name)).map_err(reading(name))?;
            Ok((name, data.info().map_err(reading(name))?.id(), data))
        });
        let pinned = pinned.into_iter().collect::<Result<_, Error>>()?;
        drop(alone);
        #[cfg(feature = "undefended")]
        tell_what_is_off(&mut ebpf)?;
        for name in program::ALL {
            load_program(&mut ebpf, name)?;
        }
        let Some(Map::SkStorage(accepted)) = ebpf.take_map(map::ACCEPTED) else {
            return Err(Error::Mismatch { what: map::ACCEPTED });
        };
        let mut egress_jobs: Array<_, u32> = take(&mut ebpf, map::EGRESS_JOBS)?;
        egress_jobs.set(0, jobs(settings), 0).map_err(writing(map::EGRESS_JOBS))?;
        let others = OtherMaps {
            heartbeat: take(&mut ebpf, map::HEARTBEAT)?,
            generation: take(&mut ebpf, map::GENERATION)?,
            counters: take(&mut ebpf, map::COUNTERS)?,
        };
        let object = Self {
            pinned,
            accepted,
            tickets: take(&mut ebpf, map::TICKETS)?,
            pod_tickets: take(&mut ebpf, map::POD_TICKETS)?,
            policies: take(&mut ebpf, map::POLICIES)?,
            unknown_pod: take(&mut ebpf, map::UNKNOWN_POD)?,
            classes: take(&mut ebpf, map::QOS_CLASSES)?,
            exempt: take(&mut ebpf, map::EXEMPT)?,
            listeners: take(&mut ebpf, map::LISTENERS)?,
            pod_listeners: take(&mut ebpf, map::POD_LISTENERS)?,
            reserved: take(&mut ebpf, map::RESERVED)?,
            netdevs: take(&mut ebpf, map::NETDEVS)?,
            imds_key: take(&mut ebpf, map::IMDS_KEY)?,
            targets: take(&mut ebpf, map::TARGETS)?,
            target_index: take(&mut ebpf, map::TARGET_INDEX)?,
            events: Some(take(&mut ebpf, map::EVENTS)?),
            programs: ebpf,
        };
        Ok((object, others))
    }

    /// Pins the maps again that are not there any more: an agent of another ABI has removed them, and perhaps one of this
    /// ABI has made others since. What agents of all ABIs share nobody removes but `podgate detach`.
    pub(super) fn pin_again(&self, pins: &Pins) -> Result<(), Error> {
        let mut gone = Vec::new();
        for (name, id, data) in &self.pinned {
            let path = pins.map(name);
            if is_removed(&path, *id) {
                if pins::is_shared(name) {
                    return Err(Error::Orphaned { path });
                }
                gone.push((path, data));
            }
        }
        pins.make_directories()?;
        for (path, data) in gone {
            let failed = |source| Error::Pin { path: path.clone(), source };
            pins::remove(&path).map_err(failed)?;
            data.pin(&path).map_err(|error| failed(io::Error::other(error)))?;
        }
        Ok(())
    }

    /// Where the maps are pinned that agents of all ABIs share, and their ids: by these it shows that they were removed.
    pub(super) fn shared_pins(&self, pins: &Pins) -> Vec<(PathBuf, u32)> {
        let shared = self.pinned.iter().filter(|(name, ..)| pins::is_shared(name));
        shared.map(|(name, id, _)| (pins.map(name), *id)).collect()
    }

    /// A loaded program.
    pub(super) fn program(&self, name: &'static str) -> Result<BorrowedFd<'_>, Error> {
        let fd = self.programs.program(name).and_then(|program| program.fd().ok());
        Ok(fd.ok_or(Error::Mismatch { what: name })?.as_fd())
    }

    /// A loaded program for netdevs.
    pub(super) fn classifier(&mut self, name: &'static str) -> Result<&mut SchedClassifier, Error> {
        let program = self.programs.program_mut(name).and_then(|program| program.try_into().ok());
        program.ok_or(Error::Mismatch { what: name })
    }

    /// Makes a target effective. Programs see the earlier one or this one, never a mixture.
    pub(super) fn set_target(&mut self, target: Target) -> Result<(), Error> {
        let slot = 1 - self.target_index()?.min(1);
        self.targets.set(slot, target, 0).map_err(writing(map::TARGETS))?;
        self.target_index.set(0, slot, 0).map_err(writing(map::TARGET_INDEX))
    }

    fn target_index(&self) -> Result<u32, Error> {
        self.target_index.get(&0, 0).map_err(reading(map::TARGET_INDEX))
    }

    /// Makes these the listeners of a generation, in place of those that it has, or one two before it had.
    pub(super) fn set_listeners(&mut self, generation: u64, listeners: &[&TcpListener]) -> Result<(), Error> {
        let half = if generation.is_multiple_of(2) { 0 } else { LISTENERS_MAX };
        let mut listeners = listeners.iter();
        for slot in half..half + LISTENERS_MAX {
            let changed = match listeners.next() {
                Some(&listener) => self.listeners.set(slot, listener, 0),
                None => absent_is_fine(self.listeners.clear_index(&slot)),
            };
            changed.map_err(writing(map::LISTENERS))?;
        }
        Ok(())
    }

    /// Reserves an address: only exempt pods may listen there, and podgate's listeners alone get its connections.
    pub(super) fn reserve(&mut self, address: Endpoint) -> Result<(), Error> {
        self.reserved.insert(address, 0, 0).map_err(writing(map::RESERVED))
    }

    /// Where the agent listens in a pod's network.
    pub(super) fn set_pod_listener(&mut self, netns_cookie: u64, listener: PodListener) -> Result<(), Error> {
        self.pod_listeners.insert(netns_cookie, listener, 0).map_err(writing(map::POD_LISTENERS))
    }

    /// That it listens there no more.
    pub(super) fn remove_pod_listener(&mut self, netns_cookie: u64) -> Result<(), Error> {
        remove(&mut self.pod_listeners, netns_cookie).map_err(writing(map::POD_LISTENERS))
    }

    /// The networks in which an agent listens.
    pub(super) fn pod_listeners(&self) -> Result<Vec<u64>, Error> {
        self.pod_listeners.keys().collect::<Result<_, _>>().map_err(reading(map::POD_LISTENERS))
    }

    /// Releases a reserved address.
    pub(super) fn release(&mut self, address: Endpoint) -> Result<(), Error> {
        remove(&mut self.reserved, address).map_err(writing(map::RESERVED))
    }

    /// Every reserved address.
    pub(super) fn reservations(&self) -> Result<Vec<Endpoint>, Error> {
        self.reserved.keys().collect::<Result<_, _>>().map_err(reading(map::RESERVED))
    }

    /// Makes these the netdevs of pods, by index, with the pods' cgroups.
    pub(super) fn set_netdevs(&mut self, wanted: &BTreeMap<u32, u64>) -> Result<(), Error> {
        let present: BTreeMap<_, _> =
            self.netdevs.iter().collect::<Result<_, _>>().map_err(reading(map::NETDEVS))?;
        for netdev in present.keys().filter(|netdev| !wanted.contains_key(netdev)) {
            remove(&mut self.netdevs, *netdev).map_err(writing(map::NETDEVS))?;
        }
        for (netdev, pod) in wanted.iter().filter(|(netdev, pod)| present.get(netdev) != Some(pod)) {
            self.netdevs.insert(netdev, pod, 0).map_err(writing(map::NETDEVS))?;
        }
        Ok(())
    }

    /// The key of IMDS tokens; all zero where none was made yet.
    pub(super) fn imds_key(&self) -> Result<ImdsKey, Error> {
        self.imds_key.get(&0, 0).map_err(reading(map::IMDS_KEY))
    }

    /// Keeps a key for the agents to come.
    pub(super) fn set_imds_key(&mut self, key: ImdsKey) -> Result<(), Error> {
        self.imds_key.set(0, key, 0).map_err(writing(map::IMDS_KEY))
    }

    /// Applies no policy to a pod, for the reason of one of `agent_common::abi`'s `EXEMPT_*`.
    pub(super) fn exempt(&mut self, pod_cgroup_id: u64, why: u64) -> Result<(), Error> {
        self.exempt.insert(pod_cgroup_id, why, 0).map_err(writing(map::EXEMPT))
    }

    /// Applies policies to it again.
    pub(super) fn unexempt(&mut self, pod_cgroup_id: u64) -> Result<(), Error> {
        remove(&mut self.exempt, pod_cgroup_id).map_err(writing(map::EXEMPT))
    }

    /// The pods that no policy applies to, and why.
    pub(super) fn exempted(&self) -> Result<Vec<(u64, u64)>, Error> {
        self.exempt.iter().collect::<Result<_, _>>().map_err(reading(map::EXEMPT))
    }

    /// The pods that have a policy.
    pub(super) fn policies(&self) -> Result<Vec<u64>, Error> {
        self.policies.keys().collect::<Result<_, _>>().map_err(reading(map::POLICIES))
    }

    /// What a pod gets that has no policy, by where its socket is.
    pub(super) fn set_unknown_pod(&mut self, slot: u32, policy: PodPolicy) -> Result<(), Error> {
        self.unknown_pod.set(slot, policy, 0).map_err(writing(map::UNKNOWN_POD))
    }

    /// Tells which cgroup is a class of pods and no pod.
    pub(super) fn set_class(&mut self, class: QosClass, cgroup_id: u64) -> Result<(), Error> {
        self.classes.set(class as u32, cgroup_id, 0).map_err(writing(map::QOS_CLASSES))
    }

    /// What a pod gets.
    pub(super) fn set_policy(&mut self, pod_cgroup_id: u64, policy: PodPolicy) -> Result<(), Error> {
        self.policies.insert(pod_cgroup_id, policy, 0).map_err(writing(map::POLICIES))?;
        self.make_room_for(pod_cgroup_id)
    }

    /// Removes a pod, if it is there.
    pub(super) fn remove_policy(&mut self, pod_cgroup_id: u64) -> Result<(), Error> {
        remove(&mut self.policies, pod_cgroup_id).map_err(writing(map::POLICIES))?;
        self.remove_idle_counts()
    }

    /// The debugging log; `None` when it is off.
    pub(super) fn debug_log(&mut self) -> Result<Option<DebugLog>, Error> {
        DebugLog::take(&mut self.programs)
    }

    /// The ring buffer; `None` when it was given away before.
    pub(super) fn events(&mut self) -> Option<RingBuf<MapData>> {
        self.events.take()
    }

    /// A handle of its own on the accepted sockets' origins.
    pub(super) fn accepted(&self) -> Result<SkStorage<MapData, Origin>, Error> {
        let data = another(&self.accepted, map::ACCEPTED)?;
        Map::SkStorage(data).try_into().map_err(reading(map::ACCEPTED))
    }

    /// A handle of its own on the pods that no policy applies to.
    pub(super) fn exempt_map(&self) -> Result<HashMap<MapData, u64, u64>, Error> {
        let exempt = self.pinned.iter().find(|(name, ..)| *name == map::EXEMPT);
        let (.., exempt) = exempt.ok_or(Error::Mismatch { what: map::EXEMPT })?;
        Map::HashMap(another(exempt, map::EXEMPT)?).try_into().map_err(reading(map::EXEMPT))
    }
}

/// What the egress program is to do.
fn jobs(settings: &Settings) -> u32 {
    let job = |bit, wanted| if wanted { bit } else { 0 };
    job(JOB_FILTER, settings.egress_filter) | job(JOB_AUDIT_PATHS, settings.audit_paths)
}

/// Lets the programs be told at any time which defenses are off.
#[cfg(feature = "undefended")]
fn tell_what_is_off(ebpf: &mut Ebpf) -> Result<(), Error> {
    let mut off: Array<_, u64> = take(ebpf, agent_common::defense::IN_PROGRAMS)?;
    crate::undefended::on_switch(Box::new(move |bits| {
        off.set(0, bits, 0).map_err(|error| format!("the programs cannot be told: {error}"))
    }));
    Ok(())
}
