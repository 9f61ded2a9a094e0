//! A node without a kernel: the agent's stages behind real listeners, and the servers they talk to.
#![expect(clippy::unwrap_used, reason = "test code")]

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use agent::{
    accept, app,
    config::{Config, KubeIdentity, LogFormat, TargetMode, WhenDown},
    credentials::{
        aws::eks_auth, cache::CredentialCache, kube_identity::Clients, metrics::CacheMetrics,
        source::NodeSource,
    },
    dialect::imds_token::ImdsTokens,
    drain::{Drain, drain},
    identity::{CallerResolver, PodUid, Pods, ServiceAccountRef, network::Networks},
    instance_metadata::Instance,
    intercept::OriginLookup,
    policy::ImdsMode,
    policy::lookup::Policies,
    serve::{ConnectionLimit, Server, metrics::RequestMetrics},
    testing::{FakeCgroups, FakeOrigins},
};
use agent_common::{
    net::{Endpoint, POD_IDENTITY_V4},
    origin::{Origin, STATE_SENT},
};
use aws_config::{BehaviorVersion, Region, SdkConfig, retry::RetryConfig, timeout::TimeoutConfig};
use aws_credential_types::{Credentials, provider::SharedCredentialsProvider};
use kube::{
    Api, Client,
    config::{KubeConfigOptions, Kubeconfig},
};
use lab::{
    cluster::{Cluster, PodSpec},
    eks_auth_server::{EksAuth, EksAuthConfig},
    fault_injection::Faults,
    imds_server::NodeCredentials,
    kube_api::{KubeApi, KubeUser},
};
use prometheus_client::registry::Registry;
use tokio::sync::{mpsc, watch};

pub(crate) const CLUSTER: &str = "lab";
const NODE: &str = "n1";
const HOST_NETWORK: u64 = 1;
/// Of every pod: what a test dials from another network is said so.
const POD_NETWORK: u64 = 10;

/// The agent behind a listener on loopback, and everything it talks to.
pub(crate) struct Node {
    pub(crate) address: SocketAddr,
    pub(crate) cluster: Cluster,
    pub(crate) eks_auth: EksAuth,
    pub(crate) faults: Faults,
    pub(crate) engine: Arc<CredentialCache<NodeSource>>,
    pub(crate) connections: ConnectionLimit,
    pub(crate) engine_metrics: CacheMetrics,
    pub(crate) kubelet: tempfile::TempDir,
    _kube_api: KubeApi,
    registry: Registry,
    origins: Arc<FakeOrigins>,
    cgroups: Arc<FakeCgroups>,
    drain: Option<Drain>,
}

