//! Which tokens open what is kept for a pod.
//!
//! Owns their digests; a token comes here once it was verified, or once EKS Auth has accepted it.

use agent_common::defense::{Defense, holds};

use super::{CredentialCache, State};
use crate::{
    credentials::{
        Error,
        scheduler::{Key, TokenDigest},
        source::CredentialSource,
        token::claims::SentToken,
        token::issuer::Verdict,
    },
    identity::PodUid,
};

/// A pod's tokens that are remembered: it has one, and a new one every 19 hours.
const TOKENS_REMEMBERED: usize = 4;

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// Whether a token is good; `false` where nobody can tell.
    ///
    /// # Errors
    /// [`Error::BadToken`] when it is known to be bad.
    pub async fn is_good(&self, sent: &SentToken) -> Result<bool, Error> {
        match self.source.judge(&sent.token, &sent.claims).await {
            Verdict::Good => Ok(true),
            Verdict::Unknown => Ok(false),
            Verdict::Bad(_) if !holds(Defense::AcceptedTokens) => Ok(false),
            Verdict::Bad(reason) => Err(Error::BadToken { reason }),
        }
    }

    pub(super) fn whose(&self, digest: &TokenDigest) -> Option<PodUid> {
        self.trusted.pin().get(digest).copied()
    }

    /// From now on the token opens what is kept for the pod.
    pub(super) fn trust(&self, state: &mut State, uid: PodUid, digest: TokenDigest) {
        let remembered = &mut state.records.entry(Key::Pod(uid)).or_default().trusted;
        let trusted = self.trusted.pin();
        if trusted.insert(digest, uid).is_none() {
            remembered.push(digest);
        }
        if remembered.len() > TOKENS_REMEMBERED {
            trusted.remove(&remembered.remove(0));
        }
    }
}
