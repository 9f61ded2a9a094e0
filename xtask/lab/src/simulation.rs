//! A whole lab: the node, the servers it talks to, its pods, and the agent.
//!
//! Owns the order in which they start and stop. Everything is removed when the `Lab` is dropped.

mod exec;
mod lab_pods;

use std::{
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use parking_lot::{Mutex, MutexGuard};

use self::lab_pods::Pods;
use crate::{
    agent_process::{self, AgentProcess, AgentSpec},
    cgroupfs::{self, CgroupDriver},
    cluster::Cluster,
    eks_agent_process::{self, EksAgent},
    eks_auth_server::{EksAuth, EksAuthConfig, NodeCredentials},
    fault_injection::Faults,
    imds_server::{Imds, ImdsConfig},
    kube_api::{KubeApi, KubeUser},
    pod::{EnvKind, Pod, PodSpec, container_id},
    simulated_network::{NetNs, Routing, make_eks_agent_netdev},
    simulated_node::{NODE_NAME, Node},
    state::{self, Claim},
};

/// The name of the cluster in EKS.
pub const CLUSTER_NAME: &str = "lab";
/// The node's region.
pub const REGION: &str = "us-west-2";
/// The role of the node itself, which no pod may ever get.
pub const NODE_ROLE: &str = "lab-node-role";
/// The node's own access key.
pub const NODE_ACCESS_KEY_ID: &str = "ASIAPODGATENODEROLE0";

/// What the agent is deployed with.
const MANIFEST: &str = include_str!("../../../deploy/podgate.yaml");
const ACCOUNT: &str = "111122223333";
const ISSUER: &str = "https://oidc.eks.us-west-2.amazonaws.com/id/PODGATELAB";
const KUBE_API: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 6443);
const EKS_AUTH: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8081);
const IMDS: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), 80),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)), 80),
];
/// Lifetime of the credentials that EKS Auth issues, as on AWS.
pub(crate) const SESSION_DURATION: Duration = Duration::from_hours(6);

/// What a lab should be like.
#[derive(Clone, Debug)]
pub struct LabSpec {
    /// Name, unique on the machine: up to 24 of a-z, 0-9 and `-`.
    pub name: String,
    /// An executable with the hidden subcommand [`SUBCOMMAND`](crate::enter::SUBCOMMAND): xtask's.
    pub helper: PathBuf,
    /// How the kubelet names cgroups.
    pub driver: CgroupDriver,
    /// How the node routes its pods.
    pub routing: Routing,
    /// Whether this process does nothing else, so that `lab down` may stop it.
    pub served: bool,
}

/// A lab that is up.
#[derive(Debug)]
pub struct Lab {
    /// The objects at the API server.
    pub cluster: Cluster,
    /// The API server.
    pub kube_api: KubeApi,
    /// EKS Auth.
    pub eks_auth: EksAuth,
    /// The node's own metadata service.
    pub imds: Imds,
    /// The faults of the servers.
    pub faults: Faults,
    /// The node.
    pub node: Node,
    /// The agent's own pod.
    pub agent_pod: Pod,
    helper: PathBuf,
    pods: Mutex<Pods>,
    claim: Claim,
}

// === impl LabSpec ===

impl LabSpec {
    /// A lab as the kubelet of EKS lays it out.
    pub fn new(name: &str, helper: impl Into<PathBuf>) -> Self {
        Self {
            name: name.to_owned(),
            helper: helper.into(),
            driver: CgroupDriver::default(),
            routing: Routing::default(),
            served: false,
        }
    }
}

// === impl Lab ===

