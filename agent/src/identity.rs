//! From the kernel's origin to the caller: which pod connected, and what its service account is.
//!
//! Owns that chain and its errors; never falls back to a weaker identity, never sees a credential.

use std::{io, net::IpAddr, path::PathBuf, sync::Arc, time::Instant};

use agent_common::{
    defense::{Defense, holds},
    origin::Origin,
};

pub mod cgroup;
pub mod cgroupfs;
mod injection;
pub mod namespaces;
pub mod netns;
pub mod networks;
pub mod peer;
pub mod pod;
pub mod pod_network;
pub mod pods;
pub mod sandboxes;
pub mod tree;
pub mod watch;

pub use cgroup::{ConfigHash, PodUid};
pub use injection::{AUDIENCE, TOKEN_VOLUME};
pub use namespaces::Namespaces;
pub use pod::{DaemonSetRef, Pod, ServiceAccountRef};
pub use pods::Pods;

use self::{
    cgroup::Owner,
    cgroupfs::CgroupPaths,
    networks::{Networks, PodProcesses, Verdict},
};

/// The facts of this node that identity depends on.
pub trait NodeFacts: CgroupPaths + PodProcesses {}

impl<T: CgroupPaths + PodProcesses> NodeFacts for T {}

/// Resolves callers.
pub struct CallerResolver {
    node: Arc<dyn NodeFacts>,
    pods: Arc<Pods>,
    networks: Arc<Networks>,
}

/// The pod whose cgroup connected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourcePod {
    /// The pod.
    pub uid: PodUid,
    /// Its own cgroup, relative to kubepods.
    pub cgroup: PathBuf,
}

/// Why a caller has no identity.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The cgroup was removed while the request was on its way.
    #[error("the cgroup {cgroup_id} that dialled is gone")]
    CgroupRemoved {
        /// The cgroup.
        cgroup_id: u64,
    },
    /// The kernel did not give a cgroup's path.
    #[error("cannot find the path of cgroup {cgroup_id}: {source}")]
    CgroupPath {
        /// The cgroup.
        cgroup_id: u64,
        /// Why.
        source: io::Error,
    },
    /// A cgroup outside kubepods, or one in it that is no pod's.
    #[error("the cgroup {cgroup_id} that dialled belongs to no pod")]
    NotAPod {
        /// The cgroup.
        cgroup_id: u64,
    },
    /// A static pod.
    #[error("the caller is a static pod (configuration {config_hash}); static pods have no service account")]
    StaticPod {
        /// The hash in the name of its cgroup.
        config_hash: ConfigHash,
    },
    /// The watch has not shown the pod yet.
    #[error("pod {uid} is not known on this node yet; try again")]
    PodUnknown {
        /// The pod.
        uid: PodUid,
    },
    /// The connection came through a network that is not the pod's.
    #[error("the connection was dialled by one pod through the network of another, as a mesh's proxy does")]
    ForeignNetwork,
}

// === impl CallerResolver ===

impl CallerResolver {
    /// Resolves from the facts of `node`, the pods in `pods` and their `networks`.
    pub fn new(node: Arc<dyn NodeFacts>, pods: Arc<Pods>, networks: Arc<Networks>) -> Self {
        Self { node, pods, networks }
    }

    /// The pod whose cgroup connected; needs nothing but the kernel.
    pub fn source_pod(&self, cgroup_id: u64) -> Result<SourcePod, Error> {
        let path = self.node.below_kubepods(cgroup_id).map_err(|source| {
            if source.raw_os_error() == Some(rustix::io::Errno::STALE.raw_os_error()) {
                Error::CgroupRemoved { cgroup_id }
            } else {
                Error::CgroupPath { cgroup_id, source }
            }
        })?;
        let found = path.as_deref().and_then(cgroup::parse).ok_or(Error::NotAPod { cgroup_id })?;
        match found.owner {
            Owner::Pod(uid) => Ok(SourcePod { uid, cgroup: found.pod }),
            #[cfg(feature = "undefended")]
            Owner::StaticPod(ref config_hash)
                if !holds(Defense::StaticPods)
                    && let Some(uid) = self.pods.annotated(pod::CONFIG_HASH, &config_hash.to_string()) =>
            {
                Ok(SourcePod { uid, cgroup: found.pod })
            }
            Owner::StaticPod(config_hash) => Err(Error::StaticPod { config_hash }),
        }
    }

    /// The pod, waiting for the watch until `deadline`: a pod's first request often comes before its object.
    pub async fn pod(&self, uid: PodUid, deadline: Instant) -> Result<Arc<Pod>, Error> {
        self.pods.wait(uid, deadline).await.ok_or(Error::PodUnknown { uid })
    }

    /// The pod, if the watch has shown it.
    pub fn known(&self, uid: PodUid) -> Option<Arc<Pod>> {
        self.pods.get(uid)
    }

    /// Makes sure that the connection came from the pod's own network, and so from the pod itself.
    pub async fn own_network(
        &self,
        pod: &Arc<Pod>,
        source_pod: &SourcePod,
        origin: &Origin,
        peer: IpAddr,
    ) -> Result<(), Error> {
        // A translation on the node may have brought it here, and its ticket is another's then.
        if self.is_address_of_another(peer, Some(pod.uid)) {
            return Err(Error::ForeignNetwork);
        }
        let cookie = origin.netns_cookie;
        let verdict = match self.networks.judge(pod, cookie) {
            Verdict::Unproven => {
                let (node, cgroup) = (Arc::clone(&self.node), source_pod.cgroup.clone());
                let asked = tokio::task::spawn_blocking(move || node.network(&cgroup)).await;
                // A failure here proves nothing.
                self.networks.prove(pod, cookie, asked.ok().and_then(Result::ok).flatten())
            }
            verdict => verdict,
        };
        if verdict == Verdict::Own { Ok(()) } else { Err(Error::ForeignNetwork) }
    }

    /// Whether a pod that is known, and is not `pod`, has this address for itself.
    pub fn is_address_of_another(&self, address: IpAddr, pod: Option<PodUid>) -> bool {
        let other = self.pods.with_address(address).filter(|other| Some(*other) != pod);
        other.is_some() && holds(Defense::PeerAddress)
    }
}

impl std::fmt::Debug for CallerResolver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CallerResolver").finish_non_exhaustive()
    }
}
