//! The pods of a lab: on the node, and at the API server.
//!
//! Owns the lab's state file. Never enters a pod.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    process::Child,
    time::Duration,
};

use anyhow::Context as _;

use crate::{
    cluster::{self, Cluster},
    pod::{self, Pod, PodSpec},
    process_id::Process,
    simulated_node::{NODE_NAME, Node},
    state::State,
};

const AUDIENCE: &str = "pods.eks.amazonaws.com";
/// Life of a projected token: what the EKS webhook asks for.
const TOKEN_LIFE: Duration = Duration::from_hours(24);

/// The pods, and what else changes while a lab is up.
#[derive(Debug)]
pub(super) struct Pods {
    state: State,
    sandboxes: BTreeMap<String, Child>,
    namespaces: BTreeSet<String>,
    service_accounts: BTreeSet<(String, String)>,
    next_index: u16,
    next_log: u32,
}

// === impl Pods ===

impl Pods {
    pub(super) fn new(state: State) -> anyhow::Result<Self> {
        state.save()?;
        Ok(Self {
            state,
            sandboxes: BTreeMap::new(),
            // Every cluster has these.
            namespaces: ["default", "kube-system"].map(str::to_owned).into(),
            service_accounts: BTreeSet::new(),
            next_index: 1,
            next_log: 0,
        })
    }

    /// The API server shows a pod before the node has it, and its addresses after.
    pub(super) fn add(&mut self, node: &Node, cluster: &Cluster, spec: &PodSpec) -> anyhow::Result<Pod> {
        let uid = new_uid();
        self.register(cluster, &uid, spec);
        let pod = self.start_as(node, uid, spec)?;
        publish(cluster, &pod)?;
        Ok(pod)
    }

    pub(super) fn start(&mut self, node: &Node, spec: &PodSpec) -> anyhow::Result<Pod> {
        self.start_as(node, new_uid(), spec)
    }

    pub(super) fn announce(&mut self, cluster: &Cluster, pod: &Pod, spec: &PodSpec) -> anyhow::Result<()> {
        self.register(cluster, &pod.uid, spec);
        publish(cluster, pod)
    }

    /// A new pod with the network address of one that has ended.
    pub(super) fn add_at(
        &mut self,
        node: &Node,
        cluster: &Cluster,
        spec: &PodSpec,
        ended: &Pod,
    ) -> anyhow::Result<Pod> {
        let [.., high, low] = ended.addresses.v6.octets();
        let next = std::mem::replace(&mut self.next_index, u16::from_be_bytes([high, low]));
        let pod = self.add(node, cluster, spec);
        self.next_index = next;
        pod
    }

    /// Kills a pod's processes and gives it a new network, in new containers of the same pod.
    pub(super) fn restart_sandbox(
        &mut self,
        node: &Node,
        cluster: &Cluster,
        pod: &Pod,
        spec: &PodSpec,
    ) -> anyhow::Result<Pod> {
        pod.kill_containers()?;
        self.reap(pod)?;
        self.state.pods.retain(|other| other.uid != pod.uid);
        let pod = self.start_as(node, pod.uid.clone(), spec)?;
        publish(cluster, &pod)?;
        Ok(pod)
    }

    fn reap(&mut self, pod: &Pod) -> anyhow::Result<()> {
        let Some(mut sandbox) = self.sandboxes.remove(&pod.uid) else { return Ok(()) };
        sandbox.wait().with_context(|| format!("cannot reap the sandbox of {}", pod.full_name()))?;
        Ok(())
    }

    pub(super) fn delete(&mut self, node: &Node, cluster: &Cluster, pod: &Pod) -> anyhow::Result<()> {
        self.end(node, pod)?;
        cluster.delete_pod(&pod.namespace, &pod.name);
        Ok(())
    }