impl Lab {
    /// Brings a lab up, without pods but the agent's, and without the agent. Needs root, and a tokio runtime for
    /// the servers.
    pub fn up(spec: LabSpec) -> anyhow::Result<Self> {
        let (claim, mut state) = Claim::take(&spec.name, spec.served)?;
        let node = Node::up(
            &spec.name,
            &state::directory(&spec.name),
            spec.driver,
            spec.routing,
            spec.helper.clone(),
        )?;
        state.node = Some(node.place.clone());

        let faults = Faults::default();
        let cluster = Cluster::new(ISSUER);
        cluster.add_node(NODE_NAME);
        let kube_api = KubeApi::serve(node.netns.listen(KUBE_API)?, cluster.clone(), faults.clone())?;
        let credentials = node_credentials();
        let eks_auth = EksAuth::serve(
            node.netns.listen(EKS_AUTH)?,
            EksAuthConfig {
                cluster_name: CLUSTER_NAME.to_owned(),
                region: REGION.to_owned(),
                account: ACCOUNT.to_owned(),
                node: credentials.clone(),
                session: SESSION_DURATION,
            },
            cluster.clone(),
            faults.clone(),
        )?;
        let listeners: anyhow::Result<_> =
            IMDS.into_iter().map(|address| node.imds_netns.listen(address)).collect();
        let imds = Imds::serve(listeners?, imds_config(credentials), faults.clone())?;

        let mut pods = Pods::new(state)?;
        let agent_pod = pods.add(&node, &cluster, &agent_process::pod_spec("podgate-x7k2m"))?;
        // The agent has the rights that it is deployed with, and no more.
        kube_api.allow_node_audience(false);
        kube_api.apply_rbac(MANIFEST)?;
        let user = KubeUser::Pod { namespace: agent_pod.namespace.clone(), name: agent_pod.name.clone() };
        fs::write(kubeconfig(&node), kube_api.kubeconfig(&user)).context("cannot write the kubeconfig")?;
        Ok(Self {
            cluster,
            kube_api,
            eks_auth,
            imds,
            faults,
            node,
            agent_pod,
            helper: spec.helper,
            pods: Mutex::new(pods),
            claim,
        })
    }

    /// Takes everything down, and says what could not be.
    pub fn down(self) -> anyhow::Result<()> {
        self.claim.release()
    }

    /// Adds a pod: first at the API server, then on the node. Makes its namespace, its service account and the
    /// association with its role where they are missing.
    pub fn add_pod(&self, spec: &PodSpec) -> anyhow::Result<Pod> {
        self.associate_pod(spec);
        self.pods().add(&self.node, &self.cluster, spec)
    }

    /// The pod called `name`, as `NAMESPACE/NAME` or just `NAME`.
    pub fn pod(&self, name: &str) -> anyhow::Result<Pod> {
        self.pods().find(name)
    }

    /// The pods that have not ended.
    pub fn running_pods(&self) -> Vec<Pod> {
        self.pods().running()
    }

    /// Gives a service account a role, instead of the one it has.
    pub fn associate(&self, namespace: &str, service_account: &str, role: &str) -> anyhow::Result<()> {
        self.eks_auth.associate(namespace, service_account, role);
        self.pods().set_role(namespace, service_account, Some(role))
    }

    /// Takes a service account's role away.
    pub fn dissociate(&self, namespace: &str, service_account: &str) -> anyhow::Result<()> {
        if self.eks_auth.role_of(namespace, service_account).is_none() {
            bail!("the service account {namespace}/{service_account} has no pod identity association");
        }
        self.eks_auth.dissociate(namespace, service_account);
        self.pods().set_role(namespace, service_account, None)
    }

    /// Starts a pod on the node that the API server does not show yet: [`Lab::announce`] adds it there.
    pub fn start_unannounced(&self, spec: &PodSpec) -> anyhow::Result<Pod> {
        self.associate_pod(spec);
        self.pods().start(&self.node, spec)
    }

    /// Adds a pod of [`Lab::start_unannounced`] at the API server.
    pub fn announce(&self, pod: &Pod, spec: &PodSpec) -> anyhow::Result<()> {
        self.pods().announce(&self.cluster, pod, spec)
    }

    /// Gives a pod a new token, as the kubelet does from time to time.
    pub fn rotate_token(&self, pod: &Pod) -> anyhow::Result<()> {
        lab_pods::write_token(&self.cluster, pod)
    }

    /// A pod's network.
    pub fn netns(&self, pod: &Pod) -> anyhow::Result<NetNs> {
        NetNs::open(&pod.sandbox.netns())
    }

    /// Ends a pod on the node, as a job's that has completed: the API server still shows it with its address.
    pub fn complete_pod(&self, pod: &Pod) -> anyhow::Result<()> {
        self.pods().end(&self.node, pod)
    }

