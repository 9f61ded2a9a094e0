//! Which cgroups of pods and of quality-of-service classes exist.
//!
//! Owns the inotify watch on kubepods and its quality-of-service cgroups; never reads a pod.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use agent_common::policy::QosClass;
use futures::{Stream, StreamExt as _};
use inotify::{Inotify, WatchMask};
use tracing::error;

use super::{
    cgroup::{self, ConfigHash, Owner, PodUid},
    cgroupfs,
};

/// What happened to a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeEvent {
    /// A pod's was created.
    Created(PodCgroup),
    /// A pod's was removed, and with it every process of the pod.
    Removed(PodCgroup),
    /// A static pod's was created.
    StaticCreated(StaticCgroup),
    /// A static pod's was removed.
    StaticRemoved(StaticCgroup),
    /// That of a quality-of-service class was created, with this id.
    QosClass(QosClass, u64),
}

/// A pod's own cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodCgroup {
    /// The pod.
    pub uid: PodUid,
    /// The id of its cgroup.
    pub id: u64,
}

/// A static pod's own cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StaticCgroup {
    /// The hash of its configuration.
    pub config_hash: ConfigHash,
    /// The id of its cgroup.
    pub id: u64,
}

/// Room for a few hundred events. When the queue overflows the kernel sends an event too, and a scan finds everything.
const BUFFER: usize = 16 * 1024;
/// After a failure that may pass, such as too many open files.
const RETRY_DELAY: Duration = Duration::from_millis(200);

/// Watches the cgroups of pods: returns those that exist, and a stream of what changes.
///
/// # Errors
/// When inotify cannot watch kubepods.
pub fn follow(
    kubepods: &Path,
) -> io::Result<(Vec<TreeEvent>, impl Stream<Item = TreeEvent> + Send + Unpin + use<>)> {
    let inotify = Inotify::init()?;
    let mut tree = Tree {
        kubepods: kubepods.to_owned(),
        watched: HashSet::new(),
        known: HashMap::new(),
        classes: HashMap::new(),
    };
    let watches = inotify.watches();
    tree.watch(&watches, PathBuf::new())?;
    let first = tree.scan(&watches)?;
    let changes = inotify.into_event_stream(vec![0; BUFFER])?;
    let later = futures::stream::unfold((changes, tree), |(mut changes, mut tree)| async {
        // Which event it was does not matter: a scan of three directories finds what changed.
        let _ = changes.next().await?;
        let events = loop {
            match tree.scan(&changes.watches()) {
                Ok(events) => break events,
                Err(error) => {
                    error!(%error, "cannot read the pods' cgroups; the last state stays in effect, retrying");
                    tokio::time::sleep(RETRY_DELAY).await;
                }
            }
        };
        Some((futures::stream::iter(events), (changes, tree)))
    });
    Ok((first, Box::pin(later.flatten())))
}

struct Tree {
    kubepods: PathBuf,
    watched: HashSet<PathBuf>,
    known: HashMap<PathBuf, Known>,
    classes: HashMap<QosClass, u64>,
}

/// A cgroup that is a pod's, and its id.
type Known = (Owner, u64);

// === impl Tree ===

impl Tree {
    fn watch(&mut self, watches: &inotify::Watches, relative: PathBuf) -> io::Result<()> {
        let mask = WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVED_FROM
            | WatchMask::MOVED_TO
            | WatchMask::ONLYDIR;
        watches.clone().add(self.kubepods.join(&relative), mask)?;
        self.watched.insert(relative);
        Ok(())
    }

    /// Reads the directories and returns what changed since the last scan.
    ///
    /// # Errors
    /// When one cannot be read. Then nothing has changed: a failure must not look like a removed pod.
    fn scan(&mut self, watches: &inotify::Watches) -> io::Result<Vec<TreeEvent>> {
        let mut found = HashMap::new();
        let mut events = Vec::new();
        for name in names(&self.kubepods)? {
            let path = PathBuf::from(name);
            if self.note(&path, &mut found)? {
                continue;
            }
            events.extend(self.note_class(&path)?);
            // A quality-of-service cgroup, or one without pods that the kubelet did not make. It is watched before it is
            // read, so that no change falls between the two.
            let is_watched =
                self.watched.contains(&path) || unless_removed(self.watch(watches, path.clone()))?.is_some();
            let below = if is_watched { unless_removed(names(&self.kubepods.join(&path)))? } else { None };
            for name in below.into_iter().flatten() {
                self.note(&path.join(name), &mut found)?;
            }
        }
        self.watched.retain(|path| self.kubepods.join(path).is_dir());
        let removed = self.known.iter().filter(|(path, pod)| found.get(*path) != Some(pod));
        events.extend(removed.map(|(_, pod)| removed_event(*pod)));
        let new = found.iter().filter(|(path, pod)| self.known.get(*path) != Some(pod));
        events.extend(new.map(|(_, pod)| created_event(*pod)));
        self.known = found;
        Ok(events)
    }

