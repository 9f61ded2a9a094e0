//! A node in small: a network namespace, a kubepods cgroup tree, the programs attached to it, and sockets.
//!
//! Owns everything it makes and removes it; never touches the host's network or any cgroup above its own.

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    process,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use agent::{
    accept::listen,
    identity::{cgroupfs::Kubepods, netns},
    intercept::{Interceptor, OriginLookup as _, Settings, SocketOrigins, TicketKey, pinned, unpin},
};
use agent_common::{
    abi::{TICKET_LIFE, map},
    counter::Counter,
    net::{ECS_V4, Endpoint, IMDS_V4, IMDS_V6, POD_IDENTITY_V4, POD_IDENTITY_V6},
    origin::Origin,
    policy::{PodPolicy, QosClass},
    target::{Target, WHEN_DOWN_DENY},
};
use aya::maps::{Array, Map, MapData};
use nix::{
    mount::{MsFlags, mount, umount},
    sched::{CloneFlags, setns, unshare},
};
use parking_lot::Mutex;
use procfs::process::Process;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use rustix::time::{ClockId, clock_gettime};

/// The agent's own addresses, where it does not take over 169.254.170.23.
pub(crate) const AGENT_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 175, 1);
/// The same for IPv6: a unique local address.
pub(crate) const AGENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd17, 0x5175, 0, 0, 0, 0, 0, 1);
/// A neighbor that takes every segment and answers none: routed to `lo`, but nobody's address.
pub(crate) const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
/// How long anything on `lo` may take before it counts as lost.
const TIMEOUT: Duration = Duration::from_secs(2);
/// The network namespace that this thread is in.
const OWN_NETWORK: &str = "/proc/thread-self/ns/net";
/// `lo` is the first netdev of every namespace.
pub(crate) const LO: u32 = 1;

/// The test process is in one cgroup at a time.
static CGROUP: Mutex<()> = Mutex::new(());

/// A node with the programs attached.
pub(crate) struct Node {
    pub(crate) interceptor: Interceptor,
    origins: Arc<SocketOrigins>,
    pub(crate) kubepods: Cgroup,
    agent: Cgroup,
    bpffs: Bpffs,
    mount_level: u32,
    host: File,
    host_netns_cookie: u64,
    // Fields are dropped in order: the cgroups go last.
    _root: Root,
}

/// A bpffs of the test's own.
struct Bpffs(PathBuf);

/// The topmost cgroup of a node.
struct Root(PathBuf);

/// A cgroup that the test process can work in.
#[derive(Clone)]
pub(crate) struct Cgroup {
    pub(crate) path: PathBuf,
    pub(crate) id: u64,
}

/// A pod: the cgroup that policies are about, and a container in it.
pub(crate) struct Pod {
    pub(crate) cgroup: Cgroup,
    pub(crate) container: Cgroup,
}

/// The agent's listeners.
pub(crate) struct Agent {
    origins: Arc<SocketOrigins>,
    listeners: Vec<TcpListener>,
}

/// A listener in no pod, which stands for the real service.
pub(crate) struct RealService(TcpListener);

// === impl Node ===