    /// Kills a pod's sandbox and makes another one for it, with another network, as the kubelet does where a sandbox has ended.
    pub fn restart_sandbox(&self, pod: &Pod, spec: &PodSpec) -> anyhow::Result<Pod> {
        self.pods().restart_sandbox(&self.node, &self.cluster, pod, spec)
    }

    /// Adds a pod that gets the address of one that has ended.
    pub fn add_pod_at(&self, spec: &PodSpec, ended: &Pod) -> anyhow::Result<Pod> {
        self.associate_pod(spec);
        self.pods().add_at(&self.node, &self.cluster, spec, ended)
    }

    /// Ends a pod: its processes, its cgroups, its volumes, then the object at the API server.
    pub fn delete_pod(&self, pod: &Pod) -> anyhow::Result<()> {
        self.pods().delete(&self.node, &self.cluster, pod)
    }

    /// Gives a pod the address of another running pod, as a faulty network plugin does: what is sent there
    /// arrives at `pod` from now on.
    pub fn double(&self, other: &Pod, pod: &Pod) -> anyhow::Result<()> {
        let (from, to) = (other.addresses.v4, pod.addresses.v4);
        let (Some(from), Some(to)) = (from, to) else { bail!("both pods must have an IPv4 address") };
        self.netns(pod)?.exchange_address(to, from)?;
        self.node.netns.reroute(from, to)
    }

    /// Starts the agent in a new container of its pod and waits until it serves.
    pub async fn start_agent(&self, spec: &AgentSpec) -> anyhow::Result<AgentProcess> {
        self.start_agent_in(&self.agent_pod, spec).await
    }

    /// Adds another pod of the agent, as a rolling update with a surge does.
    pub fn add_agent_pod(&self, name: &str) -> anyhow::Result<Pod> {
        self.pods().add(&self.node, &self.cluster, &agent_process::pod_spec(name))
    }

    /// Starts the agent in a new container of one of its pods and waits until it serves.
    pub async fn start_agent_in(&self, pod: &Pod, spec: &AgentSpec) -> anyhow::Result<AgentProcess> {
        let container = self.node.place.cgroups.container(&pod.cgroup, &container_id());
        cgroupfs::create(&container)?;
        // Only the agent that is started now may answer at the socket.
        match fs::remove_file(self.node.place.agent_socket()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let log = self.pods().next_log(&self.node);
        let file = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = self.agent_command(spec, &container)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("cannot start the agent")?;
        let mut agent = AgentProcess::new(child, log, container)?;
        agent.ready(&self.node).await?;
        self.pods().set_agent(agent.process())?;
        Ok(agent)
    }

    /// Starts the stand-in for the EKS Pod Identity Agent in its pod, its init container's work first, and waits until it
    /// serves. An error where a route or a listener is in its way.
    pub async fn start_eks_agent(&self, pod: &Pod) -> anyhow::Result<EksAgent> {
        make_eks_agent_netdev(&self.node.netns)?;
        EksAgent::start(self.exec(pod, EnvKind::None, &eks_agent_process::command())?).await
    }

    fn associate_pod(&self, spec: &PodSpec) {
        if let Some(role) = &spec.role {
            self.eks_auth.associate(&spec.namespace, &spec.service_account, role);
        }
    }

    fn pods(&self) -> MutexGuard<'_, Pods> {
        self.pods.lock()
    }
}

fn kubeconfig(node: &Node) -> PathBuf {
    node.place.directory.join("kubeconfig")
}

fn node_credentials() -> NodeCredentials {
    NodeCredentials {
        access_key_id: NODE_ACCESS_KEY_ID.to_owned(),
        secret_access_key: uuid::Uuid::new_v4().simple().to_string(),
        session_token: uuid::Uuid::new_v4().simple().to_string(),
    }
}

fn imds_config(credentials: NodeCredentials) -> ImdsConfig {
    ImdsConfig {
        region: REGION.to_owned(),
        zone: format!("{REGION}a"),
        role_name: NODE_ROLE.to_owned(),
        account: ACCOUNT.to_owned(),
        ..ImdsConfig::new(credentials)
    }
}
