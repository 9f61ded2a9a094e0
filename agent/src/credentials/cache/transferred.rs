//! Credentials on their way from one agent of a node to the next.
//!
//! Owns what goes along with them, and when the next agent believes it: for a pod that it sees itself, with the same service
//! account, and as long as AWS does. Never knows how they travel.

use std::sync::Arc;

use jiff::Timestamp;
use tracing::{info, warn};

use super::{CredentialCache, Ready, State, Tokens};
use crate::{
    credentials::{Credentials, scheduler::Key, source::CredentialSource},
    identity::{Pod, PodUid, Pods, ServiceAccountRef},
};

/// A pod's credentials, and what was planned for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transferred {
    /// The pod.
    pub pod: PodUid,
    /// The service account that they are for.
    pub service_account: ServiceAccountRef,
    /// The credentials.
    pub credentials: Arc<Credentials>,
    /// When the next ones are due, if anybody still asks.
    pub refresh_at: Timestamp,
    /// Whether anybody does.
    pub asked: bool,
}

impl<S: CredentialSource> CredentialCache<S> {
    /// Everything that the next agent can use. Not what callers brought in whose pod nobody has attested for.
    pub fn to_transfer(&self) -> Vec<Transferred> {
        let (state, now) = (self.lock(), self.now());
        let ready = self.ready.pin();
        let entries = ready.iter().filter(|(_, ready)| now < ready.credentials.expiration);
        entries.filter_map(|(uid, ready)| state.transferred(*uid, ready)).collect()
    }

    /// Takes what the predecessor has now, and keeps it from everybody until its pods are known. What it had
    /// before counts no more: the pods of what is missing are gone.
    pub fn hold(&self, entries: Vec<Transferred>) {
        self.lock().held = entries.into_iter().map(|entry| (entry.pod, entry)).collect();
    }

    /// All pods of the node are known now, and which of them have no cgroup: what is held for those that may have one is
    /// theirs, and what is held for others is dropped.
    pub fn adopt(&self, pods: &Pods) {
        let mut state = self.lock();
        let held: Vec<_> = state.held.keys().copied().collect();
        for pod in held.into_iter().filter_map(|uid| pods.get(uid)) {
            self.adopt_for(&mut state, &pod);
        }
        let dropped = std::mem::take(&mut state.held).len();
        info!(adopted = self.metrics.transferred.get(), dropped, "credentials of the predecessor");
        self.act(&mut state);
    }

    /// Gives a pod what is held for it, unless it has no cgroup: it may be gone already.
    pub(super) fn adopt_for(&self, state: &mut State, pod: &Arc<Pod>) {
        if !state.absent.may_run(pod.uid) {
            return;
        }
        let Some(entry) = state.held.remove(&pod.uid) else { return };
        if entry.service_account != pod.service_account {
            warn!(pod.uid = %pod.uid, pod.name = pod.full_name(), held = %entry.service_account,
                "what was handed over is for another service account: dropped");
            return;
        }
        let (life, own) = (entry.credentials.life(), self.ready.pin().get(&pod.uid).cloned());
        let is_newer = own.is_none_or(|own| own.credentials.expiration < life.expiration);
        if !is_newer || life.expiration <= self.now() {
            return;
        }
        let record = state.records.entry(Key::Pod(pod.uid)).or_default();
        record.tokens.update(Tokens::new(None, Some(pod)));
        state.plan.adopt(pod.uid, life, entry.refresh_at, entry.asked, self.now());
        self.hand(pod.uid, &entry.credentials, life);
        self.metrics.transferred.inc();
    }
}

impl State {
    fn transferred(&self, pod: PodUid, ready: &Ready) -> Option<Transferred> {
        let service_account = self.records.get(&Key::Pod(pod))?.tokens.pod()?.service_account.clone();
        let (refresh_at, asked) = self.plan.standing(pod)?;
        Some(Transferred {
            pod,
            service_account,
            credentials: Arc::clone(&ready.credentials),
            refresh_at,
            asked,
        })
    }
}