impl Node {
    /// Runs a test on a node of its own, on a thread of its own: the namespace is the thread's.
    pub(crate) fn run(test: fn(&mut Self)) {
        let name = thread::current().name().expect("tests have names").to_owned();
        let thread = thread::Builder::new().name(name.clone()).spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("kernel tests need root");
            let host = File::open(OWN_NETWORK).unwrap();
            let host_netns_cookie = netns::own_cookie().unwrap();
            unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
            wire();
            test(&mut Self::new(&name.replace("::", "-"), host, host_netns_cookie));
        });
        if let Err(panic) = thread.unwrap().join() {
            std::panic::resume_unwind(panic);
        }
    }

    /// Its kubepods, as an agent finds them.
    pub(crate) fn found_kubepods(&self) -> Arc<Kubepods> {
        let root = Path::new("/").join(self.kubepods.path.parent().and_then(Path::file_name).unwrap());
        Arc::new(Kubepods::find(&root).unwrap())
    }

    fn new(name: &str, host: File, host_netns_cookie: u64) -> Self {
        let mount = cgroup_mount();
        let root = Root(mount.path.join(format!("podgate-{}-{name}", process::id())));
        let kubepods = Cgroup::create(root.0.join("kubepods.slice"));
        let burstable = Cgroup::create(kubepods.path.join("kubepods-burstable.slice"));
        let agent = Cgroup::create(kubepods.path.join("kubepods-podagent.slice"));
        let bpffs = Bpffs::mount();
        let settings = settings(&bpffs, &kubepods, &agent, mount.level, host_netns_cookie);
        let mut interceptor = Interceptor::load(&settings).unwrap();
        interceptor.set_class(QosClass::Burstable, burstable.id).unwrap();
        let origins = Arc::new(interceptor.origins().unwrap());
        let mut node = Self {
            interceptor,
            origins,
            kubepods,
            agent,
            bpffs,
            mount_level: mount.level,
            host,
            host_netns_cookie,
            _root: root,
        };
        node.attach();
        node
    }

    /// A Burstable pod, two levels below kubepods, with a policy.
    pub(crate) fn pod(&mut self, name: &str, imds: u32, pod_identity: u32) -> Pod {
        let pod = self.unknown_pod(name);
        self.interceptor.set_policy(pod.cgroup.id, PodPolicy { imds, pod_identity }).unwrap();
        pod
    }

    /// A Burstable pod that the agent has not heard of.
    pub(crate) fn unknown_pod(&self, name: &str) -> Pod {
        let class = self.kubepods.path.join("kubepods-burstable.slice");
        Pod::create(class.join(format!("kubepods-burstable-pod{name}.slice")))
    }

    /// A Guaranteed pod, directly below kubepods, with a policy.
    pub(crate) fn guaranteed_pod(&mut self, name: &str, imds: u32, pod_identity: u32) -> Pod {
        let pod = Pod::create(self.kubepods.path.join(format!("kubepods-pod{name}.slice")));
        self.interceptor.set_policy(pod.cgroup.id, PodPolicy { imds, pod_identity }).unwrap();
        pod
    }

    /// The agent, listening at its own pair of addresses.
    pub(crate) fn agent(&self) -> Agent {
        self.agent_at(&[(AGENT_V4, 80).into(), (AGENT_V6, 80).into()])
    }

    /// The agent, listening elsewhere.
    pub(crate) fn agent_at(&self, addresses: &[SocketAddr]) -> Agent {
        let listeners =
            self.agent.run(|| addresses.iter().map(|&address| listen(address).unwrap()).collect());
        Agent { origins: Arc::clone(&self.origins), listeners }
    }

    /// Something that the agent itself does.
    pub(crate) fn as_agent<T>(&self, work: impl FnOnce() -> T) -> T {
        self.agent.run(work)
    }

    /// Runs `work` in the host's network namespace, which is not the one that pods are in. Nothing is there.
    pub(crate) fn on_host_network<T>(&self, work: impl FnOnce() -> T) -> T {
        in_network(&self.host, work)
    }

    /// Attaches the programs, as the agent does when it starts, with one heartbeat that lasts for the whole test.
    pub(crate) fn attach(&mut self) {
        self.interceptor.exempt(self.agent.id).unwrap();
        self.interceptor.take_over(own_pair(), &[]).unwrap();
        self.set_heartbeat(now_ns() + 3600 * 1_000_000_000);
        self.origins = Arc::new(self.interceptor.origins().unwrap());
    }

    /// The origin of a connection that the agent has accepted.
    pub(crate) fn origin(&self, accepted: &TcpStream) -> Option<Origin> {
        self.origins.origin(accepted.as_fd()).unwrap()
    }

    /// Says when the agent was last alive, in nanoseconds of `CLOCK_MONOTONIC`.
    pub(crate) fn set_heartbeat(&self, at_ns: u64) {
        self.heartbeat_map().set(0, at_ns, 0).unwrap();
    }

    /// When it was.
    pub(crate) fn heartbeat(&self) -> u64 {
        self.heartbeat_map().get(&0, 0).unwrap()
    }

    /// How long ago that is.
    pub(crate) fn heartbeat_age(&self) -> Duration {
        let at_ns = self.heartbeat();
        Duration::from_nanos(now_ns().saturating_sub(at_ns))
    }

    fn heartbeat_map(&self) -> Array<MapData, u64> {
        let map = MapData::from_pin(self.bpffs.map(map::HEARTBEAT)).unwrap();
        Map::Array(map).try_into().unwrap()
    }

    /// Where the maps are pinned.
    pub(crate) fn bpffs(&self) -> &Path {
        &self.bpffs.0
    }

    /// Detaches the programs, as `podgate detach` does. What takes their place is not attached.
    pub(crate) fn detach(&mut self) {
        for pin in pinned(self.bpffs()).unwrap() {
            unpin(&pin).unwrap();
        }
        self.interceptor = Interceptor::load(&self.settings()).unwrap();
        self.interceptor.exempt(self.agent.id).unwrap();
    }

    /// What an agent of this node is started with.
    pub(crate) fn settings(&self) -> Settings {
        settings(&self.bpffs, &self.kubepods, &self.agent, self.mount_level, self.host_netns_cookie)
    }

    /// Puts programs with other settings in place of these. They know of no pod.
    pub(crate) fn reload(&mut self, change: impl FnOnce(&mut Settings)) {
        let mut settings = self.settings();
        change(&mut settings);
        self.interceptor = Interceptor::load(&settings).unwrap();
        self.attach();
    }

    /// How often a branch was taken.
    pub(crate) fn count(&self, counter: Counter) -> u64 {
        let counters = self.interceptor.counters().read().unwrap();
        counters.iter().find(|(name, _)| *name == counter).unwrap().1
    }

    /// How many of a pod's tickets are alive, as the limit has it.
    pub(crate) fn count_of(&self, pod: &Pod) -> Option<u64> {
        self.interceptor.live_tickets_of(pod.cgroup.id).unwrap()
    }

    /// Tickets that could still be redeemed: as many as were counted, neither more nor less.
    pub(crate) fn live_tickets(&self) -> u64 {
        let live = self.interceptor.live_tickets().unwrap();
        let counted = self.count(Counter::TicketSent)
            - self.count(Counter::TicketDropped)
            - self.count(Counter::Redeemed)
            - self.count(Counter::TicketExpired)
            - self.count(Counter::AcceptedNoRoom);
        assert_eq!(live, counted, "the map and the counters differ");
        live
    }
}

