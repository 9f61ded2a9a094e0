//! A node without a kernel side: the whole agent is built on it as on a real one, and listens on loopback.
//!
//! Owns the doubles of what only root on a node has. The pipeline and the golden tests bring the rest of the seams.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use agent_common::{
    pod_listener::PodListener,
    policy::{PodPolicy, QosClass},
    target::Target,
};
use futures::{
    StreamExt as _,
    future::{self, BoxFuture},
    stream::{self, BoxStream},
};
use parking_lot::{Mutex, MutexGuard};
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use super::FakeOrigins;
use crate::{
    accept,
    app::seams::{Cgroups, Kernel, Keys, Seams, Services},
    config::{Config, KubeIdentity, LogFormat, TargetMode, WhenDown},
    control::policy_map::PolicyMap,
    credentials::Clock,
    identity::{NodeFacts, cgroupfs, peer::ProcessCgroups, tree::TreeEvent},
    intercept::{self, HandoverKey, Standing},
    policy::{ImdsMode, UnknownPods},
    takeover::{
        self,
        dataplane::Dataplane,
        pod_networks::{OpenNetwork, PodNetworks},
    },
};

/// The cookie of the host's network namespace.
pub const HOST_NETWORK: u64 = 1;

/// Takes every change, and remembers it. Its agent is active unless a test says otherwise.
#[derive(Debug)]
pub struct FakeDataplane {
    standing: Mutex<Standing>,
    target: watch::Sender<Option<Target>>,
    take_overs: AtomicU32,
    stops: AtomicU32,
}

/// Takes every policy, and tells which cgroup of a class it was last told of: events are applied in order, so that a test
/// knows that those before it have been.
#[derive(Clone, Debug, Default)]
pub struct FakePolicies(Arc<watch::Sender<u64>>);

/// Every process is one of the node's own.
#[derive(Debug)]
struct FakeProcesses;

/// No pod has a network of its own: all are served on the node's addresses.
#[derive(Debug)]
struct NoNetworks;

/// The seams of a node on which connections have `origins`, and cgroups are as `facts` and `cgroup_events` say.
///
/// # Panics
/// Where there are no random numbers.
#[expect(clippy::expect_used, reason = "test code")]
pub fn seams<S>(
    clock: Clock,
    facts: Arc<dyn NodeFacts>,
    cgroup_events: BoxStream<'static, TreeEvent>,
    origins: Arc<FakeOrigins>,
    policies: FakePolicies,
    services: Services<S>,
) -> Seams<FakeDataplane, FakePolicies, S>
where
    S: Send + 'static,
{
    let keys = Keys {
        imds: [7; 32],
        handover: HandoverKey::random().expect("random numbers"),
        predecessor: Box::new(|| Ok(None)),
    };
    Seams {
        clock,
        cgroups: Cgroups {
            facts,
            processes: Arc::new(FakeProcesses),
            existing: vec![],
            events: cgroup_events,
            own_pod: None,
            host_netns_cookie: HOST_NETWORK,
            networks: Arc::new(NoNetworks),
        },
        kernel: Kernel {
            dataplane: Arc::default(),
            policies,
            origins: Arc::new(origins),
            events: stream::pending().boxed(),
            is_podgate_pod: Box::new(|_| false),
            keys,
            metrics: Registry::default(),
            background: vec![],
        },
        services: Box::pin(async { Ok(services) }),
    }
}

/// Settings with which an agent listens on loopback, and keeps its files in `directory`, which is private.
pub fn config(directory: &Path) -> Config {
    Config {
        node_name: "n1".into(),
        cluster_name: "lab".into(),
        cgroup_root: "/".into(),
        kubelet_root: directory.join("kubelet"),
        bpffs: directory.join("bpf"),
        imds: ImdsMode::Intercept,
        imds_floor: ImdsMode::Off,
        imds_unknown: UnknownPods::Strict,
        tokenless: true,
        imds_v1: false,
        egress_filter: true,
        audit_paths: false,
        target: TargetMode::Own,
        target_v4: Some(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)),
        target_v6: None,
        eks_agent: None,
        token_delegates: vec![],
        when_down: WhenDown::Deny,
        prefetch: false,
        netdev: "podgate0".into(),
        kube_identity: KubeIdentity::AssociatedNode,
        admin: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0).into(),
        socket: directory.join("run/podgate.sock"),
        handover_dir: directory.join("handover"),
        drain: Duration::from_secs(5),
        log_format: LogFormat::Text,
        log_filter: "info".into(),
    }
}

// === impl FakeDataplane ===

impl FakeDataplane {
    /// From now on this agent stands so.
    pub fn set_standing(&self, standing: Standing) {
        *lock(&self.standing) = standing;
    }

