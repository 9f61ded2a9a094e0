//! What a fetch asks, and of whom: a token of the API server, then credentials of EKS Auth.
//!
//! Owns the calls and for how long each may take; never decides when, and keeps nothing.

use std::{pin::pin, sync::Arc, time::Duration};

use jiff::SignedDuration;
use tokio::time::timeout;

use super::{CredentialCache, Tokens};
use crate::{
    credentials::{
        Credentials, Error, ServiceError,
        aws::eks_auth::Assumed,
        scheduler::{Key, TokenDigest},
        source::CredentialSource,
    },
    identity::{Pod, PodUid},
    secret::Secret,
};

/// How long a token may take. Callers are answered sooner; this ends what they share, so that a service that hangs does
/// not hold a pod forever.
const TOKEN_TIMEOUT: Duration = Duration::from_secs(5);
/// A token that takes longer keeps no other fetch waiting.
const TOKEN_SOON: Duration = Duration::from_millis(250);
/// How long EKS Auth may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);
/// Credentials with less life are of no use to anybody.
const LIFE_MIN: SignedDuration = SignedDuration::from_secs(15);

/// What a fetch brings.
pub(super) enum Fetched {
    /// Credentials, and the caller's token, if it was that.
    Credentials { credentials: Arc<Credentials>, accepted: Option<Accepted> },
    /// The pod's token, which was long in coming: EKS Auth is called for others meanwhile.
    Token,
    /// Nothing with the token that podgate had: another one is worth a call when it is this fetch's turn again.
    TokenRefused(ServiceError),
}

/// A token that a caller sent and EKS Auth has accepted.
#[derive(Clone, Copy)]
pub(super) struct Accepted {
    pub(super) token: TokenDigest,
    /// The pod that it says it is bound to.
    pub(super) pod: Option<PodUid>,
}

// === impl CredentialCache ===

impl<S: CredentialSource> CredentialCache<S> {
    /// Fetches with the token that the caller sent, or else with one that podgate finds: with two of those at most, as
    /// `is_second` tells.
    pub(super) async fn fetch(
        &self,
        key: Key,
        number: u64,
        tokens: &Tokens,
        is_second: bool,
    ) -> Result<Fetched, Error> {
        if let Some(sent) = tokens.sent_and_good(self.now()) {
            let assumed = self.call(&sent.token).await?;
            let accepted = Some(Accepted { token: sent.token.digest(), pod: sent.claims.pod });
            return self.checked(assumed, tokens, accepted);
        }
        let Some(pod) = tokens.pod() else {
            let reason = "the token that the pod sent has expired".to_owned();
            return Err(Error::Token { reason });
        };
        let mut sought = pin!(self.token(pod));
        let Ok(token) = timeout(TOKEN_SOON, &mut sought).await else {
            self.linger(key, number);
            // The source keeps it until it is this fetch's turn again.
            return sought.await.map(|_| Fetched::Token);
        };
        let token = token?;
        match self.call(&token).await {
            Err(Error::Service(error)) if error.is_about_the_token() && !is_second => {
                self.source.refused(pod.uid, &token).await;
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

    /// Takes an answer only for the pod that it was asked for, and while it is good for something.
    fn checked(
        &self,
        assumed: Assumed,
        tokens: &Tokens,
        accepted: Option<Accepted>,
    ) -> Result<Fetched, Error> {
        let Assumed { service_account: answered, credentials } = assumed;
        if let Some(pod) = tokens.pod()
            && pod.service_account != answered
        {
            return Err(Error::Mismatch { answered, asked: pod.service_account.clone() });
        }
        if credentials.expiration < self.now() + LIFE_MIN {
            let reason = "its credentials have expired already; is this node's clock right?".to_owned();
            return Err(Error::BadAnswer { reason });
        }
        Ok(Fetched::Credentials { credentials: Arc::new(credentials), accepted })
    }
}