// === impl Bpffs ===

impl Bpffs {
    /// In the mount namespace that the test's thread has for itself.
    fn mount() -> Self {
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let directory = tempfile::tempdir().unwrap().keep();
        mount(Some("bpf"), &directory, Some("bpf"), MsFlags::empty(), none).unwrap();
        Self(directory)
    }

    fn map(&self, name: &str) -> PathBuf {
        self.0.join("podgate/shared/maps").join(name)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if let Err(error) = umount(&self.0).map_err(io::Error::from).and_then(|()| fs::remove_dir(&self.0)) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

// === impl Root ===

impl Drop for Root {
    fn drop(&mut self) {
        remove_tree(&self.0);
    }
}

// === impl Cgroup ===

impl Cgroup {
    pub(crate) fn create(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        let id = fs::metadata(&path).unwrap().ino();
        Self { path, id }
    }

    /// Runs `work` with the test process in this cgroup. Whatever sockets it makes belong here for good.
    pub(crate) fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        struct Home(PathBuf);
        impl Drop for Home {
            fn drop(&mut self) {
                enter(&self.0).unwrap();
            }
        }

        let _alone = CGROUP.lock();
        let _home = Home(own_cgroup());
        enter(&self.path).unwrap();
        work()
    }
}

// === impl Pod ===

impl Pod {
    pub(crate) fn create(path: PathBuf) -> Self {
        let container = Cgroup::create(path.join("cri-containerd-0123.scope"));
        Self { cgroup: Cgroup::create(path), container }
    }

    /// Runs `work` in the pod's container.
    pub(crate) fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        self.container.run(work)
    }

    /// Connects from the pod's container.
    pub(crate) fn connect(&self, address: &str) -> io::Result<TcpStream> {
        self.run(|| open_connection(address))
    }
}

// === impl Agent ===

impl Agent {
    /// Accepts the next connection and closes it; its origin.
    pub(crate) fn accept(&self) -> Option<Origin> {
        soon(|| self.try_accept())
    }

    /// The same, if there is a connection: its origin, if it has one.
    #[expect(clippy::option_option, reason = "no connection is not the same as an anonymous one")]
    pub(crate) fn try_accept(&self) -> Option<Option<Origin>> {
        let (stream, _) = self.listeners.iter().find_map(|listener| listener.accept().ok())?;
        Some(self.origins.origin(stream.as_fd()).unwrap())
    }
}

// === impl RealService ===

impl RealService {
    pub(crate) fn listen(address: &str) -> Self {
        let listener = outside(|| TcpListener::bind(address)).unwrap();
        listener.set_nonblocking(true).unwrap();
        Self(listener)
    }

    /// Accepts the next connection and closes it.
    pub(crate) fn accept(&self) {
        soon(|| self.try_accept());
    }

    /// The same, if there is a connection.
    pub(crate) fn try_accept(&self) -> Option<()> {
        self.0.accept().ok().map(drop)
    }
}

