//! Which tokens give access to a pod's credentials.
//!
//! Owns their digests. A token gets here once it was verified, or once EKS Auth has accepted it.

use agent_common::defense::{Defense, holds};

use super::{CredentialCache, State};
use crate::{
    credentials::{
        Error, TokenDigest,
        scheduler::Key,
        source::CredentialSource,
        token::{Verdict, claims::SentToken},
    },
    identity::PodUid,
};

/// A pod has one token, and a new one every 19 hours.
const MAX_TOKENS_PER_POD: usize = 4;

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// Whether a token is valid; `false` where the cluster's keys are unavailable.
    ///
    /// # Errors
    /// [`Error::BadToken`] when it is known to be invalid.
    pub async fn is_verified(&self, sent: &SentToken) -> Result<bool, Error> {
        match self.source.verify(&sent.token, &sent.claims).await {
            Verdict::Valid => Ok(true),
            Verdict::Unknown => Ok(false),
            Verdict::Invalid(_) if !holds(Defense::AcceptedTokens) => Ok(false),
            Verdict::Invalid(reason) => Err(Error::BadToken { reason }),
        }
    }

    pub(super) fn pod_of_token(&self, digest: &TokenDigest) -> Option<PodUid> {
        self.trusted.pin().get(digest).copied()
    }

    /// From now on the token gives access to the pod's credentials.
    pub(super) fn trust(&self, state: &mut State, uid: PodUid, digest: TokenDigest) {
        let remembered = &mut state.records.entry(Key::Pod(uid)).or_default().trusted;
        let trusted = self.trusted.pin();
        if trusted.insert(digest, uid).is_none() {
            remembered.push(digest);
        }
        if remembered.len() > MAX_TOKENS_PER_POD {
            trusted.remove(&remembered.remove(0));
        }
    }
}
