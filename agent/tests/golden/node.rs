//! A node of which everything is known: pods by name, fixed credentials, fixed refusals, and the agent's own stages
//! behind a real listener.
#![expect(clippy::expect_used, clippy::unwrap_used, reason = "test code")]

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use agent::{
    accept,
    credentials::{
        Error, ServiceError,
        eks_auth::Assumed,
        engine::{self, Engine},
        issuer::Verdict,
        jwt::{self, Claims},
        metrics::EngineMetrics,
        source::CredentialSource,
    },
    dialect::imds_token::ImdsTokens,
    drain::drain,
    identity::{CallerResolver, Namespaces, Pod, PodUid, Pods, ServiceAccountRef, network::Networks},
    instance::Instance,
    intercept::OriginLookup,
    policies::Policies,
    policy::{Defaults, ImdsMode},
    secret::Secret,
    serve::{ConnectionLimit, Server, metrics::RequestMetrics},
    testing::{self, FakeCgroups, FakeOrigins},
};
use agent_common::{
    net::{Endpoint, HTTP_PORT},
    origin::{Origin, STATE_SENT},
};
use futures::future::BoxFuture;
use jiff::Timestamp;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::watch,
    time::timeout,
};

use crate::exchange::{Caller, Exchange, write};

/// The signature of a token that the cluster has not signed.
const FORGED: &str = ".Zm9yZ2Vk";
const HOST_NETWORK: u64 = 1;
const POD_NETWORK: u64 = 10;
/// Long enough for an answer that waits for the watch.
const PATIENCE: Duration = Duration::from_secs(5);
/// A connection that is open after this stays open.
const OPEN: Duration = Duration::from_millis(30);

type KnownPod = (&'static str, &'static str, fn(&mut Pod));

/// The pods: `app/NAME` of service account NAME, with the last digits of their UIDs, and how they differ.
const PODS: [KnownPod; 16] = [
    ("web", "01", |_| {}),
    ("injected", "02", |pod| pod.token_volume = true),
    ("old", "03", |pod| annotate(pod, "podgate.dev/imds-v1", "allow")),
    ("strict", "04", |pod| annotate(pod, "podgate.dev/imds", "deny")),
    ("open", "05", |pod| {
        pod.token_volume = true;
        annotate(pod, "podgate.dev/tokenless", "allow");
    }),
    ("denied", "10", |_| {}),
    ("expired", "11", |_| {}),
    ("bad-token", "12", |_| {}),
    ("bad-parameter", "13", |_| {}),
    ("bad-request", "14", |_| {}),
    ("lonely", "15", |_| {}),
    ("throttled", "16", |_| {}),
    ("broken", "17", |_| {}),
    ("away", "18", |_| {}),
    ("odd", "19", |_| {}),
    ("cut-off", "20", |_| {}),
];
/// Its cgroup is there, the watch has not shown it.
const LATE: (&str, &str) = ("late", "99");

/// Where a chain of exchanges is.
#[derive(Default)]
pub(crate) struct Session {
    token: String,
    stream: Option<TcpStream>,
}

/// EKS Auth and what leads to it.
struct Fixed;

// === impl Session ===

impl Session {
    /// Runs one exchange, on a node of its own unless it goes on with a connection; tells the answer in the form of the
    /// files.
    pub(crate) async fn run(&mut self, exchange: &Exchange) -> String {
        if !matches!(exchange.caller, Caller::Again) {
            let address = serve(&exchange.caller);
            self.stream = Some(TcpStream::connect(address).await.unwrap());
        }
        let stream = self.stream.as_mut().expect("`@ again` follows an exchange");
        // The agent may close before it has read everything.
        let _ = stream.write_all(&exchange.request(&self.token)).await;
        let Some((head, body)) = read(stream, exchange.is_head()).await else {
            return "silence\n".to_owned();
        };
        // What is to be closed may take its time; what is to stay open is watched for a moment.
        let moment = if exchange.answer.ends_with("closed\n") { PATIENCE } else { OPEN };
        let (answer, token) = write(&head, &body, is_closed(stream, moment).await);
        self.token = token.unwrap_or_else(|| self.token.clone());
        answer
    }
}

// === impl Fixed ===

impl CredentialSource for Fixed {
    fn judge<'a>(&'a self, token: &'a Secret, _: &'a Claims) -> BoxFuture<'a, Verdict> {
        let is_forged = token.expose().ends_with(FORGED);
        let verdict = if is_forged { Verdict::Bad("its signature is wrong".into()) } else { Verdict::Good };
        Box::pin(async { verdict })
    }

    fn token<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<Secret, Error>> {
        Box::pin(async { Ok(Secret::from(pod.service_account.name.as_str())) })
    }

    fn assume_role<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Assumed, Error>> {
        Box::pin(async {
            let sent = jwt::read(token.expose(), Timestamp::now()).ok().and_then(|claims| claims.pod);
            let of_pod = sent.and_then(|uid| PODS.iter().find(|(_, digits, _)| self::uid(digits) == uid));
            let name = of_pod.map_or(token.expose(), |(name, ..)| name);
            if let Some(error) = error(name) {
                return Err(error);
            }
            let service_account = ServiceAccountRef { namespace: "app".into(), name: name.into() };
            Ok(Assumed { service_account, credentials: testing::credentials() })
        })
    }

    fn forget(&self, _: PodUid) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

