//! What the operator asked for: flags and environment, checked as a whole.
//!
//! Owns the names and defaults of every setting, and that all that is wrong is said at once; never reads a file or asks a service.

use std::{
    fmt,
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    path::PathBuf,
    time::Duration,
};

use clap::Args;
use serde::Serialize;

use crate::{
    identity::{DaemonSetRef, ServiceAccountRef},
    policy::Defaults,
};

mod rules;

/// The settings of `podgate run` as text. They are parsed by [`Config::parse`] and not by clap, which would
/// stop at the first bad one.
#[derive(Args, Clone, Debug)]
pub struct Flags {
    /// Name of the Kubernetes node this agent runs on.
    #[arg(long, env = "PODGATE_NODE_NAME", default_value = "", hide_default_value = true)]
    pub node_name: String,
    /// Name of the EKS cluster.
    #[arg(long, env = "PODGATE_CLUSTER_NAME", default_value = "", hide_default_value = true)]
    pub cluster_name: String,
    /// The kubelet's --cgroup-root: where kubepods is, below the cgroup2 mount.
    #[arg(long, env = "PODGATE_CGROUP_ROOT", default_value = "/")]
    pub cgroup_root: String,
    /// The kubelet's --root-dir.
    #[arg(long, env = "PODGATE_KUBELET_ROOT", default_value = "/var/lib/kubelet")]
    pub kubelet_root: String,
    /// Where bpffs is mounted.
    #[arg(long, env = "PODGATE_BPFFS", default_value = DEFAULT_BPFFS)]
    pub bpffs: String,
    /// What a pod's dials to the instance metadata service get: off, audit, intercept or deny.
    #[arg(long, env = "PODGATE_IMDS", default_value = "audit")]
    pub imds: String,
    /// No annotation loosens the mode below this one: off, audit, intercept or deny.
    #[arg(long, env = "PODGATE_IMDS_FLOOR", default_value = "off")]
    pub imds_floor: String,
    /// Whether pods may use IMDSv1, which any server that fetches URLs can be tricked into: allow or deny.
    #[arg(long, env = "PODGATE_IMDS_V1", default_value = "deny")]
    pub imds_v1: String,
    /// Whether raw and UDP packets to IMDS and to podgate are stopped too, of pods in intercept or deny: auto (while
    /// there is such a pod) or off.
    #[arg(long, env = "PODGATE_EGRESS_FILTER", default_value = "auto")]
    pub guard: String,
    /// Tell what pods in audit ask the instance metadata service for: credentials, user-data or something else.
    #[arg(long, env = "PODGATE_AUDIT_PATHS")]
    pub audit_paths: bool,
    /// Where dials are sent to: pod-identity (to 169.254.170.23 and its IPv6 counterpart, which podgate has for itself
    /// then), own (to podgate's own pair of addresses) or auto (own while the EKS Pod Identity Agent is on the node, else
    /// pod-identity).
    #[arg(long, env = "PODGATE_TARGET", default_value = "auto")]
    pub target: String,
    /// IPv4 address and port of podgate's own pair, or "none".
    #[arg(long, env = "PODGATE_TARGET_V4", default_value = "169.254.175.1:80")]
    pub target_v4: String,
    /// IPv6 address and port of podgate's own pair, or "none".
    #[arg(long, env = "PODGATE_TARGET_V6", default_value = "[fd70:6f64:6761:7465::1]:80")]
    pub target_v6: String,
    /// the EKS Pod Identity Agent: the pods of this daemon set, as NAMESPACE/NAME, or "none".
    #[arg(long, env = "PODGATE_EKS_AGENT", default_value = "kube-system/eks-pod-identity-agent")]
    pub eks_agent: String,
    /// What pods' dials to EKS Pod Identity get while no podgate is alive: auto (the EKS Pod Identity Agent where it answers,
    /// else a refusal) or deny. Dials to the instance metadata service are always refused then.
    #[arg(long, env = "PODGATE_WHEN_DOWN", default_value = "auto")]
    pub when_down: String,
    /// Service accounts, as NAMESPACE/NAME with commas between them, whose pods may present the tokens of other pods on
    /// this node, as CSI drivers do. Each use is logged (target audit) and counted.
    #[arg(long, env = "PODGATE_TOKEN_DELEGATE", default_value = "", hide_default_value = true)]
    pub token_delegate: String,
    /// Whether the credentials of pods that are known to want them are fetched before they ask: auto or off.
    #[arg(long, env = "PODGATE_PREFETCH", default_value = "auto")]
    pub prefetch: String,
    /// Name of the network link that carries these addresses.
    #[arg(long, env = "PODGATE_NETDEV", default_value = DEFAULT_NETDEV)]
    pub link: String,
    /// Who the agent is at the API server: associated-node (impersonate the own node, Kubernetes 1.36 and
    /// later) or own (whoever the kubeconfig or the service account says).
    #[arg(long, env = "PODGATE_KUBE_IDENTITY", default_value = "associated-node")]
    pub kube_identity: String,
    /// Address for probes and metrics.
    #[arg(long, env = "PODGATE_ADMIN", default_value = "127.0.0.1:9163")]
    pub admin: String,
    /// Socket for podgate's other commands; its directory is made private to root.
    #[arg(long, env = "PODGATE_SOCKET", default_value = DEFAULT_SOCKET)]
    pub socket: String,
    /// Directory that podgate's containers on this node share, where an agent gives its credentials to the one that takes
    /// its place; it is made private to root.
    #[arg(long, env = "PODGATE_HANDOVER_DIR", default_value = DEFAULT_HANDOVER_DIR)]
    pub handover_dir: String,
    /// Seconds that requests in flight get to finish after SIGTERM.
    #[arg(long, env = "PODGATE_DRAIN_SECS", default_value = "5")]
    pub drain_secs: String,
    /// Format of the log: json or text.
    #[arg(long, env = "PODGATE_LOG_FORMAT", default_value = "json")]
    pub log_format: String,
    /// What is logged, as tracing's directives: info, debug, access=off,info, … With info,kernel=debug the programs in
    /// the kernel log what they decide about each dial and ticket.
    #[arg(long, env = "PODGATE_LOG_FILTER", default_value = "info")]
    pub log_filter: String,
}