    /// Ends a pod on the node; the API server still shows it, as it does a job that has completed.
    pub(super) fn end(&mut self, node: &Node, pod: &Pod) -> anyhow::Result<()> {
        pod.remove(&node.place.kubelet())?;
        self.reap(pod)?;
        self.state.pods.retain(|other| other.uid != pod.uid);
        self.state.save()
    }

    pub(super) fn find(&self, name: &str) -> anyhow::Result<Pod> {
        self.state.pod(name).cloned()
    }

    pub(super) fn running(&self) -> Vec<Pod> {
        self.state.pods.clone()
    }

    /// Records the role of a service account's pods.
    pub(super) fn set_role(
        &mut self,
        namespace: &str,
        service_account: &str,
        role: Option<&str>,
    ) -> anyhow::Result<()> {
        let pods = self.state.pods.iter_mut();
        for pod in pods.filter(|pod| pod.namespace == namespace && pod.service_account == service_account) {
            pod.role = role.map(str::to_owned);
        }
        self.state.save()
    }

    pub(super) fn set_agent(&mut self, agent: Process) -> anyhow::Result<()> {
        self.state.agent = Some(agent);
        self.state.save()
    }

    /// The path of the next agent's log.
    pub(super) fn next_log(&mut self, node: &Node) -> PathBuf {
        self.next_log += 1;
        node.place.directory.join(format!("agent-{}.log", self.next_log))
    }

    fn register(&mut self, cluster: &Cluster, uid: &str, spec: &PodSpec) {
        if self.namespaces.insert(spec.namespace.clone()) && !cluster.has_namespace(&spec.namespace) {
            cluster.add_namespace(&spec.namespace, BTreeMap::new());
        }
        if self.service_accounts.insert((spec.namespace.clone(), spec.service_account.clone())) {
            cluster.add_service_account(&spec.namespace, &spec.service_account);
        }
        cluster.add_pod(&cluster::PodSpec {
            namespace: spec.namespace.clone(),
            name: spec.name.clone(),
            service_account: spec.service_account.clone(),
            node: NODE_NAME.to_owned(),
            labels: spec.labels.clone(),
            annotations: spec.annotations.clone(),
            daemon_set: spec.daemon_set.clone(),
            mirror_of: None,
            host_network: spec.host_network,
            pod_ips: Vec::new(),
            token_volume: spec.token_volume,
            credentials_uri: spec.credentials_uri.clone(),
            uid: Some(uid.to_owned()),
        });
    }

    fn start_as(&mut self, node: &Node, uid: String, spec: &PodSpec) -> anyhow::Result<Pod> {
        let (pod, sandbox) = Pod::start(node, spec, uid, self.next_index)?;
        self.next_index += 1;
        self.sandboxes.insert(pod.uid.clone(), sandbox);
        self.state.pods.push(pod.clone());
        self.state.save()?;
        Ok(pod)
    }
}

impl Drop for Pods {
    /// Reaps the sandboxes; their cgroups are removed with the lab's.
    fn drop(&mut self) {
        for sandbox in self.sandboxes.values_mut() {
            let _ = sandbox.kill();
            let _ = sandbox.wait();
        }
    }
}

/// Mints a token for the pod's volume, as the kubelet does; a pod without the volume is left alone.
pub(super) fn write_token(cluster: &Cluster, pod: &Pod) -> anyhow::Result<()> {
    let Some(volume) = &pod.token_volume else { return Ok(()) };
    let token = cluster.mint_pod_token(&pod.namespace, &pod.name, &[AUDIENCE], TOKEN_LIFE);
    pod::write_token(volume, &token)
}

/// What follows once a pod is both on the node and at the API server.
fn publish(cluster: &Cluster, pod: &Pod) -> anyhow::Result<()> {
    write_token(cluster, pod)?;
    cluster.set_pod_ips(&pod.namespace, &pod.name, &pod.addresses.list());
    Ok(())
}

fn new_uid() -> String {
    uuid::Uuid::new_v4().to_string()
}