    /// Where pods are sent.
    pub fn targets(&self) -> watch::Receiver<Option<Target>> {
        self.target.subscribe()
    }

    /// How often an agent took over.
    pub fn take_overs(&self) -> u32 {
        self.take_overs.load(Relaxed)
    }

    /// How often an agent said that it stops.
    pub fn stops(&self) -> u32 {
        self.stops.load(Relaxed)
    }
}

impl Default for FakeDataplane {
    fn default() -> Self {
        Self {
            standing: Mutex::new(Standing::Active),
            target: watch::Sender::default(),
            take_overs: AtomicU32::default(),
            stops: AtomicU32::default(),
        }
    }
}

impl Dataplane for FakeDataplane {
    async fn add_address(&self, _: IpAddr) -> Result<bool, takeover::Error> {
        Ok(true)
    }

    /// On loopback, whatever the address: nothing redirects connections, so pods reach it where it listens.
    fn listen(&self, address: SocketAddr) -> Result<(SocketAddr, TcpListener), takeover::Error> {
        let listen = || {
            let listener = accept::listen((Ipv4Addr::LOCALHOST, 0).into())?;
            Ok((listener.local_addr()?, listener))
        };
        listen().map_err(|source| takeover::Error::Listen { address, source })
    }

    async fn reserve(&self, _: SocketAddr) -> Result<(), takeover::Error> {
        Ok(())
    }

    async fn reserve_only(&self, _: Vec<SocketAddr>) -> Result<(), takeover::Error> {
        Ok(())
    }

    async fn remove_other_addresses(&self, _: Vec<IpAddr>) -> Result<(), takeover::Error> {
        Ok(())
    }

    async fn take_over(&self, target: Target, _: Vec<Arc<TcpListener>>) -> Result<(), takeover::Error> {
        self.take_overs.fetch_add(1, Relaxed);
        self.target.send_replace(Some(target));
        Ok(())
    }

    async fn set_listeners(&self, _: Vec<Arc<TcpListener>>) -> Result<(), takeover::Error> {
        Ok(())
    }

    async fn set_target(&self, target: Target) -> Result<(), takeover::Error> {
        self.target.send_replace(Some(target));
        Ok(())
    }

    async fn publish_pod_listener(&self, _: u64, _: PodListener) -> Result<(), takeover::Error> {
        Ok(())
    }

    async fn withdraw_pod_listener(&self, _: u64) -> Result<(), takeover::Error> {
        Ok(())
    }

    fn heartbeat(&self) -> Result<(), takeover::Error> {
        Ok(())
    }

    fn standing(&self) -> Result<Standing, takeover::Error> {
        Ok(*lock(&self.standing))
    }

    fn silence(&self) {}

    async fn stop(&self) -> Result<(), takeover::Error> {
        self.stops.fetch_add(1, Relaxed);
        Ok(())
    }
}

// === impl FakePolicies ===

impl FakePolicies {
    /// Learns the cgroup of a class that it was last told of.
    pub fn classes(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

impl PolicyMap for FakePolicies {
    async fn set(&self, _: u64, _: PodPolicy) -> Result<(), intercept::Error> {
        Ok(())
    }

    async fn remove(&self, _: u64) -> Result<(), intercept::Error> {
        Ok(())
    }

    async fn exempt(&self, _: u64) -> Result<(), intercept::Error> {
        Ok(())
    }

    async fn unexempt(&self, _: u64) -> Result<(), intercept::Error> {
        Ok(())
    }

    async fn set_class(&self, _: QosClass, cgroup_id: u64) -> Result<(), intercept::Error> {
        self.0.send_replace(cgroup_id);
        Ok(())
    }

    async fn set_unknown(&self, _: PodPolicy, _: PodPolicy) -> Result<(), intercept::Error> {
        Ok(())
    }
}

// === impl FakeProcesses ===

impl ProcessCgroups for FakeProcesses {
    fn of_process(&self, _: i32) -> Result<PathBuf, cgroupfs::Error> {
        Ok("/sys/fs/cgroup/system.slice".into())
    }

    fn kubepods(&self) -> &Path {
        Path::new("/sys/fs/cgroup/kubepods")
    }
}

// === impl NoNetworks ===

impl PodNetworks for NoNetworks {
    fn has_network(&self, _: u64) -> BoxFuture<'_, bool> {
        Box::pin(future::ready(false))
    }

    fn open(&self, _: u64, _: Vec<u16>) -> BoxFuture<'_, io::Result<OpenNetwork>> {
        Box::pin(future::pending())
    }

    fn check<'a>(&'a self, _: &OpenNetwork) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(future::pending())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}