/// Where bpffs is mounted unless told otherwise.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";

/// Name of podgate's network link unless told otherwise.
pub const DEFAULT_NETDEV: &str = "podgate0";

/// Where agents hand credentials over to each other unless told otherwise.
pub const DEFAULT_HANDOVER_DIR: &str = "/run/podgate-handover";

/// Where `podgate run` listens for the other commands unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/podgate/podgate.sock";

/// The settings of `podgate run`.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    /// Name of the Kubernetes node.
    pub node_name: String,
    /// Name of the EKS cluster.
    pub cluster_name: String,
    /// The kubelet's `--cgroup-root`, relative to the cgroup2 mount.
    pub cgroup_root: PathBuf,
    /// The kubelet's `--root-dir`.
    pub kubelet_root: PathBuf,
    /// Where bpffs is mounted.
    pub bpffs: PathBuf,
    /// What pods get unless something more particular says otherwise.
    pub defaults: Defaults,
    /// Whether what `connect` does not see is guarded.
    pub guard: bool,
    /// Whether what pods in `audit` ask for is told.
    pub audit_paths: bool,
    /// Where dials are sent to.
    pub target: TargetMode,
    /// IPv4 side of podgate's own pair.
    pub target_v4: Option<SocketAddrV4>,
    /// IPv6 side of podgate's own pair.
    pub target_v6: Option<SocketAddrV6>,
    /// LimitKey pods are the EKS Pod Identity Agent.
    pub eks_agent: Option<DaemonSetRef>,
    /// What dials to EKS Pod Identity get while no podgate is alive.
    pub when_down: WhenDown,
    /// LimitKey pods may present the tokens of other pods.
    pub token_delegates: Vec<ServiceAccountRef>,
    /// Whether credentials are fetched before pods ask.
    pub prefetch: bool,
    /// Name of podgate's network link.
    pub link: String,
    /// Who the agent is at the API server.
    pub kube_identity: KubeIdentity,
    /// Address for probes and metrics.
    pub admin: SocketAddr,
    /// Socket for the other commands.
    pub socket: PathBuf,
    /// Where credentials change hands between agents.
    pub handover_dir: PathBuf,
    /// How long requests in flight get to finish.
    pub drain: Duration,
    /// Format of the log.
    pub log_format: LogFormat,
    /// Directives of the log, checked.
    pub log_filter: String,
}

/// Who the agent is at the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum KubeIdentity {
    /// Its own node, by constrained impersonation (KEP-5284): the Node authorizer limits it to its own pods.
    AssociatedNode,
    /// Whoever the kubeconfig or the service account says: a node's credential, or a service account with
    /// plain RBAC.
    Own,
}

/// Where dials are sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TargetMode {
    /// To podgate's own pair of addresses while the EKS Pod Identity Agent is on the node, else to EKS Pod Identity's.
    Auto,
    /// To EKS Pod Identity's addresses, which podgate has for itself.
    PodIdentity,
    /// To podgate's own pair.
    Own,
}

