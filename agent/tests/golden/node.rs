//! A node of which everything is known: callers by name, and the agent's own stages behind a real listener.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "test code")]

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use agent::{
    accept,
    credentials::{
        cache::{self, CredentialCache},
        metrics::CacheMetrics,
    },
    dialect::imds_token::ImdsTokens,
    drain::drain,
    identity::{
        CallerResolver, Namespaces, Pod, PodUid, Pods, ServiceAccountRef,
        cgroupfs::CgroupPaths,
        network::{Networks, PodProcesses},
    },
    instance_metadata::Instance,
    intercept::OriginLookup,
    policy::lookup::Policies,
    policy::{Defaults, ImdsMode},
    serve::{ConnectionLimit, Server, metrics::RequestMetrics},
    testing::{self, FakeOrigins},
};
use agent_common::{
    net::{Endpoint, HTTP_PORT, POD_IDENTITY_V4, POD_IDENTITY_V6},
    origin::{Origin, STATE_SENT},
};
use rustix::io::Errno;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::watch,
    time::timeout,
};

use crate::{
    exchange::{Caller, Exchange, put, write},
    upstream::Source,
};

const HOST_NETWORK: u64 = 1;
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
/// Its cgroup is there, the watch has not shown it.
const LATE: (&str, &str) = ("late", "99");
/// How the kubelet names the cgroup of a static pod.
const STATIC: &str = "burstable/podfc407168c6823ed1e0a61410d6621724/container";

/// Where a chain of exchanges is.
pub(crate) struct Session {
    /// What podgate has of an address.
    target: IpAddr,
    token: String,
    stream: Option<TcpStream>,
}

/// The cgroup that dials, and the network of its pod's processes.
struct Cgroup {
    /// Relative to kubepods, or that it is gone.
    path: Result<Option<PathBuf>, Errno>,
    network: u64,
}

// === impl Session ===

impl Session {
    /// A chain at the beginning, with an agent that pods' dials are sent to at this address.
    pub(crate) fn new(target: IpAddr) -> Self {
        Self { target, token: String::new(), stream: None }
    }

    /// Runs one exchange, on a node of its own unless it goes on with a connection; tells the answer in the form of the
    /// files. Whether the connection is open after it shows in the next exchange, where that is on the same one.
    pub(crate) async fn run(&mut self, exchange: &Exchange, goes_on: bool) -> String {
        if !matches!(exchange.caller, Caller::Again) {
            let address = serve(self.target, exchange);
            self.stream = Some(TcpStream::connect(address).await.unwrap());
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

/// An agent for the caller of one exchange, and those that go on with its connection.
fn serve(target: IpAddr, exchange: &Exchange) -> SocketAddr {
    let pods = Arc::<Pods>::default();
    let mut accounts = Vec::new();
    for (name, digits, change) in PODS {
        let mut pod = Pod { uid: uid(digits), name: name.into(), ..testing::pod("app", name) };
        change(&mut pod);
        accounts.push((pod.uid, pod.service_account.name.clone()));
        pods.insert(&Arc::new(pod));
    }
    let origins = Arc::<FakeOrigins>::default();
    let mut cgroup = Cgroup::of("stray");
    if let Caller::Pod { name, address, .. } = &exchange.caller {
        cgroup = Cgroup::of(name);
        origins.set(Some(origin(*address, target)));
    }
    let namespaces = Namespaces::default();
    namespaces.insert("app", BTreeMap::new());
    namespaces.insert("audited", BTreeMap::from([("podgate.dev/imds".into(), "audit".into())]));
    let source = Source::new(exchange.upstream.clone(), accounts);
    let clock = Arc::new(|| testing::credentials().obtained_at);
    let instance = Instance {
        region: Some("us-west-2".into()),
        zone: Some("us-west-2b".into()),
        zone_id: Some("usw2-az1".into()),
        id: Some("i-0123456789abcdef0".into()),
        instance_type: Some("m7i.large".into()),
        architecture: Some("x86_64".into()),
        domain: Some("amazonaws.com".into()),
        partition: None,
    };
    let defaults = Defaults { imds: ImdsMode::Intercept, imds_floor: ImdsMode::Off, imds_v1: false };
    let server = Arc::new(Server {
        policies: Policies { defaults, namespaces: Arc::new(namespaces) },
        resolver: CallerResolver::new(cgroup, pods, Arc::new(Networks::new(HOST_NETWORK))),
        engine: CredentialCache::start(source, cache::BUDGET, clock, 1, CacheMetrics::default()),
        imds_tokens: ImdsTokens::new(&[7; 32]),
        token_delegates: vec![ServiceAccountRef { namespace: "app".into(), name: "csi".into() }],
        instance: watch::channel(instance).1,
        connections: ConnectionLimit::default(),
        metrics: RequestMetrics::default(),
    });
    let listener = accept::listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let lookup: Arc<dyn OriginLookup> = Arc::new(origins);
    tokio::spawn(async move {
        let (_drain, watch) = drain();
        let of_connections = watch.clone();
        let serve = move |accepted| {
            if let Some(served) = Arc::clone(&server).admit(accepted, of_connections.clone()) {
                tokio::spawn(served);
            }
        };
        accept::accept(listener, lookup, watch, serve).await.unwrap();
    });
    address
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

/// A dial to `address` that was sent to podgate at `target`, or at what goes with it in IPv6.
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
