//! The annotations of the cluster's namespaces, kept current by a watch.
//!
//! Owns what podgate caches of a namespace; never decides what an annotation means.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Instant,
};

use futures::{StreamExt as _, pin_mut};
use k8s_openapi::api::core::v1 as core;
use kube::{
    Api,
    runtime::{WatchStreamExt as _, watcher},
};
use papaya::HashMap as ConcurrentMap;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use super::{pod::ANNOTATION_PREFIX, watch::ClusterEvent};

/// The annotations that concern podgate, by namespace.
#[derive(Debug, Default)]
pub struct Namespaces {
    table: ConcurrentMap<String, Arc<BTreeMap<String, String>>>,
    changes: watch::Sender<()>,
}

// === impl Namespaces ===

impl Namespaces {
    /// The annotations of a namespace, if the watch has shown it.
    pub fn get(&self, name: &str) -> Option<Arc<BTreeMap<String, String>>> {
        self.table.pin().get(name).cloned()
    }

    /// Waits for the watch to show a namespace, until `deadline`. Whether it has.
    pub async fn wait(&self, name: &str, deadline: Instant) -> bool {
        let mut changes = self.changes.subscribe();
        let seen = async {
            while self.get(name).is_none() {
                // The sender lives as long as `self`: this cannot fail while we are here.
                let _ = changes.changed().await;
            }
        };
        tokio::time::timeout_at(deadline.into(), seen).await.is_ok()
    }

    /// The annotations of every namespace.
    pub fn all(&self) -> Vec<Arc<BTreeMap<String, String>>> {
        self.table.pin().values().cloned().collect()
    }

    /// Watches the namespaces until shutdown, and sends their changes to `events`.
    pub async fn follow(&self, api: Api<core::Namespace>, events: mpsc::Sender<ClusterEvent>) {
        let stream = watcher(api, watcher::Config::default()).default_backoff();
        pin_mut!(stream);
        let mut listed = HashSet::new();
        while let Some(event) = stream.next().await {
            match event {
                Ok(watcher::Event::Apply(namespace)) => {
                    self.apply(&namespace, &events).await;
                }
                Ok(watcher::Event::Delete(namespace)) => {
                    let name = namespace.metadata.name.unwrap_or_default();
                    self.table.pin().remove(&name);
                }
                Ok(watcher::Event::Init) => listed.clear(),
                Ok(watcher::Event::InitApply(namespace)) => {
                    listed.extend(self.apply(&namespace, &events).await);
                }
                Ok(watcher::Event::InitDone) => {
                    let known = std::mem::take(&mut listed);
                    self.retain(&known);
                    info!(namespaces = known.len(), "the namespaces are known");
                    // The channel is closed while the agent shuts down.
                    let _ = events.send(ClusterEvent::NamespacesSynced).await;
                }
                Err(error) => {
                    warn!(%error, "the watch of namespaces failed; retrying, known namespaces stay in effect");
                }
            }
        }
    }

    fn retain(&self, known: &HashSet<String>) {
        self.table.pin().retain(|name, _| known.contains(name));
    }

    /// Caches a namespace's annotations. Whether anything changed.
    pub fn insert(&self, name: &str, annotations: BTreeMap<String, String>) -> bool {
        let table = self.table.pin();
        let known = table.get(name).is_some_and(|known| **known == annotations);
        if !known {
            table.insert(name.to_owned(), Arc::new(annotations));
            self.changes.send_replace(());
        }
        !known
    }

    async fn apply(
        &self,
        namespace: &core::Namespace,
        events: &mpsc::Sender<ClusterEvent>,
    ) -> Option<String> {
        let name = namespace.metadata.name.clone()?;
        let annotations = namespace.metadata.annotations.iter().flatten();
        let annotations = annotations
            .filter(|(key, _)| key.starts_with(ANNOTATION_PREFIX))
            .map(|(key, value)| (key.clone(), value.clone()));
        if self.insert(&name, annotations.collect()) {
            // The channel is closed while the agent shuts down.
            let _ = events.send(ClusterEvent::NamespaceChanged(name.clone())).await;
        }
        Some(name)
    }
}