/// What EKS Auth says to the pod of this name, if that is no.
fn error(name: &str) -> Option<Error> {
    let (status, code) = match name {
        "denied" => (400, "AccessDeniedException"),
        "expired" => (400, "ExpiredTokenException"),
        "bad-token" => (400, "InvalidTokenException"),
        "bad-parameter" => (400, "InvalidParameterException"),
        "bad-request" => (400, "InvalidRequestException"),
        "lonely" => (404, "ResourceNotFoundException"),
        "throttled" => (429, "ThrottlingException"),
        "broken" => (500, "InternalServerException"),
        "away" => (503, "ServiceUnavailableException"),
        "odd" => (403, "SomethingNewException"),
        "cut-off" => return Some(Error::Unreachable { reason: "no answer in time".into() }),
        _ => return None,
    };
    Some(Error::Service(ServiceError {
        status,
        code: code.into(),
        message: "words of AWS".into(),
        request_id: "5d2a".into(),
        retry_after: None,
    }))
}

/// An agent for one caller.
fn serve(caller: &Caller) -> SocketAddr {
    let (pods, cgroups) = (Arc::<Pods>::default(), Arc::<FakeCgroups>::default());
    for (name, digits, change) in PODS {
        let mut pod = Pod { uid: uid(digits), name: name.into(), ..testing::pod("app", name) };
        change(&mut pod);
        pods.insert(&Arc::new(pod));
    }
    let origins = Arc::<FakeOrigins>::default();
    if let Caller::Pod { name, address } = caller {
        let known = PODS.iter().map(|(name, digits, _)| (*name, *digits)).chain([LATE]);
        let (_, digits) = known.into_iter().find(|(known, _)| known == name).expect("a pod of that name");
        cgroups.set(7, format!("burstable/pod{}/container", uid(digits)));
        cgroups.set_network(format!("burstable/pod{}", uid(digits)), POD_NETWORK);
        origins.set(Some(origin(7, address)));
    }
    let namespaces = Namespaces::default();
    namespaces.insert("app", BTreeMap::new());
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
        resolver: CallerResolver::new(cgroups, pods, Arc::new(Networks::new(HOST_NETWORK))),
        engine: Engine::start(Fixed, engine::BUDGET, clock, 1, EngineMetrics::default()),
        imds_tokens: ImdsTokens::new(&[7; 32]),
        token_delegates: Vec::new(),
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

/// Head and body; `None` where the connection ends without an answer.
async fn read(stream: &mut TcpStream, of_head: bool) -> Option<(String, String)> {
    let mut answer = Vec::new();
    let end = loop {
        if let Some(end) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break end;
        }
        let read = timeout(PATIENCE, stream.read_buf(&mut answer)).await.expect("an answer in time");
        if read.unwrap_or(0) == 0 {
            assert!(answer.is_empty(), "half an answer: {}", String::from_utf8_lossy(&answer));
            return None;
        }
    };
    let mut body = answer.split_off(end + 4);
    answer.truncate(end);
    let head = String::from_utf8(answer).unwrap().replace("\r\n", "\n");
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let length: usize = length.expect("every answer says its length").parse().unwrap();
    while !of_head && body.len() < length {
        timeout(PATIENCE, stream.read_buf(&mut body)).await.expect("the body in time").unwrap();
    }
    Some((head, String::from_utf8(body).unwrap()))
}

async fn is_closed(stream: &mut TcpStream, moment: Duration) -> bool {
    let mut more = [0];
    match timeout(moment, stream.read(&mut more)).await {
        Err(_) => false,
        Ok(Ok(1)) => panic!("more than one answer"),
        Ok(_) => true,
    }
}

fn uid(digits: &str) -> PodUid {
    PodUid::parse(&format!("0c5cb3f2-7a47-4a4b-8f0c-0000000000{digits}")).unwrap()
}

fn annotate(pod: &mut Pod, annotation: &str, value: &str) {
    pod.annotations.insert(annotation.into(), value.into());
}

fn origin(cgroup_id: u64, address: &str) -> Origin {
    Origin {
        cgroup_id,
        pod_cgroup_id: 0,
        netns_cookie: POD_NETWORK,
        ticket: 1,
        dialled_at_ns: 1,
        orig_dst: Endpoint::new(address.parse().unwrap(), HTTP_PORT),
        // Podgate's own, so that no dial is to podgate itself.
        target: Endpoint::new([169, 254, 175, 1].into(), HTTP_PORT),
        state: STATE_SENT,
        tgid: 1,
        comm: *b"test\0\0\0\0\0\0\0\0\0\0\0\0",
    }
}
