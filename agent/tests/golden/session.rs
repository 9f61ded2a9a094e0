//! A chain of exchanges with an agent on a fake node of which everything is known: callers by name, pods, one moment.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "test code")]

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use agent::{
    app::{
        self,
        seams::{ClusterWatch, Services},
    },
    config::Config,
    identity::{
        Namespaces, Pod, PodUid, Pods, ServiceAccountRef, cgroupfs::CgroupPaths, networks::PodProcesses,
        watch::ClusterEvent,
    },
    instance_metadata::Instance,
    testing::{
        self, FakeOrigins,
        fake_node::{self, FakePolicies},
    },
};
use agent_common::{
    net::{Endpoint, HTTP_PORT, POD_IDENTITY_V4, POD_IDENTITY_V6},
    origin::{Origin, STATE_SENT},
};
use futures::{StreamExt as _, future::BoxFuture, stream};
use rustix::io::Errno;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::{mpsc, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    exchange::{Caller, Exchange, put, write},
    upstream::Source,
};

const POD_NETWORK: u64 = 10;
/// That of another pod.
const FOREIGN_NETWORK: u64 = 11;
/// Long enough for an answer that waits for the watch.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Is answered at once in every dialect, and is the last request of its connection.
const LAST: &[u8] = b"PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.170.23\r\nConnection: close\r\n\r\n";

type KnownPod = (&'static str, &'static str, fn(&mut Pod));

/// The pods: `app/NAME` of service account NAME, with the last digits of their UIDs, and how they differ.
const PODS: [KnownPod; 11] = [
    ("web", "01", |_| {}),
    ("injected", "02", |pod| pod.token_volume = true),
    ("old", "03", |pod| annotate(pod, "podgate.dev/imds-v1", "allow")),
    ("strict", "04", |pod| annotate(pod, "podgate.dev/imds", "deny")),
    ("open", "05", |pod| {
        pod.token_volume = true;
        annotate(pod, "podgate.dev/tokenless", "allow");
    }),
    ("left-alone", "06", |pod| annotate(pod, "podgate.dev/pod-identity", "off")),
    ("audited", "07", |pod| pod.service_account.namespace = "audited".into()),
    ("early", "08", |pod| pod.service_account.namespace = "early".into()),
    ("meshed", "09", |_| {}),
    ("csi", "10", |_| {}),
    ("other", "11", |_| {}),
];
/// It has a cgroup, but the watch has not shown it.
const LATE: (&str, &str) = ("late", "99");
/// How the kubelet names the cgroup of a static pod.
const STATIC: &str = "burstable/podfc407168c6823ed1e0a61410d6621724/container";

/// Where a chain of exchanges is.
pub(crate) struct Session {
    /// The address to which connections are redirected.
    target: IpAddr,
    token: String,
    stream: Option<TcpStream>,
    agent: Option<Agent>,
}

/// A running agent, until it is dropped.
struct Agent {
    address: SocketAddr,
    _running: JoinSet<Result<(), app::Error>>,
    _directory: tempfile::TempDir,
}

/// Pods and namespaces that never change.
struct KnownCluster(Vec<Arc<Pod>>);

/// The cgroup of the caller, and the network of its pod's processes.
struct Cgroup {
    /// Relative to kubepods; an error once it has been removed.
    path: Result<Option<PathBuf>, Errno>,
    network: u64,
}

// === impl Session ===

impl Session {
    /// A chain at its beginning, with an agent to which connections are redirected at this address.
    pub(crate) fn new(target: IpAddr) -> Self {
        Self { target, token: String::new(), stream: None, agent: None }
    }

