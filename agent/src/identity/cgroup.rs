//! Reads a pod's UID from the path of its cgroup.
//!
//! Owns the naming rules of the kubelet's two cgroup drivers; never touches a file.

use std::{
    fmt,
    path::{Component, Path, PathBuf},
};

use agent_common::{
    defense::{Defense, holds},
    policy::QosClass,
};
use serde::{Serialize, Serializer};
use uuid::Uuid;

/// A pod's UID, as the API server gives it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PodUid(Uuid);

/// The hash of a static pod's configuration, which the kubelet takes for its UID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConfigHash(u128);

/// The owner of a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// A pod that the API server knows.
    Pod(PodUid),
    /// A static pod: its cgroup carries the hash of its configuration, which no API object has for a UID.
    StaticPod(ConfigHash),
}

/// A path below kubepods, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPath {
    /// Its owner.
    pub owner: Owner,
    /// The pod's own cgroup, relative to kubepods.
    pub pod: PathBuf,
}

// === impl PodUid ===

impl PodUid {
    /// Parses the hyphenated form, the only one of 36 characters.
    pub fn parse(uid: &str) -> Option<Self> {
        (uid.len() == 36).then(|| Uuid::try_parse(uid).ok()).flatten().map(Self)
    }

    /// The UID's 16 bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl fmt::Debug for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for PodUid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

// === impl ConfigHash ===

impl ConfigHash {
    /// Parses 32 hexadecimal digits in lower case.
    pub fn parse(hash: &str) -> Option<Self> {
        let is_hash = hash.len() == 32 && hash.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        is_hash.then(|| u128::from_str_radix(hash, 16).ok()).flatten().map(Self)
    }
}

impl fmt::Display for ConfigHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Serialize for ConfigHash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

// === impl Owner ===

impl fmt::Display for Owner {
    /// What the kubelet takes for the pod's UID.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(uid) => uid.fmt(f),
            Self::StaticPod(config_hash) => config_hash.fmt(f),
        }
    }
}

/// Parses a path relative to the kubepods cgroup. The outermost pod counts: a container runtime inside a pod may make
/// cgroups of any name below it. `None` for kubepods itself, its quality-of-service cgroups and whatever the kubelet did
/// not make.
pub fn parse(path: &Path) -> Option<PodPath> {
    if holds(Defense::OutermostPod) {
        return outermost(path);
    }
    let below = path.ancestors().filter_map(|parent| path.strip_prefix(parent).ok());
    let mut pods = below.filter_map(outermost);
    let innermost = pods.next()?;
    // With its class where that is in its path: by the driver cgroupfs a pod's name alone tells none.
    let with_class = pods.take_while(|pod| pod.owner == innermost.owner).last();
    with_class.or(Some(innermost))
}

fn outermost(path: &Path) -> Option<PodPath> {
    let mut names = path.components().map(|component| match component {
        Component::Normal(name) => name.to_str(),
        _ => None,
    });
    let first = names.next()??;
    if let Some(owner) = owner(first, None) {
        return Some(PodPath { owner, pod: PathBuf::from(first) });
    }
    let class = qos_class(first)?;
    let second = names.next()??;
    let owner = owner(second, Some(class))?;
    Some(PodPath { owner, pod: [first, second].iter().collect() })
}

/// The class whose cgroup directly below kubepods has this name, in either driver's form.
pub fn qos_class(name: &str) -> Option<QosClass> {
    let class = match name.strip_suffix(".slice") {
        Some(slice) => slice.rsplit_once("kubepods-")?.1,
        None => name,
    };
    [QosClass::Burstable, QosClass::BestEffort].into_iter().find(|known| class_name(*known) == class)
}

/// The name in the kubelet's spelling.
fn class_name(class: QosClass) -> &'static str {
    match class {
        QosClass::Burstable => "burstable",
        QosClass::BestEffort => "besteffort",
    }
}

