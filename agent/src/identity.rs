//! From the kernel's origin to the caller: which pod dialled, and what is its service account.
//!
//! Owns that chain and its refusals; never falls back to a weaker identity, never sees a credential.

use std::{io, sync::Arc, time::Instant};

use agent_common::origin::Origin;

pub mod cgroup;
pub mod cgroupfs;
pub mod pods;
pub mod tree;

pub use cgroup::PodUid;
pub use pods::{Pod, Pods, ServiceAccountRef};

use self::{cgroup::Owner, cgroupfs::CgroupPaths};

/// Resolves callers.
pub struct CallerResolver {
    cgroups: Box<dyn CgroupPaths>,
    pods: Arc<Pods>,
}

/// Why a caller has no identity.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cgroup went while the request was on its way.
    #[error("the cgroup {cgroup_id} that dialled is gone")]
    CgroupGone {
        /// The cgroup.
        cgroup_id: u64,
    },
    /// The kernel did not tell a cgroup's path.
    #[error("cannot find the path of cgroup {cgroup_id}: {source}")]
    CgroupPath {
        /// The cgroup.
        cgroup_id: u64,
        /// Why.
        source: io::Error,
    },
    /// A cgroup outside kubepods, or one in it that is not a pod's.
    #[error("the cgroup {cgroup_id} that dialled belongs to no pod")]
    NotAPod {
        /// The cgroup.
        cgroup_id: u64,
    },
    /// A static pod.
    #[error("the caller is a static pod (configuration {config_hash}); static pods have no service account")]
    StaticPod {
        /// The hash that the kubelet names its cgroup with.
        config_hash: String,
    },
    /// The watch has not shown the pod.
    #[error("pod {uid} is not known on this node yet; try again")]
    PodUnknown {
        /// The pod.
        uid: PodUid,
    },
}

// === impl CallerResolver ===

impl CallerResolver {
    /// Resolves by the paths of `cgroups` and the pods in `pods`.
    pub fn new(cgroups: impl CgroupPaths, pods: Arc<Pods>) -> Self {
        Self { cgroups: Box::new(cgroups), pods }
    }

    /// The pod's UID, from the cgroup that dialled; needs nothing but the kernel.
    pub fn uid(&self, origin: &Origin) -> Result<PodUid, Error> {
        let cgroup_id = origin.cgroup_id;
        let path = self.cgroups.below_kubepods(cgroup_id).map_err(|source| {
            if source.raw_os_error() == Some(rustix::io::Errno::STALE.raw_os_error()) {
                Error::CgroupGone { cgroup_id }
            } else {
                Error::CgroupPath { cgroup_id, source }
            }
        })?;
        let found = path.as_deref().and_then(cgroup::parse).ok_or(Error::NotAPod { cgroup_id })?;
        match found.owner {
            Owner::Pod(uid) => Ok(uid),
            Owner::StaticPod(config_hash) => Err(Error::StaticPod { config_hash }),
        }
    }

    /// The pod, which the watch may be about to show: a pod's first request is often quicker.
    pub async fn pod(&self, uid: PodUid, deadline: Instant) -> Result<Arc<Pod>, Error> {
        self.pods.wait(uid, deadline).await.ok_or(Error::PodUnknown { uid })
    }

    /// The pod, if the watch has shown it.
    pub fn known(&self, uid: PodUid) -> Option<Arc<Pod>> {
        self.pods.get(uid)
    }
}

impl std::fmt::Debug for CallerResolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallerResolver").finish_non_exhaustive()
    }
}
