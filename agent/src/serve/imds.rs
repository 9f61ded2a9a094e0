//! The instance metadata service: session tokens, facts of the instance, and the caller's own role.
//!
//! Owns what may be read with which session and which policy; never parses a path.

use std::time::Instant;

use agent_common::origin::Origin;
use hyper::http::request::Parts;
use jiff::Timestamp;

use super::{Server, connection::Connection, error_response};
use crate::{
    credentials::{Floor, source::CredentialSource},
    dialect::{Refusal, Response, forwarded, imds, imds::ReadPath, is_forwarded},
    policy::{ImdsMode, Policy},
};

// === impl Server ===

impl<S: CredentialSource> Server<S> {
    pub(super) async fn imds(
        &self,
        connection: &Connection,
        head: &Parts,
        now: Timestamp,
        deadline: Instant,
    ) -> Result<Response, Refusal> {
        let origin = connection.origin.as_ref().ok_or_else(error_response::anonymous)?;
        let request = imds::parse(head)?;
        let uid = self.source_pod(connection, origin)?.uid;
        let (session, path) = match request {
            // Never waits for anything: every SDK that knows IMDSv2 begins here.
            imds::Request::Token { ttl_secs } => {
                return Ok(imds::token(self.imds_tokens.mint(uid, now, ttl_secs), ttl_secs));
            }
            imds::Request::Read { session, path } => (session, path),
        };
        if let Some(session) = session
            && !self.imds_tokens.is_valid(session, uid, now)
        {
            return Err(imds::bad_session());
        }
        let answer = self.imds_read(connection, origin, head, path, session.is_some(), deadline).await;
        if session.is_none()
            && let Some(pod) = self.resolver.known(uid)
        {
            self.metrics.count_v1(&pod.service_account, answer.is_ok());
        }
        answer
    }

    /// What a path has for the pod that connected. A session was valid, or there is none.
    async fn imds_read(
        &self,
        connection: &Connection,
        origin: &Origin,
        head: &Parts,
        path: ReadPath<'_>,
        has_session: bool,
        deadline: Instant,
    ) -> Result<Response, Refusal> {
        // These facts are useful to every SDK and worth nothing to an attacker: the pod need not even be known.
        if let ReadPath::Fact(fact) = path
            && (has_session || (fact.is_location() && !is_forwarded(&head.headers)))
        {
            return imds::fact(fact, &self.instance.borrow());
        }
        let attested = self.attested(connection, origin, None, deadline).await?;
        let pod = attested.ok_or_else(error_response::anonymous)?;
        allow_read(self.policy(&pod, deadline).await?, head, has_session)?;
        match path {
            ReadPath::Fact(fact) => return imds::fact(fact, &self.instance.borrow()),
            ReadPath::Listing(names) => return Ok(imds::listing(names)),
            ReadPath::Other => return Err(imds::not_found()),
            ReadPath::Roles | ReadPath::Role(_) | ReadPath::Iam | ReadPath::Info => {}
        }
        let fetched = self.credentials.for_pod(&pod, None, Floor::Imds, deadline).await;
        let credentials = fetched.map_err(|error| error_response::credentials(&error, Some(&pod)))?;
        imds::credentials(path, &credentials)
    }
}

/// Whether the pod may read from IMDS now. The kernel decided the same at connect time; the policy may have changed since.
fn allow_read(policy: Policy, head: &Parts, has_session: bool) -> Result<(), Refusal> {
    match policy.imds {
        ImdsMode::Intercept => {}
        ImdsMode::Deny => return Err(error_response::denied()),
        ImdsMode::Off | ImdsMode::Audit => return Err(error_response::not_intercepted()),
    }
    if has_session {
        return Ok(());
    }
    if !policy.imds_v1 {
        return Err(imds::v1_is_off());
    }
    if is_forwarded(&head.headers) { Err(forwarded()) } else { Ok(()) }
}
