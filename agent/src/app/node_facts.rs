//! What the agent finds out about its node at the start: where the pods' cgroups are, and podgate among them.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use agent_common::abi::TICKET_LIFE;
use tracing::info;

use super::Error;
use crate::{
    config::Config,
    identity::{
        cgroup,
        cgroupfs::{self, Kubepods},
        netns,
    },
    intercept::{Settings, TicketKey},
};

/// The node as the agent finds it.
pub(super) struct Node {
    /// The cgroup of all pods.
    pub(super) kubepods: Arc<Kubepods>,
    /// The cgroup of podgate's own pod, unless it does not run as one.
    pub(super) own_pod: Option<u64>,
    /// The network namespace that the agent is in, which is the host's.
    pub(super) host_netns_cookie: u64,
    agent_cgroup: PathBuf,
}

// === impl Node ===

impl Node {
    pub(super) fn find(cgroup_root: &Path) -> Result<Self, Error> {
        let kubepods = Kubepods::find(cgroup_root)?;
        let agent_cgroup = kubepods.of_process(None)?;
        let below = agent_cgroup.strip_prefix(kubepods.path()).ok();
        let own_pod = below.and_then(cgroup::parse).map(|own| kubepods.path().join(own.pod));
        let own_pod = own_pod.map(|path| read_id(&path)).transpose()?;
        if own_pod.is_none() {
            info!(cgroup = %agent_cgroup.display(), "podgate is not in a pod's cgroup");
        }
        let host_netns_cookie = netns::own_cookie().map_err(Error::NetworkNamespace)?;
        Ok(Self { kubepods: Arc::new(kubepods), own_pod, host_netns_cookie, agent_cgroup })
    }

    /// What the programs need to know of it.
    pub(super) fn settings(&self, config: &Config) -> Result<Settings, Error> {
        Ok(Settings {
            bpffs: config.bpffs.clone(),
            kubepods: self.kubepods.path().to_owned(),
            agent_cgroup: self.agent_cgroup.clone(),
            kubepods_level: self.kubepods.level(),
            kubepods_id: read_id(self.kubepods.path())?,
            host_netns_cookie: self.host_netns_cookie,
            egress_filter: config.egress_filter,
            audit_paths: config.audit_paths,
            ticket_life: TICKET_LIFE,
            ticket_key: TicketKey::random()?,
        })
    }
}

fn read_id(path: &Path) -> Result<u64, Error> {
    cgroupfs::cgroup_id(path).map_err(|source| Error::CgroupRead { path: path.to_owned(), source })
}
