//! A pod: its cgroup and containers, its network namespace, its token volume, and the way into it.
//!
//! Owns what a pod is on the node. What it is at the API server is the cluster's.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Child,
};

use anyhow::Context as _;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::{
    cgroupfs::{self, Qos},
    enter::{Entry, RunDirectory, base_environment},
    process_id::Process,
    simulated_network::{NetNs, PodAddresses, wire_pod},
    simulated_node::Node,
};

/// Where the EKS webhook mounts the token volume.
const TOKEN_MOUNT: &str = "/run/secrets/pods.eks.amazonaws.com/serviceaccount";
const TOKEN_FILE: &str = "eks-pod-identity-token";
/// What the webhook injects in IPv4 and in IPv6 clusters.
const FULL_URI_V4: &str = "http://169.254.170.23/v1/credentials";
const FULL_URI_V6: &str = "http://[fd00:ec2::23]/v1/credentials";

/// What a pod should be like.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Namespace; made if it is not there.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Service account, of the same namespace; made if it is not there.
    pub service_account: String,
    /// IAM role associated with the service account; `None` leaves its association as it is.
    pub role: Option<String>,
    /// The pod's labels.
    pub labels: BTreeMap<String, String>,
    /// The pod's annotations.
    pub annotations: BTreeMap<String, String>,
    /// The `DaemonSet` of its namespace that controls it.
    pub daemon_set: Option<String>,
    /// Where the pod's cgroup lies.
    pub qos: Qos,
    /// Whether the pod lives in the node's network namespace.
    pub host_network: bool,
    /// Whether the pod has what the EKS webhook injects: the token volume, and the environment in its spec.
    pub token_volume: bool,
    /// The credentials URI that somebody has put into its spec by hand. A command must be given it, too.
    pub credentials_uri: Option<String>,
    /// The environment that a command in the pod has if it is not told otherwise.
    pub environment: EnvKind,
}

/// A pod on the node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// UID.
    pub uid: String,
    /// Service account, of the same namespace.
    pub service_account: String,
    /// The IAM role that the pod's service account was given.
    pub role: Option<String>,
    /// Whether the pod lives in the node's network namespace.
    pub host_network: bool,
    /// The pod's addresses; the node's on the host network.
    pub addresses: PodAddresses,
    /// The pod's cgroup.
    pub cgroup: PathBuf,
    /// The cgroup of the pod's one container.
    pub container: PathBuf,
    /// The sandbox: keeps the network namespace.
    pub sandbox: Process,
    /// The token volume's directory on the node.
    pub token_volume: Option<PathBuf>,
    /// The environment that a command in the pod has if it is not told otherwise.
    pub environment: EnvKind,
}

/// Which of the credential environments a command in a pod gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum EnvKind {
    /// Nothing injected.
    #[default]
    None,
    /// What the EKS webhook injects.
    Webhook,
    /// What ECS injects.
    Ecs,
}

// === impl PodSpec ===

impl PodSpec {
    /// A plain pod with a service account of the pod's own name and no role.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            service_account: name.to_owned(),
            role: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            daemon_set: None,
            qos: Qos::default(),
            host_network: false,
            token_volume: false,
            credentials_uri: None,
            environment: EnvKind::default(),
        }
    }

    /// The same with a role for its service account.
    #[must_use]
    pub fn role(mut self, role: &str) -> Self {
        self.role = Some(role.to_owned());
        self
    }

    /// The same with an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// The same with what the webhook injects.
    #[must_use]
    pub fn with_token(mut self) -> Self {
        self.token_volume = true;
        self
    }
}

// === impl Pod ===

impl Pod {
    /// `NAMESPACE/NAME`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The way to run something in the pod's container.
    pub fn entry(&self, environment: EnvKind) -> Entry {
        let token = self.token_volume.iter().map(|volume| (PathBuf::from(TOKEN_MOUNT), volume.clone()));
        let mut env = base_environment();
        let full_uri = if self.addresses.v4.is_some() { FULL_URI_V4 } else { FULL_URI_V6 };
        env.extend(environment.variables(full_uri));
        Entry {
            cgroup: self.container.clone(),
            netns: self.sandbox.netns(),
            run: RunDirectory::Own(token.collect()),
            env,
        }
    }

