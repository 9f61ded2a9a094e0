//! Get, list and watch.
//!
//! Owns resource versions as clients use them, and watch streams. Never decides who may read.

use std::{collections::VecDeque, io, time::Duration};

use bytes::Bytes;
use futures::stream;
use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{attributes::Attributes, status::Status};
use crate::{
    cluster::{
        Cluster,
        store::{Kind, Store},
    },
    fault_injection::{Faults, Service},
    http::{self, Response},
};

/// A bookmark follows the last event, or a change that the watch does not show, after this time. A real server
/// takes up to a minute.
const BOOKMARK_DELAY: Duration = Duration::from_secs(1);
/// How long a watch lasts that does not say. A real server draws from 30 to 60 minutes.
const WATCH_TIMEOUT: Duration = Duration::from_mins(30);

/// Which objects a request is about.
#[derive(Clone, Debug)]
struct Selection {
    kind: Kind,
    namespace: String,
    fields: Vec<(String, String)>,
}

/// An open watch.
struct Watch {
    cluster: Cluster,
    faults: Faults,
    selection: Selection,
    bookmarks: bool,
    /// Everything up to here was seen.
    revision: u64,
    /// The client knows that everything up to here was seen.
    reported: u64,
    pending: VecDeque<Bytes>,
    revisions: watch::Receiver<u64>,
    bookmark_at: Instant,
    ends_at: Instant,
    over: bool,
}

/// Answers a request that reads.
pub(super) fn answer(
    cluster: &Cluster,
    faults: &Faults,
    kind: Kind,
    attributes: &Attributes,
) -> Result<Response, Status> {
    let Attributes { namespace, name, .. } = attributes;
    if attributes.verb == "get" {
        let namespace = if matches!(kind, Kind::Namespace | Kind::Node) { "" } else { namespace };
        let object = cluster.get(kind, namespace, name);
        let object = object.ok_or_else(|| Status::not_found(kind.resource(), name))?;
        return Ok(http::json(StatusCode::OK, &object));
    }
    let selection = Selection { kind, namespace: namespace.clone(), fields: attributes.fields.clone() };
    if attributes.verb == "watch" {
        let watch = Watch::new(cluster, faults, selection, attributes)?;
        return Ok(http::json_stream(stream::unfold(watch, Watch::next)));
    }
    let list = cluster.read(|store| list(store, &selection, attributes))?;
    Ok(http::json(StatusCode::OK, &list))
}

// === impl Selection ===

impl Selection {
    fn holds(&self, object: &Value) -> bool {
        let field = |path: &str| path.split('.').fold(object, |value, key| &value[key]);
        let in_namespace = self.namespace.is_empty() || object["metadata"]["namespace"] == self.namespace;
        in_namespace && self.fields.iter().all(|(path, value)| field(path).as_str() == Some(value))
    }

    fn of<'a>(&'a self, store: &'a Store) -> impl Iterator<Item = &'a Value> {
        store.list(self.kind).filter(|object| self.holds(object))
    }
}

// === impl Watch ===

impl Watch {
    fn new(
        cluster: &Cluster,
        faults: &Faults,
        selection: Selection,
        attributes: &Attributes,
    ) -> Result<Self, Status> {
        check_match(attributes)?;
        let initial = attributes.flag("sendInitialEvents");
        let version = resource_version(attributes)?;
        let timeout = match attributes.parameter("timeoutSeconds").parse() {
            Ok(0) | Err(_) => WATCH_TIMEOUT,
            Ok(seconds) => Duration::from_secs(seconds),
        };
        let now = Instant::now();
        let mut watch = Self {
            cluster: cluster.clone(),
            faults: faults.clone(),
            selection,
            bookmarks: attributes.flag("allowWatchBookmarks"),
            revision: version,
            reported: version,
            pending: VecDeque::new(),
            revisions: cluster.revisions(),
            bookmark_at: now + BOOKMARK_DELAY,
            ends_at: now + timeout,
            over: false,
        };
        // Without a place to begin, what there is counts as added; so it does where the client asks for it.
        if initial || (version == 0 && attributes.parameter("sendInitialEvents").is_empty()) {
            watch.send_state();
            if initial && watch.bookmarks {
                watch.send_bookmark(&json!({"k8s.io/initial-events-end": "true"}));
            }
        } else if version == 0 {
            watch.revision = cluster.read(Store::revision);
        }
        watch.send_changes();
        Ok(watch)
    }

