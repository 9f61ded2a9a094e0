//! Which module of the agent may import which, and what it may reach outside: the one table.
//!
//! An allow-list: a module without a row fails, and so does a circle. What is restricted is a capability (to read files, to
//! speak to a service, to load programs), never a plain value such as an address. A later stage of a flow knows the types
//! of an earlier one and never the reverse.

use self::Capability::{Aws, Bpf, Clock, Files, Kubernetes, Network, Processes};

/// Something that reaches beyond the module that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Capability {
    /// Files and directories.
    Files,
    /// Sockets, of the network and of Unix, and netlink.
    Network,
    /// Other programs.
    Processes,
    /// The API server.
    Kubernetes,
    /// AWS.
    Aws,
    /// The kernel's programs and maps.
    Bpf,
    /// The time of day. Elsewhere it is an argument.
    Clock,
}

/// A row of the table: it covers the module, and all below it that has no row of its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// The module, `crate` for the root.
    pub(super) module: &'static str,
    /// The modules that it may import; `::*` stands for the module and all below it. Its own parts need no mention.
    pub(super) imports: &'static [&'static str],
    /// What it may reach.
    pub(super) may: &'static [Capability],
}

/// What gives a capability: a path, or the beginning of one.
const CAPABILITIES: &[(&str, Capability)] = &[
    ("std::fs", Files),
    ("tokio::fs", Files),
    ("rustix::fs", Files),
    ("std::net::TcpStream", Network),
    ("std::net::TcpListener", Network),
    ("std::net::UdpSocket", Network),
    ("std::os::unix::net", Network),
    ("tokio::net", Network),
    ("rustix::net", Network),
    ("rtnetlink", Network),
    ("hyper::client", Network),
    ("hyper_util::client", Network),
    ("std::process::Command", Processes),
    ("tokio::process", Processes),
    ("kube", Kubernetes),
    ("aws_config", Aws),
    ("aws_sdk_eksauth", Aws),
    ("aws_smithy_http_client", Aws),
    ("aws_smithy_runtime_api", Aws),
    ("aya", Bpf),
    ("aya_log", Bpf),
    ("aya_obj", Bpf),
    ("SystemTime::now", Clock),
    ("Timestamp::now", Clock),
];

