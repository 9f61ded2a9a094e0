//! What the operator asked for: flags and environment, checked as a whole.
//!
//! Owns names, defaults and limits of every setting; never reads a file or asks a service.

use std::{
    fmt,
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use clap::Args;
use serde::Serialize;
use tracing_subscriber::EnvFilter;

use crate::{
    identity::DaemonSetRef,
    policy::{Defaults, ImdsMode},
};

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
    #[arg(long, env = "PODGATE_GUARD", default_value = "auto")]
    pub guard: String,
    /// Tell what pods in audit ask the instance metadata service for: credentials, user-data or something else.
    #[arg(long, env = "PODGATE_AUDIT_PATHS")]
    pub audit_paths: bool,
    /// Where dials are sent to: pod-identity (to 169.254.170.23 and its IPv6 counterpart, which podgate has for itself
    /// then), own (to podgate's own pair of addresses) or auto (own while AWS's own agent is on the node, else
    /// pod-identity).
    #[arg(long, env = "PODGATE_TARGET", default_value = "auto")]
    pub target: String,
    /// IPv4 address and port of podgate's own pair, or "none".
    #[arg(long, env = "PODGATE_TARGET_V4", default_value = "169.254.175.1:80")]
    pub target_v4: String,
    /// IPv6 address and port of podgate's own pair, or "none".
    #[arg(long, env = "PODGATE_TARGET_V6", default_value = "[fd70:6f64:6761:7465::1]:80")]
    pub target_v6: String,
    /// AWS's own agent: the pods of this daemon set, as NAMESPACE/NAME, or "none".
    #[arg(long, env = "PODGATE_STOCK_AGENT", default_value = "kube-system/eks-pod-identity-agent")]
    pub stock_agent: String,
    /// What pods' dials to EKS Pod Identity get while no podgate is alive: auto (AWS's own agent where it answers,
    /// else a refusal) or deny. Dials to the instance metadata service are always refused then.
    #[arg(long, env = "PODGATE_WHEN_DOWN", default_value = "auto")]
    pub when_down: String,
    /// Name of the network link that carries these addresses.
    #[arg(long, env = "PODGATE_LINK", default_value = DEFAULT_LINK)]
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
pub const DEFAULT_LINK: &str = "podgate0";

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
    /// Whose pods are AWS's own agent.
    pub stock_agent: Option<DaemonSetRef>,
    /// What dials to EKS Pod Identity get while no podgate is alive.
    pub when_down: WhenDown,
    /// Name of podgate's network link.
    pub link: String,
    /// Who the agent is at the API server.
    pub kube_identity: KubeIdentity,
    /// Address for probes and metrics.
    pub admin: SocketAddr,
    /// Socket for the other commands.
    pub socket: PathBuf,
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
    /// To podgate's own pair of addresses while AWS's own agent is on the node, else to EKS Pod Identity's.
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
    /// AWS's own agent, where it answers; else `EPERM`.
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
        let node_name = problems.check("node-name", &flags.node_name, node_name);
        let cluster_name = problems.check("cluster-name", &flags.cluster_name, cluster_name);
        let cgroup_root = problems.check("cgroup-root", &flags.cgroup_root, absolute);
        let kubelet_root = problems.check("kubelet-root", &flags.kubelet_root, absolute);
        let bpffs = problems.check("bpffs", &flags.bpffs, absolute);
        let imds = problems.check("imds", &flags.imds, imds_mode);
        let imds_floor = problems.check("imds-floor", &flags.imds_floor, imds_mode);
        let imds_v1 = problems.check("imds-v1", &flags.imds_v1, allow_or_deny);
        let guard = problems.check("guard", &flags.guard, auto_or_off);
        let target = problems.check("target", &flags.target, target_mode);
        let target_v4 = problems.check("target-v4", &flags.target_v4, target_v4);
        let target_v6 = problems.check("target-v6", &flags.target_v6, target_v6);
        let stock_agent = problems.check("stock-agent", &flags.stock_agent, stock_agent);
        let when_down = problems.check("when-down", &flags.when_down, when_down);
        let link = problems.check("link", &flags.link, link_name);
        let kube_identity = problems.check("kube-identity", &flags.kube_identity, kube_identity);
        let admin = problems.check("admin", &flags.admin, socket_addr);
        let socket = problems.check("socket", &flags.socket, absolute);
        let drain = problems.check("drain-secs", &flags.drain_secs, seconds);
        let log_format = problems.check("log-format", &flags.log_format, log_format);
        let log_filter = problems.check("log-filter", &flags.log_filter, log_filter);
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
                stock_agent: stock_agent?,
                when_down: when_down?,
                link: link?,
                kube_identity: kube_identity?,
                admin: admin?,
                socket: socket?,
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

// === the rules, one per kind of value ===

fn node_name(value: &str) -> Result<String, String> {
    let ok = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    match value {
        "" => Err("is missing: the DaemonSet sets it from spec.nodeName".into()),
        _ if value.len() <= 253 && value.chars().all(ok) => Ok(value.to_owned()),
        _ => Err(format!("is {value:?}: a Kubernetes node's name has lower-case letters, digits, - and .")),
    }
}

/// The pattern of `clusterName` in the EKS Auth model.
fn cluster_name(value: &str) -> Result<String, String> {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    match value {
        "" => Err("is missing: the name of the EKS cluster".into()),
        _ if value.len() <= 100
            && value.starts_with(|c: char| c.is_ascii_alphanumeric())
            && value.chars().all(ok) =>
        {
            Ok(value.to_owned())
        }
        _ => Err(format!("is {value:?}: at most 100 letters, digits, - and _, the first a letter or digit")),
    }
}

fn absolute(value: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(value);
    if path.is_absolute() { Ok(path) } else { Err(format!("is {value:?}: must be an absolute path")) }
}

fn imds_mode(value: &str) -> Result<ImdsMode, String> {
    ImdsMode::from_str(value).map_err(|()| format!("is {value:?}: one of off, audit, intercept, deny"))
}

fn allow_or_deny(value: &str) -> Result<bool, String> {
    match value {
        "allow" => Ok(true),
        "deny" => Ok(false),
        _ => Err(format!("is {value:?}: allow or deny")),
    }
}

fn auto_or_off(value: &str) -> Result<bool, String> {
    match value {
        "auto" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("is {value:?}: auto or off")),
    }
}

