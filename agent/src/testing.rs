//! Fakes of what only a node has, and values for tests. Not part of a release build.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    os::fd::BorrowedFd,
    path::{Path, PathBuf},
};

use agent_common::origin::Origin;
use jiff::Timestamp;
use parking_lot::Mutex;
use uuid::Uuid;

use crate::{
    credentials::{Credentials, Role, token::claims::Claims},
    identity::{Pod, PodUid, ServiceAccountRef, cgroupfs::CgroupPaths, networks::PodProcesses},
    intercept::{self, OriginLookup},
};

pub mod fake_node;
pub mod outside;
pub mod upstream;

/// A pod with a fresh UID; its service account is `name` in `namespace`.
pub fn pod(namespace: &str, name: &str) -> Pod {
    Pod {
        uid: pod_uid(),
        name: format!("{name}-0"),
        service_account: ServiceAccountRef { namespace: namespace.to_owned(), name: name.to_owned() },
        host_network: false,
        token_volume: false,
        injected: false,
        has_env_from: false,
        daemon_set: None,
        static_pod: None,
        finished: false,
        ips: vec![],
        container_ports: vec![],
        annotations: BTreeMap::new(),
    }
}

/// A fresh pod UID.
///
/// # Panics
/// Never: a UUID's hyphenated form is a pod's UID.
#[expect(clippy::expect_used, reason = "test code")]
pub fn pod_uid() -> PodUid {
    PodUid::parse(&Uuid::new_v4().to_string()).expect("a UUID is a pod's UID")
}

/// The claims of a token bound to this pod.
pub fn claims(pod: PodUid) -> Claims {
    Claims { pod: Some(pod), issuer: None, audiences: vec![], expiration: None }
}

/// A cgroup2 whose ids, paths and network namespaces the test sets.
#[derive(Debug, Default)]
pub struct FakeCgroups {
    paths: Mutex<HashMap<u64, PathBuf>>,
    networks: Mutex<HashMap<PathBuf, u64>>,
}

/// A kernel that puts the same origin on every accepted connection.
#[derive(Debug, Default)]
pub struct FakeOrigins(Mutex<Option<Origin>>);

// === impl FakeCgroups ===

impl FakeCgroups {
    /// From now on the cgroup has this path, relative to kubepods.
    pub fn set(&self, cgroup_id: u64, path: impl Into<PathBuf>) {
        self.paths.lock().insert(cgroup_id, path.into());
    }

    /// From now on the processes of the pod at this path are in this network.
    pub fn set_network(&self, pod: impl Into<PathBuf>, cookie: u64) {
        self.networks.lock().insert(pod.into(), cookie);
    }
}

impl PodProcesses for std::sync::Arc<FakeCgroups> {
    fn network(&self, pod: &Path) -> io::Result<Option<u64>> {
        Ok(self.networks.lock().get(pod).copied())
    }
}

impl CgroupPaths for std::sync::Arc<FakeCgroups> {
    fn below_kubepods(&self, cgroup_id: u64) -> io::Result<Option<PathBuf>> {
        Ok(self.paths.lock().get(&cgroup_id).cloned())
    }
}

// === impl FakeOrigins ===

impl FakeOrigins {
    /// From now on accepted connections have this origin.
    pub fn set(&self, origin: Option<Origin>) {
        *self.0.lock() = origin;
    }
}

impl OriginLookup for std::sync::Arc<FakeOrigins> {
    fn origin(&self, _: BorrowedFd<'_>) -> Result<Option<Origin>, intercept::Error> {
        Ok(*self.0.lock())
    }
}

/// Credentials of role `web`, from 2026-03-17T16:27:34Z for six hours.
pub fn credentials() -> Credentials {
    Credentials {
        access_key_id: "ASIAEXAMPLE".to_owned(),
        secret_access_key: "secret".into(),
        session_token: "session".into(),
        expiration: Timestamp::from_second(1_773_786_454).unwrap_or_default(),
        obtained_at: Timestamp::from_second(1_773_764_854).unwrap_or_default(),
        role: Role {
            account_id: "123456789012".to_owned(),
            partition: "aws".to_owned(),
            name: "web".to_owned(),
        },
    }
}