    /// Runs one exchange, on a node of its own unless it goes on with a connection; tells the answer in the form of the
    /// files. Whether the connection is open after it shows in the next exchange, where that is on the same one.
    pub(crate) async fn run(&mut self, exchange: &Exchange, goes_on: bool) -> String {
        if !matches!(exchange.caller, Caller::Again) {
            let agent = Agent::start(self.target, exchange).await;
            self.stream = Some(TcpStream::connect(agent.address).await.unwrap());
            self.agent = Some(agent);
        }
        let stream = self.stream.as_mut().expect("`@ again` follows an exchange");
        // The agent may close before it has read everything.
        let _ = stream.write_all(&exchange.request(&self.token)).await;
        let mut received = Vec::new();
        let mut answers = String::new();
        for _ in 0..exchange.answers() {
            let Some((head, body)) = read(stream, &mut received, exchange.is_head()).await else {
                put(&mut answers, "silence");
                return answers;
            };
            let (answer, token) = write(&head, &body);
            answers.push_str(&answer);
            self.token = token.unwrap_or_else(|| self.token.clone());
        }
        assert_eq!(String::from_utf8_lossy(&received), "", "there are more answers than requests");
        if !goes_on && is_closed(stream).await {
            put(&mut answers, "closed");
        }
        answers
    }
}

// === impl Cgroup ===

impl Cgroup {
    /// The cgroup of the caller of this name.
    fn of(name: &str) -> Self {
        let network = if name == "meshed" { FOREIGN_NETWORK } else { POD_NETWORK };
        let path = match name {
            "gone" => Err(Errno::STALE),
            "stray" => Ok(None),
            "static" => Ok(Some(STATIC.into())),
            _ => {
                let known = PODS.iter().map(|(name, digits, _)| (*name, *digits)).chain([LATE]);
                let (_, digits) =
                    known.into_iter().find(|(known, _)| *known == name).expect("a caller of that name");
                Ok(Some(format!("burstable/pod{}/container", uid(digits)).into()))
            }
        };
        Self { path, network }
    }
}

impl CgroupPaths for Cgroup {
    fn below_kubepods(&self, _: u64) -> io::Result<Option<PathBuf>> {
        Ok(self.path.clone()?)
    }
}

impl PodProcesses for Cgroup {
    fn network(&self, _: &Path) -> io::Result<Option<u64>> {
        Ok(Some(self.network))
    }
}

// === impl KnownCluster ===

impl ClusterWatch for KnownCluster {
    fn follow_pods(&self, pods: Arc<Pods>, events: mpsc::Sender<ClusterEvent>) -> BoxFuture<'static, ()> {
        for pod in &self.0 {
            pods.insert(pod);
        }
        Box::pin(async move {
            events.send(ClusterEvent::PodsSynced).await.unwrap();
            std::future::pending::<()>().await;
        })
    }

    fn follow_namespaces(
        &self,
        namespaces: Arc<Namespaces>,
        events: mpsc::Sender<ClusterEvent>,
    ) -> BoxFuture<'static, ()> {
        namespaces.insert("app", BTreeMap::new());
        namespaces.insert("audited", BTreeMap::from([("podgate.dev/imds".into(), "audit".into())]));
        Box::pin(async move {
            events.send(ClusterEvent::NamespacesSynced).await.unwrap();
            std::future::pending::<()>().await;
        })
    }
}

// === impl Agent ===

impl Agent {
    /// Starts one for the caller of an exchange, and of those that go on with its connection.
    async fn start(target: IpAddr, exchange: &Exchange) -> Self {
        let mut accounts = Vec::new();
        let mut pods = Vec::new();
        for (name, digits, change) in PODS {
            let mut pod = Pod { uid: uid(digits), name: name.into(), ..testing::pod("app", name) };
            change(&mut pod);
            accounts.push((pod.uid, pod.service_account.name.clone()));
            pods.push(Arc::new(pod));
        }
        let origins = Arc::<FakeOrigins>::default();
        let mut cgroup = Cgroup::of("stray");
        if let Caller::Pod { name, address, .. } = &exchange.caller {
            cgroup = Cgroup::of(name);
            origins.set(Some(origin(*address, target)));
        }
        let services = Services {
            source: Source::new(exchange.upstream.clone(), accounts),
            instance: watch::channel(instance()).1,
            cluster: Box::new(KnownCluster(pods)),
            background: vec![],
        };
        let directory = tempfile::tempdir().unwrap();
        let config = Config {
            token_delegates: vec![ServiceAccountRef { namespace: "app".into(), name: "csi".into() }],
            ..fake_node::config(directory.path())
        };
        let clock = Arc::new(|| testing::credentials().obtained_at);
        let cgroup_events = stream::pending().boxed();
        let policies = FakePolicies::default();
        let seams = fake_node::seams(clock, Arc::new(cgroup), cgroup_events, origins, policies, services);
        let bound = app::build(config, seams).await.unwrap();
        let (address, ready) = (bound.addresses[0], Arc::clone(&bound.ready));
        let mut running = JoinSet::new();
        running.spawn(bound.run(std::future::pending()));
        while !ready.load(Relaxed) {
            sleep(Duration::from_millis(1)).await;
        }
        Self { address, _running: running, _directory: directory }
    }
}

