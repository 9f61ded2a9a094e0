//! What the operator asked for: flags and environment, checked as a whole.
//!
//! Owns the one table of settings (name, variable, default, type, rule), and that everything wrong is reported at once;
//! never reads a file or asks a service.

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
    policy::{Defaults, ImdsMode, UnknownPods},
};

mod values;

/// Turns the table of settings into the flags, the parsed settings, and the step between the two, so that a setting is
/// one row.
macro_rules! settings {
    ($($(#[doc = $doc:literal])+ $flag:literal, $variable:literal, $default:expr
        => $field:ident: $type:ty = $rule:path;)+) => {
        /// The settings of `podgate run` as text. They are parsed by [`Config::parse`] and not by clap, which would stop
        /// at the first bad one.
        #[derive(Args, Clone, Debug)]
        pub struct Flags {
            $($(#[doc = $doc])+
            #[arg(long = $flag, env = $variable, default_value = $default, hide_default_value = $default.is_empty())]
            pub $field: String,)+
        }

        /// The settings of `podgate run`.
        #[derive(Clone, Debug, Serialize)]
        pub struct Config {
            $($(#[doc = $doc])+
            pub $field: $type,)+
        }

        impl Config {
            /// Checks every setting by itself.
            fn parse_each(flags: &Flags, problems: &mut Problems) -> Option<Self> {
                // First all of them: each problem is reported, not the first alone.
                $(let $field = problems.check($flag, &flags.$field, $rule);)+
                Some(Self { $($field: $field?,)+ })
            }
        }
    };
}

/// Where bpffs is mounted unless told otherwise.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";
/// Name of podgate's netdev unless told otherwise.
pub const DEFAULT_NETDEV: &str = "podgate0";
/// Where agents hand credentials over to each other unless told otherwise.
pub const DEFAULT_HANDOVER_DIR: &str = "/run/podgate-handover";
/// Where `podgate run` listens for the other commands unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/podgate/podgate.sock";

settings! {
    /// Name of the Kubernetes node this agent runs on.
    "node-name", "PODGATE_NODE_NAME", "" => node_name: String = values::node_name;
    /// Name of the EKS cluster.
    "cluster-name", "PODGATE_CLUSTER_NAME", "" => cluster_name: String = values::cluster_name;
    /// The kubelet's --cgroup-root: where kubepods is, below the cgroup2 mount.
    "cgroup-root", "PODGATE_CGROUP_ROOT", "/" => cgroup_root: PathBuf = values::absolute;
    /// The kubelet's --root-dir.
    "kubelet-root", "PODGATE_KUBELET_ROOT", "/var/lib/kubelet" => kubelet_root: PathBuf = values::absolute;
    /// Where bpffs is mounted.
    "bpffs", "PODGATE_BPFFS", DEFAULT_BPFFS => bpffs: PathBuf = values::absolute;
    /// What pods' connections to the instance metadata service get: off, audit, intercept or deny.
    "imds", "PODGATE_IMDS", "audit" => imds: ImdsMode = values::imds_mode;
    /// No annotation loosens the mode below this one: off, audit, intercept or deny.
    "imds-floor", "PODGATE_IMDS_FLOOR", "off" => imds_floor: ImdsMode = values::imds_mode;
    /// What the instance metadata service is for a pod that the agent has not seen yet, unless the cluster's mode is off:
    /// strict (podgate's, or a refusal while no podgate is alive) or as-known (as the strictest pod or namespace that is
    /// known has it, so that in audit such a pod reaches the node's role).
    "imds-unknown", "PODGATE_IMDS_UNKNOWN", "strict" => imds_unknown: UnknownPods = values::unknown_pods;
    /// Whether pods may use IMDSv1, which any server that fetches URLs can be tricked into: allow or deny.
    "imds-v1", "PODGATE_IMDS_V1", "deny" => imds_v1: bool = values::allow_or_deny;
    /// Whether pods in intercept that have no token volume are served at EKS Pod Identity's and ECS's addresses without a
    /// token, and with them whoever makes such a pod fetch a URL: allow or deny. A pod that has the volume must send its
    /// token either way.
    "tokenless", "PODGATE_TOKENLESS", "allow" => tokenless: bool = values::allow_or_deny;
    /// Whether raw and UDP packets from pods in intercept or deny to IMDS and to podgate are dropped too: auto (while
    /// there is such a pod) or off.
    "egress-filter", "PODGATE_EGRESS_FILTER", "auto" => egress_filter: bool = values::auto_or_off;
    /// Whether to report what pods in audit ask the instance metadata service for (credentials, user-data or something
    /// else): on or off.
    "audit-paths", "PODGATE_AUDIT_PATHS", "off" => audit_paths: bool = values::on_or_off;
    /// Where connections are redirected to: pod-identity (169.254.170.23 and its IPv6 counterpart, which podgate then
    /// has for itself), own (podgate's own pair of addresses) or auto (own while the EKS Pod Identity Agent is on the
    /// node, else pod-identity).
    "target", "PODGATE_TARGET", "auto" => target: TargetMode = values::target_mode;
    /// IPv4 address and port of podgate's own pair, or "none".
    "target-v4", "PODGATE_TARGET_V4", "169.254.175.1:80" => target_v4: Option<SocketAddrV4> = values::target_v4;
    /// IPv6 address and port of podgate's own pair, or "none".
    "target-v6", "PODGATE_TARGET_V6", "[fd70:6f64:6761:7465::1]:80" => target_v6: Option<SocketAddrV6> =
        values::target_v6;
    /// The EKS Pod Identity Agent: the pods of this DaemonSet, as NAMESPACE/NAME, or "none".
    "eks-agent", "PODGATE_EKS_AGENT", "kube-system/eks-pod-identity-agent" => eks_agent: Option<DaemonSetRef> =
        values::eks_agent;
    /// What pods' connections to EKS Pod Identity get while no podgate is alive: auto (the EKS Pod Identity Agent where
    /// it answers, else a refusal) or deny. Connections to the instance metadata service are always refused then.
    "when-down", "PODGATE_WHEN_DOWN", "auto" => when_down: WhenDown = values::when_down;
    /// Service accounts, as NAMESPACE/NAME separated by commas, whose pods may present the tokens of other pods on this
    /// node, as CSI drivers do. Each use is logged (target audit) and counted.
    "token-delegate", "PODGATE_TOKEN_DELEGATE", "" => token_delegates: Vec<ServiceAccountRef> =
        values::service_accounts;
    /// Whether the credentials of pods that are known to want them are fetched before they ask: auto or off.
    "prefetch", "PODGATE_PREFETCH", "auto" => prefetch: bool = values::auto_or_off;
    /// Name of the netdev that carries podgate's addresses.
    "netdev", "PODGATE_NETDEV", DEFAULT_NETDEV => netdev: String = values::netdev_name;
    /// Who the agent is at the API server: associated-node (it impersonates its own node, Kubernetes 1.36 and later) or
    /// own (whoever the kubeconfig or the service account says).
    "kube-identity", "PODGATE_KUBE_IDENTITY", "associated-node" => kube_identity: KubeIdentity =
        values::kube_identity;
    /// Address for probes and metrics.
    "admin", "PODGATE_ADMIN", "127.0.0.1:9163" => admin: SocketAddr = values::socket_addr;
    /// Socket for podgate's other commands; its directory is made private to root.
    "socket", "PODGATE_SOCKET", DEFAULT_SOCKET => socket: PathBuf = values::absolute;
    /// Directory that podgate's containers on this node share, where an agent hands its credentials over to its
    /// successor; it is made private to root.
    "handover-dir", "PODGATE_HANDOVER_DIR", DEFAULT_HANDOVER_DIR => handover_dir: PathBuf = values::absolute;
    /// Seconds that requests in flight get to finish after SIGTERM.
    "drain-secs", "PODGATE_DRAIN_SECS", "5" => drain: Duration = values::seconds;
    /// Format of the log: json or text.
    "log-format", "PODGATE_LOG_FORMAT", "json" => log_format: LogFormat = values::log_format;
    /// What is logged, as tracing's directives: info, debug, access=off,info, … With info,kernel=debug the programs in
    /// the kernel log what they decide about each connection attempt and ticket.
    "log-filter", "PODGATE_LOG_FILTER", "info" => log_filter: String = values::log_filter;
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

/// Where connections are redirected to.
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

/// What connections to EKS Pod Identity get while no podgate is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenDown {
    /// They go to the EKS Pod Identity Agent, where it answers; else they get `EPERM`.
    Auto,
    /// They get `EPERM`.
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
    /// Checks every setting, and that they go together.
    ///
    /// # Errors
    /// All that is wrong, not the first of it.
    pub fn parse(flags: &Flags) -> Result<Self, Vec<Problem>> {
        let mut problems = Problems::default();
        let config = Self::parse_each(flags, &mut problems);
        if let Some(config) = &config {
            let has_no_pair = config.target_v4.is_none() && config.target_v6.is_none();
            if has_no_pair && config.target != TargetMode::PodIdentity {
                problems.add(
                    "target-v4",
                    "is \"none\", and so is target-v6: pods' connections need one of the two",
                );
            }
        }
        match config {
            Some(config) if problems.0.is_empty() => Ok(config),
            _ => Err(problems.0),
        }
    }

    /// What pods get unless an annotation says otherwise.
    pub fn defaults(&self) -> Defaults {
        let Self { imds, imds_floor, imds_unknown, imds_v1, tokenless, .. } = *self;
        Defaults { imds, imds_floor, imds_unknown, imds_v1, tokenless }
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