/// The owner of a pod's cgroup: `pod<uid>` with the cgroupfs driver, and with systemd's, where a dash
/// separates the levels of a slice, `kubepods[-<qos>]-pod<uid with _>.slice`.
fn owner(name: &str, class: Option<QosClass>) -> Option<Owner> {
    let uid = match name.strip_suffix(".slice") {
        Some(slice) => {
            let (parents, uid) = slice.rsplit_once("-pod")?;
            let levels = match class {
                Some(class) => parents.strip_suffix(class_name(class))?.strip_suffix('-')?,
                None => parents,
            };
            if levels != "kubepods" && !levels.ends_with("-kubepods") {
                return None;
            }
            uid.replace('_', "-")
        }
        None => name.strip_prefix("pod")?.to_owned(),
    };
    if let Some(uid) = PodUid::parse(&uid) {
        return Some(Owner::Pod(uid));
    }
    ConfigHash::parse(&uid).map(Owner::StaticPod)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UID: &str = "0c5cb3f2-7a47-4a4b-8f0c-5b0f6a3d2e11";
    const UID_: &str = "0c5cb3f2_7a47_4a4b_8f0c_5b0f6a3d2e11";
    const OTHER: &str = "ffffffff-ffff-4fff-8fff-ffffffffffff";
    const HASH: &str = "fc407168c6823ed1e0a61410d6621724";

    fn read(path: &str) -> Option<(String, String)> {
        parse(Path::new(path)).map(|found| {
            let owner = match found.owner {
                Owner::Pod(uid) => uid.to_string(),
                Owner::StaticPod(hash) => format!("static {hash}"),
            };
            (owner, found.pod.display().to_string())
        })
    }

    #[test]
    fn every_form_the_kubelet_makes_is_read() {
        let forms = [
            // systemd driver; containerd, CRI-O
            format!("kubepods-burstable.slice/kubepods-burstable-pod{UID_}.slice|/cri-containerd-aa.scope"),
            format!("kubepods-besteffort.slice/kubepods-besteffort-pod{UID_}.slice|/crio-aa.scope"),
            format!("kubepods-pod{UID_}.slice|/cri-containerd-aa.scope"),
            format!("kubepods-pod{UID_}.slice|"),
            // with a --cgroup-root, systemd repeats it in every name
            format!("a-kubepods-burstable.slice/a-kubepods-burstable-pod{UID_}.slice|"),
            // cgroupfs driver
            format!("burstable/pod{UID}|/aa"),
            format!("besteffort/pod{UID}|/aa/init"),
            format!("pod{UID}|/aa"),
        ];
        for form in forms {
            let (pod, rest) = form.split_once('|').unwrap();
            let path = format!("{pod}{rest}");
            assert_eq!(read(&path), Some((UID.into(), pod.into())), "{path}");
        }
    }

    #[test]
    fn a_static_pod_is_known_by_its_hash() {
        let read = read(&format!("burstable/pod{HASH}/aa")).unwrap();
        assert_eq!(read.0, format!("static {HASH}"));
        let zeros = format!("00{}", "7".repeat(30));
        assert_eq!(ConfigHash::parse(&zeros).unwrap().to_string(), zeros);
    }

    #[test]
    fn the_outermost_pod_counts() {
        let nested = format!("burstable/pod{UID}/aa/kubepods/burstable/pod{OTHER}/bb");
        assert_eq!(read(&nested).unwrap().0, UID);
        let nested = format!("pod{UID}/pod{OTHER}");
        assert_eq!(read(&nested).unwrap().0, UID);
    }

    #[test]
    fn a_cgroup_that_the_kubelet_did_not_make_has_no_owner() {
        let paths = [
            String::new(),
            "burstable".into(),
            "kubepods-burstable.slice".into(),
            format!("guaranteed/pod{UID}"),
            format!("x/pod{UID}"),
            format!("burstable/x/pod{UID}"),
            format!("../pod{UID}"),
            format!("/pod{UID}"),
            format!("kubepods-burstable.slice/kubepods-besteffort-pod{UID_}.slice"),
            format!("kubepods-burstable-pod{UID_}.slice"),
            format!("x-pod{UID_}.slice"),
            "burstable/pod".into(),
            "burstable/pod0c5cb3f2".into(),
            format!("pod{{{UID}}}"),
            format!("podurn:uuid:{UID}"),
            format!("pod{UID}x"),
            format!("pod{}", HASH.to_uppercase()),
        ];
        for path in paths {
            assert_eq!(read(&path), None, "{path}");
        }
    }

    proptest! {
        #[test]
        fn no_path_panics(path in "[a-z0-9/._-]{0,120}") {
            let _ = parse(Path::new(&path));
        }

        #[test]
        fn nothing_below_a_pod_changes_its_owner(rest in "[a-z0-9/_-]{0,60}") {
            let path = format!("burstable/pod{UID}/{rest}");
            prop_assert_eq!(read(&path).unwrap().0, UID);
        }
    }
}