/// An answer as it came over the wire.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Node {
    /// Every pod is intercepted unless `imds` says otherwise.
    pub(crate) async fn start(imds: ImdsMode) -> Self {
        Self::start_with(imds, Faults::default()).await
    }

    /// The same, with faults that are there from the beginning.
    pub(crate) async fn start_with(imds: ImdsMode, faults: Faults) -> Self {
        Self::start_where(imds, faults, |_| {}).await
    }

    /// The same, and the API server is as `change` makes it.
    pub(crate) async fn start_where(imds: ImdsMode, faults: Faults, change: fn(&KubeApi)) -> Self {
        let cluster = Cluster::new("https://oidc.test.invalid/id/LAB");
        cluster.add_node(NODE);
        cluster.add_namespace("app", BTreeMap::new());
        cluster.add_service_account("kube-system", "podgate");
        cluster.add_pod(&spec("kube-system", "podgate-0", "podgate"));
        let kube_api = KubeApi::serve(listener(), cluster.clone(), faults.clone()).unwrap();
        kube_api.apply_rbac(include_str!("../../../deploy/podgate.yaml")).unwrap();
        change(&kube_api);
        let node = NodeCredentials {
            access_key_id: "ASIANODE".into(),
            secret_access_key: "node-secret".into(),
            session_token: "node-session".into(),
        };
        let eks_auth = EksAuthConfig {
            cluster_name: CLUSTER.into(),
            region: "us-west-2".into(),
            account: "123456789012".into(),
            node: node.clone(),
            session: Duration::from_hours(6),
        };
        let eks_auth = EksAuth::serve(listener(), eks_auth, cluster.clone(), faults.clone()).unwrap();

        let kubelet = tempfile::tempdir().unwrap();
        let config = config(imds, kubelet.path().to_owned());
        let aws = aws(&eks_auth.url(), &node);
        let kube = clients(&kube_api).await;
        let (pods, cgroups) = (Arc::<Pods>::default(), Arc::<FakeCgroups>::default());
        let networks = Arc::new(Networks::new(HOST_NETWORK));
        let resolver = CallerResolver::new(Arc::clone(&cgroups), Arc::clone(&pods), networks);
        let policies = Policies { defaults: config.defaults(), namespaces: Arc::default() };
        let namespaces = Arc::clone(&policies.namespaces);
        let (_, instance) = watch::channel(Instance::default());
        let mut registry = Registry::default();
        let client = eks_auth::EksAuth::new(&aws, CLUSTER, NODE, instance.clone());
        let engine_metrics = CacheMetrics::default();
        let engine = app::engine(&config, &kube, client, engine_metrics.clone());
        let connections = ConnectionLimit::default();
        let server = Server {
            policies,
            resolver,
            engine: Arc::clone(&engine),
            imds_tokens: ImdsTokens::new(&[7; 32]),
            token_delegates: config.token_delegates.clone(),
            instance,
            connections: connections.clone(),
            metrics: RequestMetrics::register(&mut registry),
        };
        let (events, mut received) = mpsc::channel(64);
        let of_namespaces = events.clone();
        tokio::spawn(async move { pods.follow(Api::all(kube.node), NODE, events).await });
        tokio::spawn(async move { namespaces.follow(Api::all(kube.own), of_namespaces).await });
        tokio::spawn(async move { while received.recv().await.is_some() {} });
        let origins = Arc::<FakeOrigins>::default();
        let (address, drain) = serve(Arc::new(server), Arc::clone(&origins));
        Self {
            address,
            cluster,
            eks_auth,
            faults,
            engine,
            engine_metrics,
            connections,
            kubelet,
            _kube_api: kube_api,
            registry,
            origins,
            cgroups,
            drain: Some(drain),
        }
    }

    /// A pod `name` of service account `sa` in namespace `app`, changed by `change`; its cgroup is 1000 + n.
    pub(crate) fn pod(&self, name: &str, sa: &str, change: impl FnOnce(&mut PodSpec)) -> TestPod {
        self.cluster.add_service_account("app", sa);
        let mut spec = spec("app", name, sa);
        change(&mut spec);
        let uid = self.cluster.add_pod(&spec);
        self.cgroup_of(name, &uid)
    }

    /// The cgroup of a pod that the API server need not know.
    pub(crate) fn cgroup_of(&self, name: &str, uid: &str) -> TestPod {
        let cgroup_id = u64::from_be_bytes(uid.replace('-', "").as_bytes()[..8].try_into().unwrap());
        self.cgroups.set(cgroup_id, format!("burstable/pod{uid}/container"));
        self.cgroups.set_network(format!("burstable/pod{uid}"), POD_NETWORK);
        TestPod { name: name.into(), uid: uid.into(), cgroup_id }
    }

    /// From now on connections are dialled to `address` by a process in this cgroup, which has this path.
    pub(crate) fn connect_from_cgroup(&self, path: &str, address: &str) {
        self.cgroups.set(7, path);
        self.origins.set(Some(origin(7, address)));
    }

    /// From now on connections are this pod's, which dialled `address`.
    pub(crate) fn connect_as(&self, pod: &TestPod, address: &str) {
        self.origins.set(Some(origin(pod.cgroup_id, address)));
    }

    /// From now on connections are dialled from this pod's cgroup, through a socket in another pod's network.
    pub(crate) fn connect_through_another_network(&self, pod: &TestPod, address: &str) {
        let origin = origin(pod.cgroup_id, address);
        self.origins.set(Some(Origin { netns_cookie: POD_NETWORK + 1, ..origin }));
    }

    /// From now on nobody vouches for connections.
    pub(crate) fn connect_anonymously(&self) {
        self.origins.set(None);
    }

    /// Ends the agent as `SIGTERM` does, and tells whether everything in flight was finished.
    pub(crate) async fn stop(&mut self) -> bool {
        self.drain.take().unwrap().run(Duration::from_secs(5)).await
    }

    /// Sends bytes on a connection of its own and reads to its end.
    pub(crate) async fn raw(&self, bytes: impl Into<Vec<u8>>) -> Option<Answer> {
        let (address, bytes) = (self.address, bytes.into());
        tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            // The server may close before it has read everything.
            let _ = stream.write_all(&bytes);
            let mut answer = vec![];
            let _ = stream.read_to_end(&mut answer);
            parse(&answer)
        })
        .await
        .unwrap()
    }

    /// A request with these headers, and nothing else, on a connection of its own.
    pub(crate) async fn request(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> Answer {
        let headers: Vec<_> = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let host =
            if headers.iter().any(|h| h.starts_with("Host:")) { "" } else { "Host: 169.254.170.23\r\n" };
        let request =
            format!("{method} {path} HTTP/1.1\r\n{host}{}Connection: close\r\n\r\n", headers.concat());
        self.raw(request).await.unwrap()
    }

    pub(crate) async fn get(&self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.request("GET", path, headers).await
    }

    /// The agent's own metrics of requests, as text.
    pub(crate) fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }

    /// Waits until something holds, which it must within a second.
    pub(crate) async fn until<F: Future<Output = bool>>(&self, holds: impl Fn() -> F) {
        let begun = std::time::Instant::now();
        while !holds().await {
            assert!(begun.elapsed() < Duration::from_secs(1), "it does not hold after a second");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// LimitKey role the credentials in an answer are, by EKS Auth's own record.
    pub(crate) fn role_of(&self, answer: &Answer) -> String {
        let key = answer.json()["AccessKeyId"].as_str().unwrap_or_default().to_owned();
        let issued =
            self.eks_auth.issued(&key).unwrap_or_else(|| panic!("{key:?} was never issued: {answer:?}"));
        format!("{} for {}", issued.role_name, issued.pod_name)
    }
}

/// A pod of the test.
#[derive(Clone, Debug)]
pub(crate) struct TestPod {
    pub(crate) name: String,
    pub(crate) uid: String,
    pub(crate) cgroup_id: u64,
}

impl TestPod {
    /// Puts the token that the kubelet would keep for this pod where it would.
    pub(crate) fn kubelet_writes(&self, node: &Node, token: &str) {
        assert!(PodUid::parse(&self.uid).is_some());
        let volume = node.kubelet.path().join("pods").join(&self.uid);
        let volume = volume.join("volumes/kubernetes.io~projected/eks-pod-identity-token");
        std::fs::create_dir_all(volume.join("..1")).unwrap();
        std::fs::write(volume.join("..1/eks-pod-identity-token"), token).unwrap();
        let _ = std::os::unix::fs::symlink("..1", volume.join("..data"));
        let _ = std::os::unix::fs::symlink(
            "..data/eks-pod-identity-token",
            volume.join("eks-pod-identity-token"),
        );
    }

    pub(crate) fn token(&self, node: &Node) -> String {
        node.cluster.mint_pod_token("app", &self.name, &["pods.eks.amazonaws.com"], Duration::from_hours(1))
    }
}

impl Answer {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    pub(crate) fn message(&self) -> String {
        self.json()["message"].as_str().unwrap().to_owned()
    }
}

fn serve(server: Arc<Server<NodeSource>>, origins: Arc<FakeOrigins>) -> (SocketAddr, Drain) {
    let listener = accept::listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let (drain, watch) = drain();
    let lookup: Arc<dyn OriginLookup> = Arc::new(origins);
    tokio::spawn(async move {
        let of_connections = watch.clone();
        let serve = move |accepted| {
            if let Some(served) = Arc::clone(&server).admit(accepted, of_connections.clone()) {
                tokio::spawn(served);
            }
        };
        accept::accept(listener, lookup, watch, serve).await.unwrap();
    });
    (address, drain)
}

fn spec(namespace: &str, name: &str, service_account: &str) -> PodSpec {
    PodSpec {
        namespace: namespace.into(),
        name: name.into(),
        service_account: service_account.into(),
        node: NODE.into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        daemon_set: None,
        host_network: false,
        pod_ips: vec!["10.0.0.7".parse().unwrap()],
        token_volume: false,
        uid: None,
    }
}

fn config(imds: ImdsMode, kubelet_root: PathBuf) -> Config {
    Config {
        node_name: NODE.into(),
        cluster_name: CLUSTER.into(),
        cgroup_root: "/".into(),
        kubelet_root,
        bpffs: "/sys/fs/bpf".into(),
        imds,
        imds_floor: ImdsMode::Off,
        imds_v1: false,
        egress_filter: true,
        audit_paths: false,
        target: TargetMode::PodIdentity,
        target_v4: None,
        target_v6: None,
        eks_agent: None,
        token_delegates: vec![ServiceAccountRef { namespace: "app".into(), name: "csi".into() }],
        when_down: WhenDown::Deny,
        prefetch: true,
        netdev: "podgate0".into(),
        kube_identity: KubeIdentity::AssociatedNode,
        admin: "127.0.0.1:0".parse().unwrap(),
        socket: "/run/podgate/podgate.sock".into(),
        handover_dir: "/run/podgate-handover".into(),
        drain: Duration::from_secs(5),
        log_format: LogFormat::Text,
        log_filter: "info".into(),
    }
}

fn aws(url: &str, node: &NodeCredentials) -> SdkConfig {
    let session_token = Some(node.session_token.clone());
    let credentials =
        Credentials::new(&node.access_key_id, &node.secret_access_key, session_token, None, "test");
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-west-2"))
        .endpoint_url(url)
        .credentials_provider(SharedCredentialsProvider::new(credentials))
        .retry_config(RetryConfig::disabled())
        .timeout_config(TimeoutConfig::builder().connect_timeout(Duration::from_secs(1)).build())
        .build()
}

/// As the node, and as the agent itself.
async fn clients(kube_api: &KubeApi) -> Clients {
    let user = KubeUser::Pod { namespace: "kube-system".into(), name: "podgate-0".into() };
    let kubeconfig = Kubeconfig::from_yaml(&kube_api.kubeconfig(&user)).unwrap();
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await;
    let mut config = config.unwrap();
    let own = Client::try_from(config.clone()).unwrap();
    config.auth_info.impersonate = Some(format!("system:node:{NODE}"));
    Clients { node: Client::try_from(config).unwrap(), own }
}

fn origin(cgroup_id: u64, address: &str) -> Origin {
    let ip: IpAddr = address.parse().unwrap();
    Origin {
        cgroup_id,
        pod_cgroup_id: 0,
        netns_cookie: POD_NETWORK,
        ticket: 1,
        started_at_ns: 1,
        orig_dst: Endpoint::new(ip, 80),
        target: Endpoint::new(POD_IDENTITY_V4.into(), 80),
        state: STATE_SENT,
        tgid: 1,
        comm: *b"test\0\0\0\0\0\0\0\0\0\0\0\0",
    }
}

fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

fn parse(answer: &[u8]) -> Option<Answer> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some(Answer { status, head: head.to_lowercase(), body: body.into() })
}