    /// Starts the pod `uid` on `node`. `index` is the pod's number on the node, for its addresses.
    pub(crate) fn start(
        node: &Node,
        spec: &PodSpec,
        uid: String,
        index: u16,
    ) -> anyhow::Result<(Self, Child)> {
        let cgroups = &node.place.cgroups;
        let cgroup = cgroups.pod(spec.qos, &uid);
        let sandbox_cgroup = cgroups.container(&cgroup, &container_id());
        let (sandbox, addresses) = if spec.host_network {
            (node.keep(&node.netns, &sandbox_cgroup)?, PodAddresses::of_host_network(node.routing))
        } else {
            let netns = NetNs::create()?;
            wire_pod(&node.netns, &netns, index, node.routing)
                .with_context(|| format!("cannot connect the pod {}/{}", spec.namespace, spec.name))?;
            (node.keep(&netns, &sandbox_cgroup)?, PodAddresses::of_pod(index, node.routing))
        };
        let container = cgroups.container(&cgroup, &container_id());
        cgroupfs::create(&container)?;
        let token_volume = spec.token_volume.then(|| {
            let volumes = node.place.kubelet().join("pods").join(&uid).join("volumes");
            volumes.join("kubernetes.io~projected").join(TOKEN_FILE)
        });
        let pod = Self {
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            uid,
            service_account: spec.service_account.clone(),
            role: spec.role.clone(),
            host_network: spec.host_network,
            addresses,
            cgroup,
            container,
            sandbox: Process::of(sandbox.id())?,
            token_volume,
            environment: spec.environment,
        };
        Ok((pod, sandbox))
    }

    /// Kills the pod's processes and removes the cgroups of its containers, but not its own.
    pub(crate) fn kill_containers(&self) -> anyhow::Result<()> {
        for entry in fs::read_dir(&self.cgroup)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                cgroupfs::remove(&entry.path())?;
            }
        }
        Ok(())
    }

    /// Kills the pod's processes and removes its cgroups and its kubelet directory.
    pub(crate) fn remove(&self, kubelet: &Path) -> anyhow::Result<()> {
        cgroupfs::remove(&self.cgroup)?;
        match fs::remove_dir_all(kubelet.join("pods").join(&self.uid)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove the volumes of {}", self.full_name()))
            }
            _ => Ok(()),
        }
    }
}

// === impl EnvKind ===

impl EnvKind {
    fn variables(self, full_uri: &str) -> BTreeMap<String, String> {
        let variables: &[(&str, &str)] = match self {
            Self::None => &[],
            Self::Webhook => &[
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", full_uri),
                (
                    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
                    "/var/run/secrets/pods.eks.amazonaws.com/serviceaccount/eks-pod-identity-token",
                ),
            ],
            Self::Ecs => &[("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v1/credentials")],
        };
        variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }
}

/// 64 hexadecimal digits, as containerd's.
pub(crate) fn container_id() -> String {
    let half = || uuid::Uuid::new_v4().simple().to_string();
    half() + &half()
}

/// Writes a token into its volume the way the kubelet does: a new directory, and one rename of a symlink, so
/// that a reader sees the old token or the new one.
pub(crate) fn write_token(volume: &Path, token: &str) -> anyhow::Result<()> {
    let stamp = format!("..{}", jiff::Timestamp::now().strftime("%Y_%m_%d_%H_%M_%S.%N"));
    let data = volume.join("..data");
    let earlier = fs::read_link(&data).ok();
    let write = || -> io::Result<()> {
        fs::create_dir_all(volume.join(&stamp))?;
        fs::write(volume.join(&stamp).join(TOKEN_FILE), token)?;
        symlink(&stamp, volume.join("..data_tmp"))?;
        fs::rename(volume.join("..data_tmp"), &data)?;
        match earlier {
            Some(earlier) => fs::remove_dir_all(volume.join(earlier)),
            None => symlink(Path::new("..data").join(TOKEN_FILE), volume.join(TOKEN_FILE)),
        }
    };
    write().with_context(|| format!("cannot write a token to {}", volume.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rotated_token_takes_the_place_of_the_old_one_behind_the_same_name() {
        let directory = std::env::temp_dir().join(format!("podgate-token-{}", uuid::Uuid::new_v4()));
        write_token(&directory, "first").unwrap();
        let token = directory.join(TOKEN_FILE);
        assert_eq!(fs::read_link(&token).unwrap(), Path::new("..data/eks-pod-identity-token"));
        assert_eq!(fs::read_to_string(&token).unwrap(), "first");
        write_token(&directory, "second").unwrap();
        assert_eq!(fs::read_to_string(&token).unwrap(), "second");
        // The token's name, ..data and one generation of it.
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 3);
        fs::remove_dir_all(directory).unwrap();
    }
}
