//! Handover of credentials to the next agent of the node.
//!
//! Owns when an agent trusts what it inherits: for a pod that it sees itself, with the same service account, until it
//! expires. Never knows how credentials travel.

use std::sync::Arc;

use tracing::{info, warn};

use super::{CredentialCache, Ready, State, Transferred, in_flight::TokenSources};
use crate::{
    credentials::{scheduler::Key, source::CredentialSource},
    identity::{Pod, PodUid, Pods},
};

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// Everything that the next agent can use: not credentials of pods that only anonymous callers have asked for.
    pub fn to_transfer(&self) -> Vec<Transferred> {
        let (state, now) = (self.lock(), self.now());
        let ready = self.ready.pin();
        let entries = ready.iter().filter(|(_, ready)| now < ready.credentials.expiration);
        entries.filter_map(|(uid, ready)| state.transferred(*uid, ready)).collect()
    }

    /// Takes what the predecessor has now, but serves none of it until the pods are known. Replaces what was staged before:
    /// pods that are missing now have been removed.
    pub fn stage(&self, entries: Vec<Transferred>) {
        self.lock().staged = entries.into_iter().map(|entry| (entry.pod, entry)).collect();
    }

    /// All pods of the node are known now, and which of them have no cgroup: adopts what is staged for those that may have
    /// one, and drops the rest.
    pub fn adopt(&self, pods: &Pods) {
        let mut state = self.lock();
        let staged: Vec<_> = state.staged.keys().copied().collect();
        for pod in staged.into_iter().filter_map(|uid| pods.get(uid)) {
            self.adopt_for(&mut state, &pod);
        }
        let dropped = std::mem::take(&mut state.staged).len();
        info!(adopted = self.metrics.transferred.get(), dropped, "adopted the predecessor's credentials");
        self.apply_schedule(&mut state);
    }

    /// Adopts what is staged for a pod, unless it has no cgroup: it may have been removed already.
    pub(super) fn adopt_for(&self, state: &mut State, pod: &Arc<Pod>) {
        if !state.absent.may_run(pod.uid) {
            return;
        }
        let Some(entry) = state.staged.remove(&pod.uid) else { return };
        if entry.service_account != pod.service_account {
            warn!(pod.uid = %pod.uid, pod.name = pod.full_name(), staged = %entry.service_account,
                "dropped inherited credentials: they are for another service account");
            return;
        }
        let (life, own) = (entry.credentials.life(), self.ready.pin().get(&pod.uid).cloned());
        let is_newer = own.is_none_or(|own| own.credentials.expiration < life.expiration);
        if !is_newer || life.expiration <= self.now() {
            return;
        }
        let record = state.records.entry(Key::Pod(pod.uid)).or_default();
        record.tokens.update(TokenSources::new(None, Some(pod)));
        state.scheduler.adopt(pod.uid, life, entry.refresh_at, entry.asked, self.now());
        self.publish(pod.uid, &entry.credentials, life);
        self.metrics.transferred.inc();
    }
}

impl State {
    fn transferred(&self, pod: PodUid, ready: &Ready) -> Option<Transferred> {
        let service_account = self.records.get(&Key::Pod(pod))?.tokens.pod()?.service_account.clone();
        let (refresh_at, asked) = self.scheduler.refresh_state(pod)?;
        Some(Transferred {
            pod,
            service_account,
            credentials: Arc::clone(&ready.credentials),
            refresh_at,
            asked,
        })
    }
}