    async fn next(mut self) -> Option<(io::Result<Bytes>, Self)> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                self.faults.while_hanging(Service::KubeApi).await;
                return Some((Ok(event), self));
            }
            if self.over {
                return None;
            }
            let wake_at =
                if self.owes_bookmark() { self.bookmark_at.min(self.ends_at) } else { self.ends_at };
            tokio::select! {
                changed = self.revisions.changed() => {
                    changed.ok()?;
                    self.send_changes();
                }
                () = sleep_until(wake_at) => {
                    if self.owes_bookmark() {
                        self.send_bookmark(&Value::Null);
                    }
                    self.over = self.ends_at <= Instant::now();
                }
            }
        }
    }

    fn owes_bookmark(&self) -> bool {
        self.bookmarks && self.reported < self.revision
    }

    fn send_state(&mut self) {
        let (revision, objects) = self.cluster.read(|store| {
            let objects: Vec<Value> = self.selection.of(store).cloned().collect();
            (store.revision(), objects)
        });
        self.revision = revision;
        for object in objects {
            self.send("ADDED", &object);
        }
    }

    fn send_changes(&mut self) {
        // Taken before the changes are read, so that one in between wakes the watch once more.
        self.revisions.mark_unchanged();
        let events = self.cluster.read(|store| {
            let selection = &self.selection;
            let ours = |kind, object: &Value| kind == selection.kind && selection.holds(object);
            let events: Vec<(&str, Value)> = store
                .since(self.revision)?
                .filter(|change| ours(change.kind, &change.object))
                .map(|change| (change.verb.name(), change.object.clone()))
                .collect();
            Ok((store.revision(), events))
        });
        match events {
            Ok((revision, events)) => {
                self.revision = self.revision.max(revision);
                for (verb, object) in events {
                    self.send(verb, &object);
                }
            }
            Err(too_old) => {
                let status = too_old_version(self.revision, too_old);
                self.send("ERROR", &status.object());
                self.over = true;
            }
        }
    }

    fn send_bookmark(&mut self, annotations: &Value) {
        let version = self.revision.to_string();
        let mut object = json!({
            "apiVersion": "v1",
            "kind": self.selection.kind.name(),
            "metadata": {"resourceVersion": version, "creationTimestamp": null},
        });
        if !annotations.is_null() {
            object["metadata"]["annotations"] = annotations.clone();
        }
        self.send("BOOKMARK", &object);
        self.reported = self.revision;
    }

    fn send(&mut self, verb: &str, object: &Value) {
        self.pending.push_back(format!("{}\n", json!({"type": verb, "object": object})).into());
        self.bookmark_at = Instant::now() + BOOKMARK_DELAY;
    }
}

fn list(store: &Store, selection: &Selection, attributes: &Attributes) -> Result<Value, Status> {
    check_match(attributes)?;
    let (version, current) = (resource_version(attributes)?, store.revision());
    if version > current {
        return Err(Status::too_large_resource_version(version, current));
    }
    // No past state is kept: an exact one that is not the present counts as compacted.
    if attributes.parameter("resourceVersionMatch") == "Exact" && version < current {
        return Err(Status::expired(format!(
            "The provided resource version is too old: {version} ({current})"
        )));
    }
    let items: Vec<Value> = selection.of(store).cloned().map(without_kind).collect();
    Ok(json!({
        "apiVersion": "v1",
        "kind": format!("{}List", selection.kind.name()),
        "metadata": {"resourceVersion": current.to_string()},
        "items": items,
    }))
}

/// The rules about `resourceVersionMatch` that both list and watch have.
fn check_match(attributes: &Attributes) -> Result<(), Status> {
    let parameter = |name| attributes.parameter(name);
    let (found, watch) = (parameter("resourceVersionMatch"), attributes.verb == "watch");
    let initial = !parameter("sendInitialEvents").is_empty();
    let (field, why) = match found {
        _ if initial && !watch => ("sendInitialEvents", "sendInitialEvents is forbidden for list"),
        "NotOlderThan" if watch && initial => return Ok(()),
        _ if watch && initial => (
            "resourceVersionMatch",
            "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        ),
        "" => return Ok(()),
        _ if watch => (
            "resourceVersionMatch",
            "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
        ),
        _ if parameter("resourceVersion").is_empty() => {
            ("resourceVersionMatch", "resourceVersionMatch is forbidden unless resourceVersion is provided")
        }
        _ => return Ok(()),
    };
    let why = format!("Forbidden: {why}");
    Err(Status::invalid("meta.k8s.io", "ListOptions", field, "FieldValueForbidden", &why))
}

/// The resource version asked for; 0 where there is none.
fn resource_version(attributes: &Attributes) -> Result<u64, Status> {
    match attributes.parameter("resourceVersion") {
        "" => Ok(0),
        version => version.parse().map_err(|_| {
            let why = format!("Invalid value: \"{version}\": must be a number");
            Status::invalid("meta.k8s.io", "ListOptions", "resourceVersion", "FieldValueInvalid", &why)
        }),
    }
}

fn too_old_version(version: u64, oldest: u64) -> Status {
    Status::expired(format!("too old resource version: {version} ({oldest})"))
}

/// Items of a list do not repeat what the list says.
fn without_kind(mut object: Value) -> Value {
    if let Some(fields) = object.as_object_mut() {
        fields.remove("apiVersion");
        fields.remove("kind");
    }
    object
}