fn instance() -> Instance {
    Instance {
        region: Some("us-west-2".into()),
        zone: Some("us-west-2b".into()),
        zone_id: Some("usw2-az1".into()),
        id: Some("i-0123456789abcdef0".into()),
        instance_type: Some("m7i.large".into()),
        architecture: Some("x86_64".into()),
        domain: Some("amazonaws.com".into()),
        partition: None,
    }
}

/// Head and body of the first answer of those received so far and to come; `None` where the connection ends without.
async fn read(stream: &mut TcpStream, received: &mut Vec<u8>, of_head: bool) -> Option<(String, String)> {
    let end = loop {
        if let Some(end) = received.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break end + 4;
        }
        let read = timeout(TIMEOUT, stream.read_buf(received)).await.expect("an answer in time");
        if read.unwrap_or(0) == 0 {
            assert!(received.is_empty(), "half an answer: {}", String::from_utf8_lossy(received));
            return None;
        }
    };
    let head: Vec<_> = received.drain(..end).collect();
    let head = String::from_utf8(head).unwrap().trim_end().replace("\r\n", "\n");
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let length: usize = length.expect("every answer says its length").parse().unwrap();
    let length = if of_head { 0 } else { length };
    while received.len() < length {
        let read = timeout(TIMEOUT, stream.read_buf(received)).await.expect("the body in time").unwrap();
        assert!(read > 0, "half a body");
    }
    let body = received.drain(..length).collect();
    Some((head, String::from_utf8(body).unwrap()))
}

/// Whether a connection has ended, or serves one more request, and then ends.
async fn is_closed(stream: &mut TcpStream) -> bool {
    // It may have ended.
    let _ = stream.write_all(LAST).await;
    let mut rest = Vec::new();
    let end = timeout(TIMEOUT, stream.read_to_end(&mut rest)).await.expect("neither closed nor served");
    let rest = String::from_utf8_lossy(&rest);
    assert!(end.is_ok() || rest.is_empty(), "{end:?} after {rest}");
    assert!(rest.matches("HTTP/1.").count() <= 1, "more answers than requests: {rest}");
    rest.is_empty()
}

fn uid(digits: &str) -> PodUid {
    PodUid::parse(&format!("0c5cb3f2-7a47-4a4b-8f0c-0000000000{digits}")).unwrap()
}

fn annotate(pod: &mut Pod, annotation: &str, value: &str) {
    pod.annotations.insert(annotation.into(), value.into());
}

/// A connection to `address` that was redirected to podgate at `target`, or at its IPv6 counterpart.
fn origin(address: IpAddr, target: IpAddr) -> Origin {
    let target = match (address, target) {
        (IpAddr::V6(_), IpAddr::V4(POD_IDENTITY_V4)) => POD_IDENTITY_V6.into(),
        _ => target,
    };
    Origin {
        cgroup_id: 7,
        pod_cgroup_id: 0,
        netns_cookie: POD_NETWORK,
        ticket: 1,
        started_at_ns: 1,
        orig_dst: Endpoint::new(address, HTTP_PORT),
        target: Endpoint::new(target, HTTP_PORT),
        state: STATE_SENT,
        tgid: 1,
        comm: *b"test\0\0\0\0\0\0\0\0\0\0\0\0",
    }
}