fn target_mode(value: &str) -> Result<TargetMode, String> {
    match value {
        "auto" => Ok(TargetMode::Auto),
        "pod-identity" => Ok(TargetMode::PodIdentity),
        "own" => Ok(TargetMode::Own),
        _ => Err(format!("is {value:?}: auto, pod-identity or own")),
    }
}

fn target_v4(value: &str) -> Result<Option<SocketAddrV4>, String> {
    if value == "none" {
        return Ok(None);
    }
    let target: SocketAddrV4 = value
        .parse()
        .map_err(|_| format!("is {value:?}: an IPv4 address and port as 169.254.175.1:80, or none"))?;
    // AWS's services are in the first three; NodeLocal DNSCache and the VPC CNI's gateway have one each.
    let is_taken = match target.ip().octets() {
        [169, 254, 169 | 170 | 172, _] | [169, 254, 20, 10] | [169, 254, 1, 1] => true,
        [first, second, ..] => (first, second) != (169, 254),
    };
    if is_taken {
        return Err(format!(
            "is {value:?}: must be link-local (169.254.0.0/16), and none that AWS or common add-ons use (169.254.169.0/24, \
             169.254.170.0/24, 169.254.172.0/24, 169.254.20.10, 169.254.1.1)"
        ));
    }
    nonzero(target.port()).map(|()| Some(target))
}

fn target_v6(value: &str) -> Result<Option<SocketAddrV6>, String> {
    if value == "none" {
        return Ok(None);
    }
    let target: SocketAddrV6 = value.parse().map_err(|_| {
        format!("is {value:?}: an IPv6 address and port as [fd70:6f64:6761:7465::1]:80, or none")
    })?;
    let is_aws_s = matches!(target.ip().segments(), [0xfd00, 0xec2, ..]);
    if !target.ip().is_unique_local() || is_aws_s {
        return Err(format!(
            "is {value:?}: must be unique local (fc00::/7), and not in AWS's fd00:ec2::/32; connect cannot be \
             redirected to a link-local IPv6 address"
        ));
    }
    nonzero(target.port()).map(|()| Some(target))
}

fn stock_agent(value: &str) -> Result<Option<DaemonSetRef>, String> {
    let is_name = |name: &str| node_name(name).is_ok();
    match value.split_once('/') {
        None if value == "none" => Ok(None),
        Some((namespace, name)) if is_name(namespace) && is_name(name) => {
            Ok(Some(DaemonSetRef { namespace: namespace.to_owned(), name: name.to_owned() }))
        }
        _ => Err(format!("is {value:?}: a DaemonSet as kube-system/eks-pod-identity-agent, or none")),
    }
}

fn when_down(value: &str) -> Result<WhenDown, String> {
    match value {
        "auto" => Ok(WhenDown::Auto),
        "deny" => Ok(WhenDown::Deny),
        _ => Err(format!("is {value:?}: auto or deny")),
    }
}

fn nonzero(port: u16) -> Result<(), String> {
    if port == 0 { Err("has port 0: pods need one that does not change".into()) } else { Ok(()) }
}

/// `IFNAMSIZ` leaves 15 bytes.
fn link_name(value: &str) -> Result<String, String> {
    let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if (1..=15).contains(&value.len()) && value.chars().all(ok) && value != "." && value != ".." {
        Ok(value.to_owned())
    } else {
        Err(format!("is {value:?}: 1 to 15 letters, digits, -, _ and ."))
    }
}

fn kube_identity(value: &str) -> Result<KubeIdentity, String> {
    match value {
        "associated-node" => Ok(KubeIdentity::AssociatedNode),
        "own" => Ok(KubeIdentity::Own),
        _ => Err(format!("is {value:?}: associated-node or own")),
    }
}

fn socket_addr(value: &str) -> Result<SocketAddr, String> {
    value.parse().map_err(|_| format!("is {value:?}: an address and port as 127.0.0.1:9163"))
}

