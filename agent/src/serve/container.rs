//! The container endpoints, EKS Pod Identity and ECS: by the caller's token, by the kernel's attestation, or by both,
//! which must agree.
//!
//! Owns who may present which token; never parses one, never verifies a signature.

use std::{sync::Arc, time::Instant};

use hyper::http::request::Parts;
use tracing::{info, warn};

use super::{Server, access_log, connection::Connection, error_response};
use crate::{
    credentials::{Credentials, Floor, source::CredentialSource, token::claims::SentToken},
    dialect::{Refusal, forwarded, is_forwarded, pod_identity},
    identity::Pod,
};

// === impl Server ===

impl<S: CredentialSource> Server<S> {
    pub(super) async fn container(
        &self,
        connection: &Connection,
        head: &Parts,
        sent: Option<SentToken>,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Refusal> {
        let attested = match &connection.origin {
            None => None,
            Some(origin) => self.attested(connection, origin, sent.as_ref(), deadline).await?,
        };
        if let Some(pod) = &attested
            && !self.policy(pod, deadline).await?.pod_identity
        {
            return Err(error_response::pod_identity_is_off());
        }
        let (pod, sent) = match (attested, sent) {
            (None, None) => return Err(pod_identity::no_token("")),
            (None, Some(sent)) => return self.anonymous(connection, sent, deadline).await,
            (Some(pod), Some(sent)) if sent.claims.pod == Some(pod.uid) => (pod, Some(sent)),
            (Some(delegate), Some(sent)) if self.token_delegates.contains(&delegate.service_account) => {
                return self.delegated(connection, &delegate, sent, deadline).await;
            }
            (Some(pod), Some(sent)) => return Err(self.mismatched_token(connection, &pod, &sent)),
            (Some(pod), None) => {
                if !self.policy(&pod, deadline).await?.tokenless {
                    return Err(pod_identity::no_token(error_response::TOKENLESS_HINT));
                }
                if is_forwarded(&head.headers) {
                    return Err(forwarded());
                }
                (pod, None)
            }
        };
        let is_tokenless = sent.is_none();
        let fetched = self.credentials.for_pod(&pod, sent, Floor::Container, deadline).await;
        if is_tokenless && fetched.is_ok() {
            self.metrics.count_tokenless(&pod.service_account);
        }
        fetched.map_err(|error| error_response::credentials(&error, Some(&pod)))
    }

    /// An anonymous caller gets what its token is worth, and EKS Auth judges that.
    async fn anonymous(
        &self,
        connection: &Connection,
        sent: SentToken,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Refusal> {
        let claimed = sent.claims.pod;
        let is_another = match connection.in_network_of {
            // Whoever speaks for a pod in its network has that very pod's token.
            Some(own) => claimed != Some(own),
            // Its own pod has the address of the caller: a mesh's proxy keeps it.
            None => self.resolver.is_address_of_another(connection.peer, claimed),
        };
        if is_another {
            return Err(error_response::mismatched_token());
        }
        let fetched = self.credentials.for_token(sent, connection.peer, deadline).await;
        fetched.map_err(|error| error_response::credentials(&error, None))
    }

    /// Refuses a token that is not the caller's own, and puts it on record: it may be stolen.
    fn mismatched_token(&self, connection: &Connection, pod: &Pod, sent: &SentToken) -> Refusal {
        self.metrics.count_mismatched_token(&pod.service_account);
        if let Some(suppressed) = connection.permit.may_audit() {
            let process = access_log::process(connection);
            warn!(
                target: "audit",
                process,
                suppressed,
                pod.uid = %pod.uid,
                pod.name = pod.full_name(),
                sa = %pod.service_account,
                claimed.uid = sent.claims.pod.map(tracing::field::display),
                "a pod presented a token of another pod; the token's claims are not verified"
            );
        }
        error_response::mismatched_token()
    }

    /// Serves a caller that the operator lets present other pods' tokens, as CSI drivers do while they fill a volume.
    async fn delegated(
        &self,
        connection: &Connection,
        delegate: &Pod,
        sent: SentToken,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Refusal> {
        let claimed = sent.claims.pod;
        let presented = self.presented(&sent, deadline).await;
        self.metrics.count_delegated(&delegate.service_account, presented.is_ok());
        if let Some(suppressed) = connection.permit.may_audit() {
            info!(
                target: "audit",
                suppressed,
                delegate = delegate.full_name(),
                delegate.sa = %delegate.service_account,
                pod.uid = claimed.map(tracing::field::display),
                pod.name = presented.as_ref().ok().map(|pod| pod.full_name()),
                sa = presented.as_ref().ok().map(|pod| tracing::field::display(&pod.service_account)),
                refused = presented.as_ref().err().map(|refusal| &*refusal.message),
                "a token delegate presented a pod's token"
            );
        }
        let pod = presented?;
        let fetched = self.credentials.for_pod(&pod, Some(sent), Floor::Container, deadline).await;
        fetched.map_err(|error| error_response::credentials(&error, Some(&pod)))
    }

    /// The pod of this node whose token a delegate presents. Only the token speaks for that pod, so it is verified here,
    /// whatever EKS Auth would say.
    async fn presented(&self, sent: &SentToken, deadline: Instant) -> Result<Arc<Pod>, Refusal> {
        let verified = self.credentials.is_verified(sent).await;
        if !verified.map_err(|error| error_response::credentials(&error, None))? {
            return Err(error_response::unverified());
        }
        let uid = sent.claims.pod.ok_or_else(error_response::mismatched_token)?;
        let pod = self.resolver.pod(uid, deadline).await.map_err(|error| error_response::identity(&error))?;
        if self.policy(&pod, deadline).await?.pod_identity {
            Ok(pod)
        } else {
            Err(error_response::pod_identity_is_off())
        }
    }
}