/// What dials to EKS Pod Identity get while no podgate is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenDown {
    /// the EKS Pod Identity Agent, where it answers; else `EPERM`.
    Auto,
    /// `EPERM`.
    Deny,
}

/// Format of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

/// One bad setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The flag, without its dashes.
    pub flag: &'static str,
    /// What is wrong with its value, and what would be right.
    pub reason: String,
}

// === impl Config ===

impl Config {
    /// Checks every setting.
    ///
    /// # Errors
    /// All that is wrong, not the first of it.
    pub fn parse(flags: &Flags) -> Result<Self, Vec<Problem>> {
        let mut problems = Problems::default();
        let node_name = problems.check("node-name", &flags.node_name, rules::node_name);
        let cluster_name = problems.check("cluster-name", &flags.cluster_name, rules::cluster_name);
        let cgroup_root = problems.check("cgroup-root", &flags.cgroup_root, rules::absolute);
        let kubelet_root = problems.check("kubelet-root", &flags.kubelet_root, rules::absolute);
        let bpffs = problems.check("bpffs", &flags.bpffs, rules::absolute);
        let imds = problems.check("imds", &flags.imds, rules::imds_mode);
        let imds_floor = problems.check("imds-floor", &flags.imds_floor, rules::imds_mode);
        let imds_v1 = problems.check("imds-v1", &flags.imds_v1, rules::allow_or_deny);
        let guard = problems.check("egress-filter", &flags.guard, rules::auto_or_off);
        let target = problems.check("target", &flags.target, rules::target_mode);
        let target_v4 = problems.check("target-v4", &flags.target_v4, rules::target_v4);
        let target_v6 = problems.check("target-v6", &flags.target_v6, rules::target_v6);
        let eks_agent = problems.check("eks-agent", &flags.eks_agent, rules::eks_agent);
        let when_down = problems.check("when-down", &flags.when_down, rules::when_down);
        let token_delegates =
            problems.check("token-delegate", &flags.token_delegate, rules::service_accounts);
        let prefetch = problems.check("prefetch", &flags.prefetch, rules::auto_or_off);
        let link = problems.check("link", &flags.link, rules::netdev_name);
        let kube_identity = problems.check("kube-identity", &flags.kube_identity, rules::kube_identity);
        let admin = problems.check("admin", &flags.admin, rules::socket_addr);
        let socket = problems.check("socket", &flags.socket, rules::absolute);
        let handover_dir = problems.check("handover-dir", &flags.handover_dir, rules::absolute);
        let drain = problems.check("drain-secs", &flags.drain_secs, rules::seconds);
        let log_format = problems.check("log-format", &flags.log_format, rules::log_format);
        let log_filter = problems.check("log-filter", &flags.log_filter, rules::log_filter);
        let has_no_pair = target_v4 == Some(None) && target_v6 == Some(None);
        if has_no_pair && target != Some(TargetMode::PodIdentity) {
            problems.add("target-v4", "is \"none\", and so is target-v6: pods' dials need one of the two");
        }
        let config = || {
            Some(Self {
                node_name: node_name?,
                cluster_name: cluster_name?,
                cgroup_root: cgroup_root?,
                kubelet_root: kubelet_root?,
                bpffs: bpffs?,
                defaults: Defaults { imds: imds?, imds_floor: imds_floor?, imds_v1: imds_v1? },
                guard: guard?,
                audit_paths: flags.audit_paths,
                target: target?,
                target_v4: target_v4?,
                target_v6: target_v6?,
                eks_agent: eks_agent?,
                when_down: when_down?,
                token_delegates: token_delegates?,
                prefetch: prefetch?,
                link: link?,
                kube_identity: kube_identity?,
                admin: admin?,
                socket: socket?,
                handover_dir: handover_dir?,
                drain: drain?,
                log_format: log_format?,
                log_filter: log_filter?,
            })
        };
        match config() {
            Some(config) if problems.0.is_empty() => Ok(config),
            _ => Err(problems.0),
        }
    }
}

// === impl Problem ===

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--{} {}", self.flag, self.reason)
    }
}

// === Problems ===

#[derive(Default)]
struct Problems(Vec<Problem>);

impl Problems {
    fn add(&mut self, flag: &'static str, reason: impl Into<String>) {
        self.0.push(Problem { flag, reason: reason.into() });
    }

    fn check<T>(
        &mut self,
        flag: &'static str,
        value: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        parse(value).map_err(|reason| self.add(flag, reason)).ok()
    }
}

#[cfg(test)]
mod tests;
