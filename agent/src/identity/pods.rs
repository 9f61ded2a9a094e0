//! The pods of this node, kept current by a watch.
//!
//! Owns which pods there are; never watches another node's pods, never reads a cgroup.

use std::{collections::HashSet, net::IpAddr, sync::Arc, time::Instant};

use futures::{StreamExt as _, pin_mut};
use k8s_openapi::api::core::v1 as core;
use kube::{
    Api,
    runtime::{WatchStreamExt as _, watcher},
};
use papaya::HashMap as ConcurrentMap;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use super::{
    cgroup::{ConfigHash, PodUid},
    pod::Pod,
    watch::ClusterEvent,
};

/// The pods of this node by UID.
#[derive(Debug)]
pub struct Pods {
    table: ConcurrentMap<PodUid, Arc<Pod>>,
    changes: watch::Sender<()>,
}

// === impl Pods ===

impl Default for Pods {
    fn default() -> Self {
        Self { table: ConcurrentMap::new(), changes: watch::Sender::new(()) }
    }
}

impl Pods {
    /// The pod with this UID, if the watch has shown it. A deleted one stays until [`Pods::remove`].
    pub fn get(&self, uid: PodUid) -> Option<Arc<Pod>> {
        self.table.pin().get(&uid).cloned()
    }

    /// The pod with this UID, waiting for the watch until `deadline`.
    pub async fn wait(&self, uid: PodUid, deadline: Instant) -> Option<Arc<Pod>> {
        if let Some(pod) = self.get(uid) {
            return Some(pod);
        }
        tokio::time::timeout_at(deadline.into(), self.shown(uid)).await.ok()
    }

    /// The pod with this UID, once the watch has shown it.
    pub async fn shown(&self, uid: PodUid) -> Arc<Pod> {
        let mut changes = self.changes.subscribe();
        loop {
            changes.mark_unchanged();
            if let Some(pod) = self.get(uid) {
                return pod;
            }
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Every pod.
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.table.pin().values().map(Arc::clone).collect()
    }

    /// The pods of a namespace.
    pub fn of_namespace(&self, namespace: &str) -> Vec<Arc<Pod>> {
        let table = self.table.pin();
        let own = table.values().filter(|pod| pod.service_account.namespace == namespace);
        own.map(Arc::clone).collect()
    }

    /// The mirror pods of a static pod; more than one only if somebody other than the kubelet has made the others.
    pub fn mirroring(&self, static_pod: ConfigHash) -> Vec<Arc<Pod>> {
        let table = self.table.pin();
        table.values().filter(|pod| pod.static_pod == Some(static_pod)).map(Arc::clone).collect()
    }

    /// The pod that has this address for itself: the node's is that of all on the host's network.
    pub fn with_address(&self, address: IpAddr) -> Option<PodUid> {
        let table = self.table.pin();
        let mut living = table.values().filter(|pod| !pod.host_network && !pod.finished);
        living.find(|pod| pod.ips.contains(&address)).map(|pod| pod.uid)
    }

    /// The pod with this annotation.
    #[cfg(feature = "undefended")]
    pub(crate) fn annotated(&self, annotation: &str, value: &str) -> Option<PodUid> {
        let table = self.table.pin();
        let found = table.values().find(|pod| pod.annotations.get(annotation).is_some_and(|is| is == value));
        found.map(|pod| pod.uid)
    }

    /// Caches a pod. Whether anything changed.
    pub fn insert(&self, pod: &Arc<Pod>) -> bool {
        let new = self.table.pin().insert(pod.uid, Arc::clone(pod)).is_none_or(|known| known != pod);
        if new {
            self.changes.send_replace(());
        }
        new
    }

    /// Drops a pod whose cgroup was removed.
    pub fn remove(&self, uid: PodUid) {
        self.table.pin().remove(&uid);
    }

    /// Watches the pods of one node until shutdown, and sends their changes to `events`.
    pub async fn follow(&self, api: Api<core::Pod>, node: &str, events: mpsc::Sender<ClusterEvent>) {
        let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
        let stream = watcher(api, config).default_backoff();
        pin_mut!(stream);
        // UIDs that the API server has, to find out which were deleted while the watch was down.
        let mut present = HashSet::new();
        let mut listed = HashSet::new();
        while let Some(event) = stream.next().await {
            let changes = match event {
                Ok(watcher::Event::Apply(pod)) => {
                    present.extend(self.apply(&pod, &events).await);
                    vec![]
                }
                Ok(watcher::Event::Delete(pod)) => {
                    let uid = pod.metadata.uid.as_deref().and_then(PodUid::parse);
                    uid.filter(|uid| present.remove(uid)).map(ClusterEvent::PodDeleted).into_iter().collect()
                }
                Ok(watcher::Event::Init) => {
                    listed.clear();
                    vec![]
                }
                Ok(watcher::Event::InitApply(pod)) => {
                    listed.extend(self.apply(&pod, &events).await);
                    vec![]
                }
                Ok(watcher::Event::InitDone) => {
                    let deleted = present.difference(&listed).copied().map(ClusterEvent::PodDeleted);
                    let changes = deleted.chain([ClusterEvent::PodsSynced]).collect();
                    present = std::mem::take(&mut listed);
                    info!(pods = present.len(), "the pods of this node are known");
                    changes
                }
                Err(error) => {
                    warn!(%error, "the watch of this node's pods failed; retrying, known pods are served");
                    vec![]
                }
            };
            for event in changes {
                // The channel is closed while the agent shuts down.
                let _ = events.send(event).await;
            }
        }
    }

    async fn apply(&self, pod: &core::Pod, events: &mpsc::Sender<ClusterEvent>) -> Option<PodUid> {
        let pod = Arc::new(Pod::from_api(pod)?);
        let uid = pod.uid;
        if self.insert(&pod) {
            // The channel is closed while the agent shuts down.
            let _ = events.send(ClusterEvent::PodChanged(pod)).await;
        }
        Some(uid)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn within(ms: u64) -> Instant {
        (tokio::time::Instant::now() + Duration::from_millis(ms)).into_std()
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_is_waited_for_until_the_deadline() {
        let pods = Arc::new(Pods::default());
        let (events, _received) = mpsc::channel(8);
        let pod: core::Pod = serde_json::from_value(json!({
            "metadata": {"name": "web-0", "namespace": "app", "uid": "0c5cb3f2-7a47-4a4b-8f0c-5b0f6a3d2e11"},
            "spec": {"containers": []},
        }))
        .unwrap();
        let uid = Pod::from_api(&pod).unwrap().uid;
        let late = {
            let pods = Arc::clone(&pods);
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(500)).await;
                pods.apply(&pod, &events).await
            })
        };
        assert!(pods.wait(uid, within(400)).await.is_none());
        assert_eq!(pods.wait(uid, within(800)).await.unwrap().uid, uid);
        late.await.unwrap();
    }
}
