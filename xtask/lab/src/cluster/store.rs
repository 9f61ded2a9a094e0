//! Objects by kind and name, their resource versions, and the log of changes that watches read.
//!
//! Owns the counting. Never knows what an object means.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

/// The kinds of object that the API serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Event,
    Namespace,
    Node,
    Pod,
    ServiceAccount,
}

/// One change to one object.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub(crate) revision: u64,
    pub(crate) kind: Kind,
    pub(crate) verb: Verb,
    /// The object after the change; of a deletion its last state.
    pub(crate) object: Value,
}

/// What happened to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Added,
    Modified,
    Deleted,
}

#[derive(Debug, Default)]
pub(crate) struct Store {
    revision: u64,
    compacted: u64,
    objects: BTreeMap<(Kind, String, String), Stored>,
    log: VecDeque<Change>,
}

#[derive(Debug)]
struct Stored {
    object: Value,
    created: Instant,
}

// === impl Kind ===

impl Kind {
    /// The name in a URL.
    pub(crate) fn resource(self) -> &'static str {
        match self {
            Self::Event => "events",
            Self::Namespace => "namespaces",
            Self::Node => "nodes",
            Self::Pod => "pods",
            Self::ServiceAccount => "serviceaccounts",
        }
    }

    /// The name in an object.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Event => "Event",
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::ServiceAccount => "ServiceAccount",
        }
    }

    /// The kind of a name in a URL.
    pub(crate) fn of_resource(resource: &str) -> Option<Self> {
        [Self::Event, Self::Namespace, Self::Node, Self::Pod, Self::ServiceAccount]
            .into_iter()
            .find(|kind| kind.resource() == resource)
    }
}

// === impl Verb ===

impl Verb {
    /// The name in a watch event.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Added => "ADDED",
            Self::Modified => "MODIFIED",
            Self::Deleted => "DELETED",
        }
    }
}

// === impl Store ===

impl Store {
    /// The latest resource version.
    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    pub(crate) fn get(&self, kind: Kind, namespace: &str, name: &str) -> Option<&Value> {
        self.objects.get(&key(kind, namespace, name)).map(|stored| &stored.object)
    }

    pub(crate) fn list(&self, kind: Kind) -> impl Iterator<Item = &Value> {
        self.list_with_age(kind).map(|(object, _)| object)
    }

    pub(crate) fn list_with_age(&self, kind: Kind) -> impl Iterator<Item = (&Value, &Instant)> {
        let of_kind = self.objects.iter().filter(move |((of, _, _), _)| *of == kind);
        of_kind.map(|(_, stored)| (&stored.object, &stored.created))
    }

    /// Every change after `revision`. Where the log no longer goes back so far, the error is the oldest revision
    /// that would do.
    pub(crate) fn since(&self, revision: u64) -> Result<impl Iterator<Item = &Change>, u64> {
        if revision < self.compacted {
            return Err(self.compacted);
        }
        Ok(self.log.iter().filter(move |change| change.revision > revision))
    }

    /// Adds an object, or replaces it by a new one; returns its UID.
    pub(crate) fn add(&mut self, kind: Kind, namespace: &str, name: &str, mut object: Value) -> String {
        self.delete(kind, namespace, name);
        let metadata = &mut object["metadata"];
        let uid = metadata["uid"].as_str().map_or_else(|| Uuid::new_v4().to_string(), str::to_owned);
        metadata["uid"] = json!(uid);
        metadata["creationTimestamp"] = json!(Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        object["apiVersion"] = json!("v1");
        object["kind"] = json!(kind.name());
        let object = self.record(kind, Verb::Added, object);
        self.objects.insert(key(kind, namespace, name), Stored { object, created: Instant::now() });
        uid
    }

    /// Changes an object; one that is not there is left alone.
    pub(crate) fn modify(
        &mut self,
        kind: Kind,
        namespace: &str,
        name: &str,
        change: impl FnOnce(&mut Value),
    ) {
        let Some(mut object) = self.get(kind, namespace, name).cloned() else { return };
        change(&mut object);
        let object = self.record(kind, Verb::Modified, object);
        if let Some(stored) = self.objects.get_mut(&key(kind, namespace, name)) {
            stored.object = object;
        }
    }

    /// Deletes an object; one that is not there is left alone.
    pub(crate) fn delete(&mut self, kind: Kind, namespace: &str, name: &str) {
        if let Some(stored) = self.objects.remove(&key(kind, namespace, name)) {
            self.record(kind, Verb::Deleted, stored.object);
        }
    }

    /// Drops the log.
    pub(crate) fn compact(&mut self) {
        self.compacted = self.revision;
        self.log.clear();
    }

    fn record(&mut self, kind: Kind, verb: Verb, mut object: Value) -> Value {
        self.revision += 1;
        object["metadata"]["resourceVersion"] = json!(self.revision.to_string());
        self.log.push_back(Change { revision: self.revision, kind, verb, object: object.clone() });
        object
    }
}

fn key(kind: Kind, namespace: &str, name: &str) -> (Kind, String, String) {
    (kind, namespace.to_owned(), name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(store: &Store, since: u64) -> Vec<(&'static str, u64)> {
        store.since(since).unwrap().map(|change| (change.verb.name(), change.revision)).collect()
    }

    #[test]
    fn the_log_has_every_change_after_a_revision_until_it_is_compacted() {
        let mut store = Store::default();
        store.add(Kind::Pod, "app", "web", json!({"metadata": {"uid": "u1"}}));
        store.modify(Kind::Pod, "app", "web", |pod| pod["status"] = json!({"phase": "Running"}));
        store.modify(Kind::Pod, "app", "other", |_| unreachable!());
        store.delete(Kind::Pod, "app", "web");
        store.delete(Kind::Pod, "app", "web");
        assert_eq!(changes(&store, 0), [("ADDED", 1), ("MODIFIED", 2), ("DELETED", 3)]);
        assert_eq!(changes(&store, 2), [("DELETED", 3)]);

        store.compact();
        assert_eq!(store.since(2).err(), Some(3));
        assert_eq!(changes(&store, 3), []);
    }

    #[test]
    fn a_pod_of_the_same_name_is_another_object() {
        let mut store = Store::default();
        let first = store.add(Kind::Pod, "app", "web", json!({"metadata": {}}));
        let second = store.add(Kind::Pod, "app", "web", json!({"metadata": {}}));
        assert_ne!(first, second);
        assert_eq!(changes(&store, 1), [("DELETED", 2), ("ADDED", 3)]);
    }
}