/// Every module of the agent.
pub(super) const AGENT: &[Rule] = &[
    Rule { module: "crate", imports: &[], may: &[] },
    Rule { module: "accept", imports: &["drain", "identity", "intercept"], may: &[Network] },
    Rule { module: "accept::in_pod", imports: &["accept"], may: &[Files, Network] },
    Rule {
        module: "admin",
        imports: &["files", "error", "identity::peer", "undefended", "whois"],
        may: &[Files, Network],
    },
    Rule {
        module: "app",
        imports: &[
            "accept",
            "admin",
            "config",
            "control::*",
            "credentials::*",
            "dialect::*",
            "drain",
            "error",
            "identity::*",
            "instance_metadata",
            "intercept::*",
            "netdev::*",
            "policy::*",
            "serve::*",
            "takeover::*",
            "tasks",
            "whois",
        ],
        may: &[Clock, Kubernetes],
    },
    Rule { module: "bpf", imports: &[], may: &[Bpf] },
    Rule {
        module: "cli",
        imports: &[
            "files",
            "app",
            "config",
            "control::fence",
            "error",
            "intercept",
            "mapdump::*",
            "netdev::*",
            "preflight",
            "takeover::*",
            "telemetry",
            "undefended",
            "whois",
        ],
        may: &[Network],
    },
    Rule { module: "config", imports: &["identity", "policy", "policy::rules"], may: &[] },
    Rule {
        module: "control",
        imports: &["credentials::source", "identity::*", "intercept::*", "log_limit", "policy::*", "serve"],
        may: &[],
    },
    Rule {
        module: "control::fence",
        imports: &["identity::sandboxes", "intercept", "netdev", "netdev::inventory"],
        may: &[],
    },
    Rule { module: "credentials", imports: &["error", "identity", "secret"], may: &[] },
    Rule {
        module: "credentials::aws",
        imports: &["error", "identity", "instance_metadata", "secret"],
        may: &[Aws, Clock, Files],
    },
    Rule {
        module: "credentials::cache",
        imports: &[
            "credentials::aws::eks_auth",
            "credentials::freshness",
            "credentials::metrics",
            "credentials::scheduler::*",
            "credentials::source",
            "credentials::token",
            "credentials::token::claims",
            "credentials::token::verifier",
            "identity",
            "secret",
        ],
        may: &[],
    },
    Rule { module: "credentials::freshness", imports: &[], may: &[] },
    Rule { module: "credentials::kube_identity", imports: &["config"], may: &[Kubernetes] },
    Rule { module: "credentials::metrics", imports: &["credentials::scheduler"], may: &[] },
    Rule { module: "credentials::scheduler", imports: &["credentials::freshness", "identity"], may: &[] },
    Rule {
        module: "credentials::source",
        imports: &[
            "credentials::aws::eks_auth",
            "credentials::kube_identity",
            "credentials::token::*",
            "error",
            "identity",
            "secret",
        ],
        may: &[],
    },
    Rule {
        module: "credentials::token",
        imports: &["credentials::freshness", "error", "identity", "identity::pods", "secret"],
        may: &[Files, Kubernetes],
    },
    Rule { module: "credentials::token::claims", imports: &["identity", "secret"], may: &[] },
    Rule { module: "credentials::token::jwks", imports: &["credentials::token::claims"], may: &[] },
    Rule {
        module: "credentials::token::fake_cluster",
        imports: &["identity", "secret", "testing"],
        may: &[Clock, Kubernetes],
    },
    Rule {
        module: "dialect",
        imports: &[
            "credentials",
            "credentials::token::claims",
            "identity",
            "instance_metadata",
            "policy",
            "secret",
        ],
        may: &[],
    },
    Rule { module: "drain", imports: &[], may: &[] },
    Rule { module: "error", imports: &[], may: &[] },
    Rule { module: "files", imports: &[], may: &[Files] },
    Rule { module: "identity", imports: &[], may: &[Files, Kubernetes, Network] },
    Rule { module: "identity::cgroup", imports: &[], may: &[] },
    Rule { module: "identity::injection", imports: &[], may: &[] },
    Rule { module: "identity::peer", imports: &["identity::cgroup", "identity::cgroupfs"], may: &[] },
    Rule { module: "identity::pod", imports: &["identity::cgroup", "identity::injection"], may: &[] },
    Rule { module: "identity::watch", imports: &["identity"], may: &[] },
    Rule { module: "instance_metadata", imports: &["error"], may: &[Aws] },
    Rule { module: "instance_metadata::exposure", imports: &[], may: &[Network] },
    Rule {
        module: "intercept",
        imports: &["files", "bpf::*", "error", "undefended"],
        may: &[Bpf, Files, Network],
    },
    Rule { module: "intercept::error", imports: &["error"], may: &[] },
    Rule { module: "intercept::metrics", imports: &[], may: &[] },
    Rule { module: "intercept::settings", imports: &[], may: &[] },
    Rule { module: "log_limit", imports: &[], may: &[] },
    Rule { module: "mapdump", imports: &["bpf::*"], may: &[Bpf, Files] },
    Rule { module: "mapdump::btf", imports: &[], may: &[] },
    Rule { module: "mapdump::json", imports: &[], may: &[] },
    Rule {
        module: "mapdump::print",
        imports: &["mapdump::json", "mapdump::pinned", "mapdump::value"],
        may: &[],
    },
    Rule { module: "mapdump::value", imports: &["mapdump::btf", "mapdump::json"], may: &[] },
    Rule { module: "netdev", imports: &[], may: &[Network] },
    Rule { module: "policy", imports: &["identity"], may: &[] },
    Rule { module: "preflight", imports: &["config", "identity::cgroupfs"], may: &[Bpf, Files] },
    Rule { module: "secret", imports: &[], may: &[] },
    Rule {
        module: "serve",
        imports: &[
            "accept",
            "credentials",
            "credentials::cache",
            "credentials::source",
            "credentials::token::claims",
            "dialect::*",
            "drain",
            "identity::*",
            "instance_metadata",
            "intercept",
            "log_limit",
            "policy::*",
            "undefended",
        ],
        may: &[Clock, Network],
    },
    Rule { module: "serve::access_log", imports: &["dialect", "identity", "serve::connection"], may: &[] },
    Rule { module: "serve::error_response", imports: &["credentials", "dialect", "identity"], may: &[] },
    Rule { module: "serve::limit", imports: &["identity", "log_limit"], may: &[] },
    Rule { module: "serve::metrics", imports: &["dialect", "identity"], may: &[] },
    Rule {
        module: "takeover",
        imports: &[
            "accept",
            "config",
            "credentials::source",
            "drain",
            "intercept::*",
            "netdev",
            "serve",
            "tasks",
        ],
        may: &[Network],
    },
    Rule { module: "takeover::heartbeat_task", imports: &[], may: &[] },
    Rule {
        module: "takeover::pod_listeners",
        imports: &[
            "accept",
            "drain",
            "identity",
            "identity::networks",
            "intercept",
            "log_limit",
            "takeover",
            "takeover::dataplane",
            "takeover::listeners",
            "takeover::pod_networks",
        ],
        may: &[],
    },
    Rule {
        module: "takeover::pod_networks",
        imports: &["accept::in_pod", "identity::cgroupfs", "identity::netns", "identity::pod_network"],
        may: &[],
    },
    Rule { module: "takeover::shutdown", imports: &["takeover::dataplane"], may: &[] },
    Rule { module: "takeover::standby", imports: &["intercept", "takeover::dataplane"], may: &[] },
    Rule {
        module: "takeover::transfer",
        imports: &[
            "files",
            "credentials",
            "credentials::cache",
            "credentials::source",
            "identity",
            "identity::peer",
            "intercept",
            "log_limit",
        ],
        may: &[Files, Network],
    },
    Rule { module: "takeover::transfer::session", imports: &["intercept"], may: &[] },
    Rule {
        module: "takeover::transfer::wire",
        imports: &["credentials", "credentials::cache", "identity", "takeover::transfer::session"],
        may: &[],
    },
    Rule { module: "tasks", imports: &[], may: &[] },
    Rule { module: "telemetry", imports: &["config"], may: &[] },
    Rule {
        module: "testing",
        imports: &[
            "accept",
            "app::seams",
            "config",
            "control::*",
            "credentials::*",
            "dialect::*",
            "identity::*",
            "instance_metadata",
            "intercept::*",
            "mapdump",
            "policy::*",
            "secret",
            "serve::*",
            "takeover::*",
        ],
        may: &[Clock, Files, Network],
    },
    Rule { module: "undefended", imports: &["identity"], may: &[Network] },
    Rule { module: "undefended_main", imports: &[], may: &[] },
    Rule { module: "whois", imports: &["error", "identity::*", "policy::*"], may: &[] },
];

