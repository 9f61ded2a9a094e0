//! Which pods' cgroups exist, as they come and go.
//!
//! Owns the inotify watch on kubepods and its quality-of-service cgroups; never reads a pod.

use std::{
    collections::{HashMap, HashSet},
    io,
    path::{Path, PathBuf},
};

use futures::{Stream, StreamExt as _};
use inotify::{EventStream, Inotify, WatchMask};

use super::{
    cgroup::{self, Owner, PodUid},
    cgroupfs,
};

/// What happened to a pod's cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TreeEvent {
    /// It exists now.
    Appeared(PodCgroup),
    /// It is gone, and with it every process of the pod.
    Gone(PodCgroup),
}

/// A pod's own cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodCgroup {
    /// The pod.
    pub uid: PodUid,
    /// The id of its cgroup.
    pub id: u64,
}

/// Room for a few hundred events; on overflow the kernel says so, and the next look sees everything anyway.
const BUFFER: usize = 16 * 1024;

/// Follows the cgroups of pods: those that exist already, and what happens from now on. Static pods are left
/// out: they have no policy.
///
/// # Errors
/// When inotify cannot watch kubepods.
pub fn follow(
    kubepods: &Path,
) -> io::Result<(Vec<TreeEvent>, impl Stream<Item = TreeEvent> + Send + Unpin + use<>)> {
    let inotify = Inotify::init()?;
    let mut tree = Tree { kubepods: kubepods.to_owned(), watched: HashSet::new(), known: HashMap::new() };
    tree.watch(&inotify.watches(), PathBuf::new())?;
    let changes = inotify.into_event_stream(vec![0; BUFFER])?;
    let first = tree.look(&changes);
    let later = futures::stream::unfold((changes, tree), |(mut changes, mut tree)| async {
        // Which event it was does not matter: a look at three directories tells what is new.
        let _ = changes.next().await?;
        let events = tree.look(&changes);
        Some((futures::stream::iter(events), (changes, tree)))
    });
    Ok((first, Box::pin(later.flatten())))
}

struct Tree {
    kubepods: PathBuf,
    watched: HashSet<PathBuf>,
    known: HashMap<PathBuf, PodCgroup>,
}

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

    /// Reads the directories and tells what differs from the last time.
    fn look<B: AsMut<[u8]> + AsRef<[u8]>>(&mut self, changes: &EventStream<B>) -> Vec<TreeEvent> {
        let mut found = HashMap::new();
        let mut directories = vec![PathBuf::new()];
        while let Some(directory) = directories.pop() {
            for name in names(&self.kubepods.join(&directory)) {
                let path = directory.join(name);
                match cgroup::parse(&path) {
                    Some(pod) if pod.pod == path => {
                        let Owner::Pod(uid) = pod.owner else { continue };
                        // Gone again already: the event of its removal is on its way.
                        let Ok(id) = cgroupfs::cgroup_id(&self.kubepods.join(&path)) else { continue };
                        found.insert(path, PodCgroup { uid, id });
                    }
                    _ if directory.as_os_str().is_empty() => {
                        // A quality-of-service cgroup; what the kubelet did not make has no pods in it. It is
                        // watched before it is read, so that nothing falls between the two.
                        if !self.watched.contains(&path) {
                            let _ = self.watch(&changes.watches(), path.clone());
                        }
                        directories.push(path);
                    }
                    _ => {}
                }
            }
        }
        self.watched.retain(|path| self.kubepods.join(path).is_dir());
        let gone = self.known.iter().filter(|(path, pod)| found.get(*path) != Some(pod));
        let mut events: Vec<_> = gone.map(|(_, pod)| TreeEvent::Gone(*pod)).collect();
        let new = found.iter().filter(|(path, pod)| self.known.get(*path) != Some(pod));
        events.extend(new.map(|(_, pod)| TreeEvent::Appeared(*pod)));
        self.known = found;
        events
    }
}

/// The directories in a directory; none where it cannot be read, because it is gone.
fn names(directory: &Path) -> Vec<std::ffi::OsString> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.file_name()).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const UID: &str = "0c5cb3f2-7a47-4a4b-8f0c-5b0f6a3d2e11";
    const OTHER: &str = "ffffffff-ffff-4fff-8fff-ffffffffffff";

    async fn next(stream: &mut (impl Stream<Item = TreeEvent> + Unpin)) -> (bool, String) {
        let event = tokio::time::timeout(Duration::from_secs(5), stream.next()).await.unwrap().unwrap();
        match event {
            TreeEvent::Appeared(pod) => (true, pod.uid.to_string()),
            TreeEvent::Gone(pod) => (false, pod.uid.to_string()),
        }
    }

    #[tokio::test]
    async fn pods_are_seen_as_they_come_and_go_in_old_and_new_directories() {
        // Plain directories do as well as cgroups here.
        let kubepods = tempfile::tempdir().unwrap();
        let at = |path: String| kubepods.path().join(path);
        std::fs::create_dir(at(format!("pod{UID}"))).unwrap();
        let (first, mut events) = follow(kubepods.path()).unwrap();
        assert!(matches!(&first[..], [TreeEvent::Appeared(pod)] if pod.uid.to_string() == UID));
        std::fs::create_dir(at("burstable".into())).unwrap();
        std::fs::create_dir(at(format!("burstable/pod{OTHER}"))).unwrap();
        assert_eq!(next(&mut events).await, (true, OTHER.into()));
        std::fs::create_dir(at(format!("burstable/pod{OTHER}/container"))).unwrap();
        std::fs::remove_dir(at(format!("pod{UID}"))).unwrap();
        assert_eq!(next(&mut events).await, (false, UID.into()));
        std::fs::remove_dir(at(format!("burstable/pod{OTHER}/container"))).unwrap();
        std::fs::remove_dir(at(format!("burstable/pod{OTHER}"))).unwrap();
        assert_eq!(next(&mut events).await, (false, OTHER.into()));
    }
}