    /// The event of a class's cgroup, if it is one and is new.
    fn note_class(&mut self, path: &Path) -> io::Result<Option<TreeEvent>> {
        let Some(class) = path.to_str().and_then(cgroup::qos_class) else { return Ok(None) };
        let Some(id) = unless_removed(cgroupfs::cgroup_id(&self.kubepods.join(path)))? else {
            return Ok(None);
        };
        Ok((self.classes.insert(class, id) != Some(id)).then_some(TreeEvent::QosClass(class, id)))
    }

    /// Adds a pod's cgroup to those found. Whether it is a pod's, static pods included.
    fn note(&self, path: &Path, found: &mut HashMap<PathBuf, Known>) -> io::Result<bool> {
        let Some(pod) = cgroup::parse(path).filter(|pod| pod.pod == path) else { return Ok(false) };
        if let Some(id) = unless_removed(cgroupfs::cgroup_id(&self.kubepods.join(path)))? {
            found.insert(path.to_owned(), (pod.owner, id));
        }
        Ok(true)
    }
}

fn created_event((owner, id): Known) -> TreeEvent {
    match owner {
        Owner::Pod(uid) => TreeEvent::Created(PodCgroup { uid, id }),
        Owner::StaticPod(config_hash) => TreeEvent::StaticCreated(StaticCgroup { config_hash, id }),
    }
}

fn removed_event((owner, id): Known) -> TreeEvent {
    match owner {
        Owner::Pod(uid) => TreeEvent::Removed(PodCgroup { uid, id }),
        Owner::StaticPod(config_hash) => TreeEvent::StaticRemoved(StaticCgroup { config_hash, id }),
    }
}

/// The directories in a directory.
fn names(directory: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if unless_removed(entry.file_type())?.is_some_and(|kind| kind.is_dir()) {
            names.push(entry.file_name());
        }
    }
    Ok(names)
}

/// `None` for what was removed before it was read; the event of its removal is on its way.
fn unless_removed<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0c5cb3f2-7a47-4a4b-8f0c-5b0f6a3d2e11";
    const OTHER: &str = "ffffffff-ffff-4fff-8fff-ffffffffffff";

    const HASH: &str = "fc407168c6823ed1e0a61410d6621724";

    async fn next(stream: &mut (impl Stream<Item = TreeEvent> + Unpin)) -> (bool, String) {
        let event = tokio::time::timeout(Duration::from_secs(5), stream.next()).await.unwrap().unwrap();
        match event {
            TreeEvent::Created(pod) => (true, pod.uid.to_string()),
            TreeEvent::Removed(pod) => (false, pod.uid.to_string()),
            TreeEvent::StaticCreated(pod) => (true, pod.config_hash.to_string()),
            TreeEvent::StaticRemoved(pod) => (false, pod.config_hash.to_string()),
            TreeEvent::QosClass(class, _) => (true, format!("{class:?}")),
        }
    }

    #[tokio::test]
    async fn created_and_removed_pods_are_seen_in_old_and_new_directories() {
        // Plain directories do as well as cgroups here.
        let kubepods = tempfile::tempdir().unwrap();
        let at = |path: String| kubepods.path().join(path);
        std::fs::create_dir(at(format!("pod{UID}"))).unwrap();
        let (first, mut events) = follow(kubepods.path()).unwrap();
        assert!(matches!(&first[..], [TreeEvent::Created(pod)] if pod.uid.to_string() == UID));
        std::fs::create_dir(at("burstable".into())).unwrap();
        assert_eq!(next(&mut events).await, (true, "Burstable".into()));
        std::fs::create_dir(at(format!("burstable/pod{OTHER}"))).unwrap();
        assert_eq!(next(&mut events).await, (true, OTHER.into()));
        std::fs::create_dir(at(format!("burstable/pod{HASH}"))).unwrap();
        assert_eq!(next(&mut events).await, (true, HASH.into()));
        std::fs::remove_dir(at(format!("burstable/pod{HASH}"))).unwrap();
        assert_eq!(next(&mut events).await, (false, HASH.into()));
        std::fs::create_dir(at(format!("burstable/pod{OTHER}/container"))).unwrap();
        std::fs::remove_dir(at(format!("pod{UID}"))).unwrap();
        assert_eq!(next(&mut events).await, (false, UID.into()));
        std::fs::remove_dir(at(format!("burstable/pod{OTHER}/container"))).unwrap();
        std::fs::remove_dir(at(format!("burstable/pod{OTHER}"))).unwrap();
        assert_eq!(next(&mut events).await, (false, OTHER.into()));
    }
}
