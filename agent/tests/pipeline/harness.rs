//! The agent on a fake node, with the lab's servers as its cluster and its AWS.
#![expect(clippy::unwrap_used, reason = "test code")]

use std::{
    collections::BTreeMap,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use agent::{
    app::{
        self,
        seams::{ApiServer, Services},
    },
    config::Config,
    credentials::{Clock, aws::eks_auth, cache::CredentialCache, kube_identity::Clients, source::NodeSource},
    identity::{
        PodUid, ServiceAccountRef,
        tree::{PodCgroup, TreeEvent},
    },
    instance_metadata::Instance,
    policy::ImdsMode,
    testing::{
        FakeCgroups, FakeOrigins,
        fake_node::{self, FakePolicies},
    },
};
use agent_common::{
    net::{Endpoint, POD_IDENTITY_V4},
    origin::{Origin, STATE_SENT},
    policy::QosClass,
};
use aws_config::{BehaviorVersion, Region, SdkConfig, retry::RetryConfig, timeout::TimeoutConfig};
use aws_credential_types::{Credentials, provider::SharedCredentialsProvider};
use futures::{StreamExt as _, channel::mpsc};
use jiff::Timestamp;
use kube::{
    Client,
    config::{KubeConfigOptions, Kubeconfig},
};
use lab::{
    cluster::{Cluster, PodSpec},
    eks_auth_server::{EksAuth, EksAuthConfig},
    fault_injection::Faults,
    imds_server::NodeCredentials,
    kube_api::{KubeApi, KubeUser},
};
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};

pub(crate) const CLUSTER: &str = "lab";
const NODE: &str = "n1";
/// Of every pod: a test says so where it connects from another network.
const POD_NETWORK: u64 = 10;