// === impl Rule ===

impl Rule {
    /// Whether a module that this row covers may import another one of its crate. What is above a module in the tree holds
    /// the types that its parts share, and is free to it.
    pub(super) fn allows(&self, from: &[String], to: &[String]) -> bool {
        if !to.is_empty() && from.starts_with(to) {
            return true;
        }
        let to = name(to);
        covers(self.module, &to)
            || self.imports.iter().any(|allowed| match allowed.strip_suffix("::*") {
                Some(tree) => covers(tree, &to),
                None => to == *allowed,
            })
    }
}

/// The row that covers a module: the most particular one.
pub(super) fn rule_of<'a>(rules: &'a [Rule], module: &[String]) -> Option<&'a Rule> {
    let name = name(module);
    rules.iter().filter(|rule| covers(rule.module, &name)).max_by_key(|rule| rule.module.len())
}

/// The capability that a path gives.
pub(super) fn capability_of(path: &[String]) -> Option<Capability> {
    let path = path.join("::");
    CAPABILITIES.iter().find(|(prefix, _)| covers(prefix, &path)).map(|(_, capability)| *capability)
}

/// A module as people write it.
pub(super) fn name(module: &[String]) -> String {
    if module.is_empty() { "crate".to_owned() } else { module.join("::") }
}

/// Whether `path` is `prefix`, or below it.
fn covers(prefix: &str, path: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}