fn seconds(value: &str) -> Result<Duration, String> {
    match value.parse() {
        Ok(seconds @ 0..=600) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("is {value:?}: whole seconds, 0 to 600")),
    }
}

fn log_format(value: &str) -> Result<LogFormat, String> {
    match value {
        "json" => Ok(LogFormat::Json),
        "text" => Ok(LogFormat::Text),
        _ => Err(format!("is {value:?}: json or text")),
    }
}

fn log_filter(value: &str) -> Result<String, String> {
    match EnvFilter::builder().parse(value) {
        Ok(_) => Ok(value.to_owned()),
        Err(error) => Err(format!("is {value:?}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        flags: Flags,
    }

    fn parse(args: &[&str]) -> Result<Config, Vec<Problem>> {
        let args = [&["podgate", "--node-name=n1", "--cluster-name=c1"], args].concat();
        Config::parse(&Cli::parse_from(args).flags)
    }

    #[test]
    fn the_defaults_are_valid() {
        let config = parse(&[]).unwrap();
        assert_eq!(
            config.defaults,
            Defaults { imds: ImdsMode::Audit, imds_floor: ImdsMode::Off, imds_v1: false }
        );
        assert_eq!((config.target, config.when_down), (TargetMode::Auto, WhenDown::Auto));
        assert_eq!(config.target_v4.unwrap().to_string(), "169.254.175.1:80");
        assert_eq!(config.target_v6.unwrap().to_string(), "[fd70:6f64:6761:7465::1]:80");
        assert_eq!(config.stock_agent.unwrap().to_string(), "kube-system/eks-pod-identity-agent");
        assert_eq!(config.kube_identity, KubeIdentity::AssociatedNode);
        assert!(config.guard && !config.audit_paths);
    }

    #[test]
    fn the_guard_and_the_audit_are_switched_by_their_flags() {
        let config = parse(&["--guard=off", "--audit-paths"]).unwrap();
        assert!(!config.guard && config.audit_paths);
    }

    #[test]
    fn every_bad_value_is_named_at_once() {
        let problems = parse(&[
            "--cgroup-root=kubepods",
            "--imds=maybe",
            "--imds-floor=low",
            "--imds-v1=yes",
            "--guard=on",
            "--target=both",
            "--target-v4=10.0.0.1:80",
            "--target-v6=[fe80::1]:80",
            "--stock-agent=eks-pod-identity-agent",
            "--when-down=pass",
            "--link=a-name-that-is-too-long",
            "--kube-identity=admin",
            "--admin=9163",
            "--drain-secs=-1",
            "--log-format=xml",
            "--log-filter=a=b=c",
        ])
        .unwrap_err();
        let flags: Vec<_> = problems.iter().map(|problem| problem.flag).collect();
        assert_eq!(
            flags,
            [
                "cgroup-root",
                "imds",
                "imds-floor",
                "imds-v1",
                "guard",
                "target",
                "target-v4",
                "target-v6",
                "stock-agent",
                "when-down",
                "link",
                "kube-identity",
                "admin",
                "drain-secs",
                "log-format",
                "log-filter"
            ]
        );
    }

    #[test]
    fn an_address_that_others_use_is_not_podgate_s_own() {
        for taken in ["169.254.169.254", "169.254.170.23", "169.254.172.9", "169.254.20.10", "169.254.1.1"] {
            assert!(parse(&[&format!("--target-v4={taken}:80")]).is_err(), "{taken}");
        }
        for taken in ["fd00:ec2::254", "fd00:ec2::23", "fd00:ec2:1::1", "fe80::1", "2001:db8::1"] {
            assert!(parse(&[&format!("--target-v6=[{taken}]:80")]).is_err(), "{taken}");
        }
        for free in ["--target-v4=169.254.171.23:8080", "--target-v6=[fd0d:6a7e::23]:80"] {
            assert!(parse(&[free]).is_ok(), "{free}");
        }
    }

    #[test]
    fn podgate_has_addresses_of_its_own_unless_it_always_has_pod_identity_s() {
        let none = ["--target-v4=none", "--target-v6=none"];
        for (target, is_valid) in [("auto", false), ("own", false), ("pod-identity", true)] {
            let target = format!("--target={target}");
            assert_eq!(parse(&[&none[..], &[&target]].concat()).is_ok(), is_valid, "{target}");
        }
    }

    #[test]
    fn a_node_may_be_without_a_stock_agent() {
        assert_eq!(parse(&["--stock-agent=none"]).unwrap().stock_agent, None);
        for bad in ["--stock-agent=", "--stock-agent=a/b/c", "--stock-agent=/agent", "--stock-agent=aws/"] {
            assert!(parse(&[bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_missing_name_is_a_problem_and_not_a_panic() {
        let cli = Cli::parse_from(["podgate", "--node-name=", "--cluster-name="]);
        let problems = Config::parse(&cli.flags).unwrap_err();
        assert_eq!(problems.iter().map(|p| p.flag).collect::<Vec<_>>(), ["node-name", "cluster-name"]);
    }
}
