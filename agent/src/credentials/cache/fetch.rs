//! The calls of one fetch: a token from the API server, then credentials from EKS Auth.
//!
//! Owns the calls and their timeouts; never decides when, and caches nothing.

use std::{pin::pin, sync::Arc, time::Duration};

use jiff::SignedDuration;
use tokio::time::timeout;

use super::{CredentialCache, in_flight::TokenSources};
use crate::{
    credentials::{
        Credentials, Error, ServiceError, TokenDigest, aws::eks_auth::Assumed, scheduler::Key,
        source::CredentialSource,
    },
    identity::{Pod, PodUid},
    secret::Secret,
};

/// How long a token may take. Callers are answered sooner; this ends the fetch that they share, so that a service that
/// hangs does not block a pod forever.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(5);
/// A fetch whose token takes longer gives up its slot until it arrives.
const TOKEN_SLOT_TIMEOUT: Duration = Duration::from_millis(250);
/// How long a call of EKS Auth may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);
/// Credentials with less life are useless.
const MIN_LIFE: SignedDuration = SignedDuration::from_secs(15);

/// What a fetch brings.
pub(super) enum Fetched {
    /// Credentials, and the caller's token, if that was used.
    Credentials { credentials: Arc<Credentials>, accepted: Option<Accepted> },
    /// The pod's token, after giving up the slot: EKS Auth is to be called when it is this fetch's turn again.
    Token,
    /// EKS Auth refused the token that podgate had: another one is worth a call when it is this fetch's turn again.
    TokenRefused(ServiceError),
}

/// A token that a caller sent and EKS Auth has accepted.
#[derive(Clone, Copy)]
pub(super) struct Accepted {
    pub(super) token: TokenDigest,
    /// The pod that its claims name.
    pub(super) pod: Option<PodUid>,
}

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// Fetches with the token that the caller sent, or else with one that podgate obtains: at most two of those, the second
    /// one as a retry.
    pub(super) async fn fetch(
        &self,
        key: Key,
        number: u64,
        tokens: &TokenSources,
        is_retry: bool,
    ) -> Result<Fetched, Error> {
        if let Some(sent) = tokens.unexpired_sent(self.now()) {
            let assumed = self.call(&sent.token).await?;
            let accepted = Some(Accepted { token: sent.token.digest(), pod: sent.claims.pod });
            return self.checked(assumed, tokens, accepted);
        }
        let Some(pod) = tokens.pod() else {
            let reason = "the token that the pod sent has expired".to_owned();
            return Err(Error::Token { reason });
        };
        let mut sought = pin!(self.token(pod));
        let Ok(token) = timeout(TOKEN_SLOT_TIMEOUT, &mut sought).await else {
            self.release_slot(key, number);
            // The source caches it until it is this fetch's turn again.
            return sought.await.map(|_| Fetched::Token);
        };
        let token = token?;
        match self.call(&token).await {
            Err(Error::Service(error)) if error.is_about_the_token() && !is_retry => {
                self.source.reject_token(pod.uid, &token).await;
                Ok(Fetched::TokenRefused(error))
            }
            called => self.checked(called?, tokens, None),
        }
    }

    async fn token(&self, pod: &Pod) -> Result<Secret, Error> {
        let token = timeout(TOKEN_TIMEOUT, self.source.token(pod)).await;
        token.unwrap_or_else(|_| {
            Err(Error::Token { reason: "the API server gave no answer in time".to_owned() })
        })
    }

    async fn call(&self, token: &Secret) -> Result<Assumed, Error> {
        let assumed = timeout(CALL_TIMEOUT, self.source.assume_role(token)).await;
        assumed.unwrap_or_else(|_| Err(Error::Unreachable { reason: "no answer in time".to_owned() }))
    }

    /// Accepts only an answer for the right service account, with credentials that are still useful.
    fn checked(
        &self,
        assumed: Assumed,
        tokens: &TokenSources,
        accepted: Option<Accepted>,
    ) -> Result<Fetched, Error> {
        let Assumed { service_account: answered, credentials } = assumed;
        if let Some(pod) = tokens.pod()
            && pod.service_account != answered
        {
            return Err(Error::Mismatch { answered, asked: pod.service_account.clone() });
        }
        if credentials.expiration < self.now() + MIN_LIFE {
            let reason = "its credentials have expired already; is this node's clock right?".to_owned();
            return Err(Error::BadAnswer { reason });
        }
        Ok(Fetched::Credentials { credentials: Arc::new(credentials), accepted })
    }
}