/// Runs `work` in another network namespace.
pub(crate) fn in_network<T>(network: &File, work: impl FnOnce() -> T) -> T {
    let own = File::open(OWN_NETWORK).unwrap();
    setns(network, CloneFlags::CLONE_NEWNET).unwrap();
    let result = work();
    setns(&own, CloneFlags::CLONE_NEWNET).unwrap();
    result
}

/// A network namespace with nothing in it.
pub(crate) fn new_network() -> File {
    let own = File::open(OWN_NETWORK).unwrap();
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let new = File::open(OWN_NETWORK).unwrap();
    setns(&own, CloneFlags::CLONE_NEWNET).unwrap();
    new
}

/// What `happens` gives, within a moment.
pub(crate) fn soon<T>(mut happens: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(result) = happens() {
            return result;
        }
        assert!(Instant::now() < deadline, "nothing happens");
        thread::sleep(Duration::from_millis(1));
    }
}

fn settings(
    bpffs: &Bpffs,
    kubepods: &Cgroup,
    agent: &Cgroup,
    mount_level: u32,
    host_netns_cookie: u64,
) -> Settings {
    Settings {
        bpffs: bpffs.0.clone(),
        kubepods: kubepods.path.clone(),
        agent_cgroup: agent.path.clone(),
        kubepods_level: mount_level + 2,
        kubepods_id: kubepods.id,
        host_netns_cookie,
        egress_filter: true,
        audit_paths: true,
        ticket_life: TICKET_LIFE,
        ticket_key: TicketKey::random().unwrap(),
    }
}

/// The agent's own pair of addresses as a target.
pub(crate) fn own_pair() -> Target {
    Target {
        v4: Endpoint::new(AGENT_V4.into(), 80),
        v6: Endpoint::new(AGENT_V6.into(), 80),
        when_down: WHEN_DOWN_DENY,
    }
}

/// `CLOCK_MONOTONIC`.
pub(crate) fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(Duration::try_from(now).unwrap().as_nanos()).unwrap()
}

/// Runs `work` in no pod: no other test may take the process into one meanwhile.
pub(crate) fn outside<T>(work: impl FnOnce() -> T) -> T {
    let _alone = CGROUP.lock();
    work()
}

/// Connects from wherever the test process is: within [`Cgroup::run`] or [`outside`].
pub(crate) fn open_connection(address: &str) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&address.parse().unwrap(), TIMEOUT)
}

/// Brings up the namespace's `lo` with everybody's addresses.
fn wire() {
    netlink(async |handle| {
        handle.link().set(LinkUnspec::new_with_index(LO).up().build()).execute().await?;
        let route =
            RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(NOBODY, 32).output_interface(LO);
        handle.route().add(route.build()).execute().await
    });
    let v4 = [IMDS_V4, POD_IDENTITY_V4, ECS_V4, AGENT_V4].map(IpAddr::from);
    let v6 = [IMDS_V6, POD_IDENTITY_V6, AGENT_V6].map(IpAddr::from);
    v4.into_iter().chain(v6).for_each(add_address);
}

/// Gives the node one more address.
pub(crate) fn add_address(address: IpAddr) {
    let prefix = if address.is_ipv4() { 32 } else { 128 };
    netlink(async |handle| handle.address().add(LO, address, prefix).execute().await);
}

/// Asks something of the kernel in the network that this thread is in.
pub(crate) fn netlink<T>(work: impl AsyncFnOnce(Handle) -> Result<T, rtnetlink::Error>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection().unwrap();
        tokio::spawn(connection);
        work(handle).await.unwrap()
    })
}

struct Mount {
    path: PathBuf,
    /// Ancestor level of the mounted directory.
    level: u32,
}

fn cgroup_mount() -> Mount {
    let mounts = Process::myself().unwrap().mountinfo().unwrap();
    let mount = mounts.into_iter().find(|mount| mount.fs_type == "cgroup2").expect("cgroup2 is not mounted");
    let level = mount.root.split('/').filter(|part| !part.is_empty()).count();
    Mount { path: mount.mount_point, level: level.try_into().unwrap() }
}

/// The cgroup directory that the test process is in.
fn own_cgroup() -> PathBuf {
    let cgroups = fs::read_to_string("/proc/self/cgroup").unwrap();
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/")).expect("no cgroup2 line");
    cgroup_mount().path.join(path)
}

fn enter(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), process::id().to_string())
}

/// Removes a cgroup and those below it.
fn remove_tree(path: &Path) {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    if let Err(error) = fs::remove_dir(path) {
        eprintln!("cannot remove the cgroup {}: {error}", path.display());
    }
}
