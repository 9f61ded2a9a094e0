//! The networks of this node's pods as podgate listens in them, behind one trait.
//!
//! Owns the steps into a pod's network and out of it; never decides when.

use std::{io, net::IpAddr, os::fd::OwnedFd, path::PathBuf, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use tokio::{task::spawn_blocking, time::sleep};

use crate::{
    accept::in_pod::{self, PodSockets},
    identity::{
        cgroupfs::{CgroupPaths as _, Kubepods},
        netns::{self, NetnsThread},
        pod_network::{self, Populated},
    },
};

/// Between a pod's first process, which is the container runtime's, and the sandbox's own there are some 60 ms.
const FIRST_LOOK: Duration = Duration::from_millis(20);
/// Between two looks at a pod whose network does not show.
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// Podgate's listeners in a pod's network.
#[derive(Debug)]
pub struct OpenNetwork {
    /// The cookie of the network.
    pub cookie: u64,
    /// The listeners.
    pub sockets: PodSockets,
    cgroup: PathBuf,
    populated: Populated,
}

/// Enters pods' networks. A trait because only root on a node can.
pub trait PodNetworks: Send + Sync + 'static {
    /// Whether the pod with this own cgroup has a network of its own by now.
    fn has_network(&self, pod_cgroup_id: u64) -> BoxFuture<'_, bool>;
    /// Listens in the network of the pod with this own cgroup, at none of the ports to avoid, as soon as the pod has one.
    fn open(&self, pod_cgroup_id: u64, avoided: Vec<u16>) -> BoxFuture<'_, io::Result<OpenNetwork>>;
    /// Makes sure that the listeners answer to the pod, and that the network is still the pod's; returns its addresses.
    fn check<'a>(&'a self, open: &OpenNetwork) -> BoxFuture<'a, io::Result<Vec<IpAddr>>>;
}

/// The pods below kubepods.
#[derive(Debug)]
pub(crate) struct NodeNetworks {
    kubepods: Arc<Kubepods>,
    thread: NetnsThread,
}

// === impl OpenNetwork ===

impl OpenNetwork {
    /// Returns once no process of the pod is left.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub async fn ended(&mut self) -> io::Result<()> {
        self.populated.becomes(false).await
    }
}

// === impl NodeNetworks ===

impl NodeNetworks {
    pub(crate) fn new(kubepods: Arc<Kubepods>) -> io::Result<Self> {
        Ok(Self { kubepods, thread: NetnsThread::spawn()? })
    }

    fn cgroup(&self, pod_cgroup_id: u64) -> io::Result<PathBuf> {
        let below = self.kubepods.below_kubepods(pod_cgroup_id)?;
        Ok(self.kubepods.path().join(below.ok_or(io::ErrorKind::NotFound)?))
    }

    /// The network of a pod, searched for where nobody waits: a pod may have thousands of processes.
    async fn find(&self, cgroup: PathBuf) -> io::Result<Option<OwnedFd>> {
        let kubepods = Arc::clone(&self.kubepods);
        spawn_blocking(move || pod_network::find(&kubepods, &cgroup)).await?
    }

    async fn listen(&self, pod_cgroup_id: u64, avoided: Vec<u16>) -> io::Result<OpenNetwork> {
        let cgroup = self.cgroup(pod_cgroup_id)?;
        let mut populated = Populated::follow(&cgroup)?;
        let mut delay = FIRST_LOOK;
        let namespace = loop {
            populated.becomes(true).await?;
            match self.find(cgroup.clone()).await? {
                Some(namespace) => break namespace,
                None => sleep(delay).await,
            }
            delay = (delay * 2).min(LOOK_INTERVAL_MAX);
        };
        let listen = move || Ok::<_, io::Error>((netns::own_cookie()?, PodSockets::listen(&avoided)?));
        let (cookie, sockets) = self.thread.run(namespace, listen).await??;
        Ok(OpenNetwork { cookie, sockets, cgroup, populated })
    }
}

impl PodNetworks for NodeNetworks {
    fn has_network(&self, pod_cgroup_id: u64) -> BoxFuture<'_, bool> {
        Box::pin(async move {
            let Ok(cgroup) = self.cgroup(pod_cgroup_id) else { return false };
            self.find(cgroup).await.is_ok_and(|found| found.is_some())
        })
    }

    fn open(&self, pod_cgroup_id: u64, avoided: Vec<u16>) -> BoxFuture<'_, io::Result<OpenNetwork>> {
        Box::pin(self.listen(pod_cgroup_id, avoided))
    }

    fn check<'a>(&'a self, open: &OpenNetwork) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        let listeners = open.sockets.addresses();
        let namespace = open.sockets.iter().next().map(netns::of_socket);
        let cgroup = open.cgroup.clone();
        Box::pin(async move {
            let namespace = namespace.ok_or(io::ErrorKind::NotFound)??;
            if let Some(current) = self.find(cgroup).await?
                && !pod_network::is_same(&current, &namespace)?
            {
                return Err(io::Error::other("the pod's sandbox was made again"));
            }
            let begin = move || Ok::<_, io::Error>((in_pod::begin_probe(&listeners)?, in_pod::addresses()?));
            let (probes, addresses) = self.thread.run(namespace, begin).await??;
            in_pod::finish_probe(probes).await?;
            Ok(addresses)
        })
    }
}