/// A running agent, and everything that it talks to.
pub(crate) struct Node {
    pub(crate) address: SocketAddr,
    pub(crate) cluster: Cluster,
    pub(crate) eks_auth: EksAuth,
    pub(crate) faults: Faults,
    pub(crate) cache: Arc<CredentialCache<NodeSource>>,
    command_socket: PathBuf,
    kubelet_root: PathBuf,
    _directory: tempfile::TempDir,
    _kube_api: KubeApi,
    origins: Arc<FakeOrigins>,
    cgroups: Arc<FakeCgroups>,
    cgroup_events: mpsc::UnboundedSender<TreeEvent>,
    /// How often the reconciler was waited for.
    barriers: AtomicU64,
    reconciled: watch::Receiver<u64>,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), app::Error>>,
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
        Self::start_configured(imds, faults, change, |_| {}).await
    }

    /// The same, and the agent's settings are as `configure` makes them.
    pub(crate) async fn start_configured(
        imds: ImdsMode,
        faults: Faults,
        change: fn(&KubeApi),
        configure: fn(&mut Config),
    ) -> Self {
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

        let directory = tempfile::tempdir().unwrap();
        let mut config = config(imds, directory.path());
        configure(&mut config);
        let kubelet_root = config.kubelet_root.clone();
        let clock: Clock = Arc::new(Timestamp::now);
        let clients = clients(&kube_api).await;
        let services = services(&config, clients, &aws(&eks_auth.url(), &node), &clock);
        let (cgroups, origins) = (Arc::<FakeCgroups>::default(), Arc::<FakeOrigins>::default());
        let (cgroup_events, events) = mpsc::unbounded();
        let policies = FakePolicies::default();
        let reconciled = policies.classes();
        let facts = Arc::new(Arc::clone(&cgroups));
        let seams = fake_node::seams(clock, facts, events.boxed(), Arc::clone(&origins), policies, services);
        let bound = app::build(config, seams).await.unwrap();

        let (address, cache) = (bound.addresses[0], Arc::clone(&bound.cache));
        let (command_socket, ready) = (bound.command_socket.clone(), Arc::clone(&bound.ready));
        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(bound.run(async { drop(stopped.await) }));
        while !ready.load(Relaxed) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Self {
            address,
            cluster,
            eks_auth,
            faults,
            cache,
            command_socket,
            kubelet_root,
            _directory: directory,
            _kube_api: kube_api,
            origins,
            cgroups,
            cgroup_events,
            barriers: AtomicU64::new(0),
            reconciled,
            stop: Some(stop),
            running,
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
        let pod = TestPod { name: name.into(), uid: uid.into(), cgroup_id };
        self.cgroup_events.unbounded_send(TreeEvent::Created(pod.cgroup())).unwrap();
        pod
    }

    /// Removes a pod's cgroup; the API server still shows the pod.
    pub(crate) async fn remove_cgroup(&self, pod: &TestPod) {
        self.cgroup_events.unbounded_send(TreeEvent::Removed(pod.cgroup())).unwrap();
        self.reconciled().await;
    }

    /// Makes it again, as when the kubelet starts a pod's containers anew.
    pub(crate) async fn restore_cgroup(&self, pod: &TestPod) {
        self.cgroup_events.unbounded_send(TreeEvent::Created(pod.cgroup())).unwrap();
        self.reconciled().await;
    }

    /// Waits until every event of a cgroup has been applied.
    async fn reconciled(&self) {
        let barrier = self.barriers.fetch_add(1, Relaxed) + 1;
        self.cgroup_events.unbounded_send(TreeEvent::QosClass(QosClass::Burstable, barrier)).unwrap();
        self.reconciled.clone().wait_for(|reached| *reached >= barrier).await.unwrap();
    }

    /// From now on connections are made to `address` by a process in the cgroup with this path.
    pub(crate) fn connect_from_cgroup(&self, path: &str, address: &str) {
        self.cgroups.set(7, path);
        self.origins.set(Some(origin(7, address)));
    }

    /// From now on connections are this pod's, to `address`.
    pub(crate) fn connect_as(&self, pod: &TestPod, address: &str) {
        self.origins.set(Some(origin(pod.cgroup_id, address)));
    }

    /// From now on connections are made from this pod's cgroup, through a socket in another pod's network.
    pub(crate) fn connect_through_another_network(&self, pod: &TestPod, address: &str) {
        let origin = origin(pod.cgroup_id, address);
        self.origins.set(Some(Origin { netns_cookie: POD_NETWORK + 1, ..origin }));
    }

    /// From now on connections have no origin.
    pub(crate) fn connect_anonymously(&self) {
        self.origins.set(None);
    }

    /// Shuts the agent down as `SIGTERM` does.
    pub(crate) async fn stop(mut self) {
        let stop = self.stop.take().unwrap();
        stop.send(()).unwrap();
        (&mut self.running).await.unwrap().unwrap();
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

    /// The agent's metrics, as Prometheus gets them.
    pub(crate) fn metrics(&self) -> String {
        let mut stream = UnixStream::connect(&self.command_socket).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: podgate\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// One metric without labels.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let metrics = self.metrics();
        let line = metrics.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("there is no {name} in {metrics}")).trim().parse().unwrap()
    }

    /// Waits until something holds, which it must within a second.
    pub(crate) async fn until<F: Future<Output = bool>>(&self, holds: impl Fn() -> F) {
        let begun = std::time::Instant::now();
        while !holds().await {
            assert!(begun.elapsed() < Duration::from_secs(1), "it does not hold after a second");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Whose role the credentials in an answer are of, by EKS Auth's own record.
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
        let volume = node.kubelet_root.join("pods").join(&self.uid);
        let volume = volume.join("volumes/kubernetes.io~projected/eks-pod-identity-token");
        std::fs::create_dir_all(volume.join("..1")).unwrap();
        std::fs::write(volume.join("..1/eks-pod-identity-token"), token).unwrap();
        let _ = std::os::unix::fs::symlink("..1", volume.join("..data"));
        let _ = std::os::unix::fs::symlink(
            "..data/eks-pod-identity-token",
            volume.join("eks-pod-identity-token"),
        );
    }

    fn cgroup(&self) -> PodCgroup {
        PodCgroup { uid: PodUid::parse(&self.uid).unwrap(), id: self.cgroup_id }
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

fn spec(namespace: &str, name: &str, service_account: &str) -> PodSpec {
    PodSpec {
        namespace: namespace.into(),
        name: name.into(),
        service_account: service_account.into(),
        node: NODE.into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        daemon_set: None,
        mirror_of: None,
        host_network: false,
        pod_ips: vec!["10.0.0.7".parse().unwrap()],
        token_volume: false,
        credentials_uri: None,
        uid: None,
    }
}

fn config(imds: ImdsMode, directory: &Path) -> Config {
    Config {
        node_name: NODE.into(),
        cluster_name: CLUSTER.into(),
        imds,
        token_delegates: vec![ServiceAccountRef { namespace: "app".into(), name: "csi".into() }],
        ..fake_node::config(directory)
    }
}

/// The cluster and AWS, as the agent reaches them on a node.
fn services(config: &Config, clients: Clients, aws: &SdkConfig, clock: &Clock) -> Services<NodeSource> {
    let (_, instance) = watch::channel(Instance::default());
    let eks_auth = eks_auth::EksAuth::new(aws, CLUSTER, NODE, instance.clone());
    Services {
        source: NodeSource::new(&config.kubelet_root, &clients, eks_auth, Arc::clone(clock)),
        instance,
        cluster: Box::new(ApiServer { clients, node_name: NODE.into() }),
        background: vec![],
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
