//! The sequence of a request: dialect (parse) -> identity -> policy -> credentials -> dialect (render).
//!
//! Owns that sequence and its deadline; the only place that awaits every stage. Never parses a format, never calls AWS.
//!
//! `connection` has a connection's limits, `container` and `imds` what is served where, `error_response` what a failure
//! means to the caller, `access_log` and `metrics` what operators see of it, `limit` how much a caller may take.

use std::{
    borrow::Cow,
    sync::Arc,
    time::{Duration, Instant},
};

use agent_common::{
    defense::{Defense, holds},
    origin::Origin,
};
use hyper::{Request, body::Incoming, http::request::Parts};
use jiff::Timestamp;
use tokio::sync::watch;
use tracing::debug;

mod access_log;
mod connection;
mod container;
mod error_response;
mod imds;
mod limit;
pub mod metrics;
mod stream;

pub(crate) use self::access_log::process_label;
#[cfg(any(test, feature = "testing"))]
pub(crate) use self::connection::protocol;
pub use self::limit::ConnectionLimit;
use self::{
    access_log::Entry, connection::Connection, limit::LimitKey, metrics::RequestMetrics, stream::Stream,
};
use crate::{
    accept::Accepted,
    credentials::{cache::CredentialCache, source::CredentialSource, token::claims::SentToken},
    dialect::{Dialect, Refusal, Response, ecs, imds_token::ImdsTokens, pod_identity},
    drain::DrainWatch,
    identity::{CallerResolver, Error as IdentityError, Pod, ServiceAccountRef, SourcePod},
    instance_metadata::Instance,
    policy::{Policy, lookup::Policies},
};

/// Every request is answered within this time: SDKs give up after one second.
const DEADLINE: Duration = Duration::from_millis(800);
/// What a request waits for ends a little earlier, so that the response can say what is missing.
const TIMEOUT: Duration = Duration::from_millis(780);

/// Serves callers.
#[derive(Debug)]
pub struct Server<S> {
    /// What pods may do.
    pub policies: Policies,
    /// Who a caller is.
    pub resolver: CallerResolver,
    /// Where its credentials come from.
    pub credentials: Arc<CredentialCache<S>>,
    /// The session tokens of IMDSv2.
    pub imds_tokens: ImdsTokens,
    /// Service accounts whose pods may present the tokens of other pods on this node.
    pub token_delegates: Vec<ServiceAccountRef>,
    /// What is known of the instance.
    pub instance: watch::Receiver<Instance>,
    /// How many connections each caller has open.
    pub connections: ConnectionLimit,
    /// What is counted.
    pub metrics: RequestMetrics,
}

/// Counts a request that is dropped unanswered, because its caller hung up.
struct PendingRequest<'a> {
    metrics: &'a RequestMetrics,
    dialect: Dialect,
    is_answered: bool,
}

// === impl Server ===

impl<S: CredentialSource> Server<S> {
    /// Admits a connection: the future serves it until it ends, and once `drain` begins, the request in flight is the
    /// last. `None`, and the connection is closed, when its caller has as many as it may.
    pub fn admit(
        self: Arc<Self>,
        accepted: Accepted,
        drain: DrainWatch,
    ) -> Option<impl Future<Output = ()> + Send + use<S>> {
        let Accepted { stream, origin, peer, in_network_of } = accepted;
        let source_pod = origin.as_ref().and_then(|origin| self.resolver.source_pod(origin.cgroup_id).ok());
        #[cfg(feature = "undefended")]
        let (origin, source_pod) = crate::undefended::by_address(peer, origin, source_pod);
        // Whoever else connects in a pod's network, as a node-wide proxy does, is anonymous there.
        let is_foreign = |pod: &SourcePod| in_network_of.is_some_and(|own| own != pod.uid);
        let is_foreign = source_pod.as_ref().is_some_and(is_foreign);
        let (origin, source_pod) = if is_foreign { (None, None) } else { (origin, source_pod) };
        // Every pod has the same address there; on the node it has its own.
        let own_address =
            in_network_of.and_then(|uid| self.resolver.known(uid)).and_then(|pod| pod.ips.first().copied());
        let peer = own_address.unwrap_or(peer);
        let attested = source_pod.as_ref().map(|pod| pod.uid).or(in_network_of);
        let key = attested.map_or(LimitKey::Address(peer), LimitKey::Pod);
        let Some(permit) = self.connections.permit(key) else {
            self.metrics.refused_connections.inc();
            return None;
        };
        let connection = Connection::new(&stream, origin, peer, source_pod, in_network_of, permit);
        Some(async move {
            connection::serve(Stream::new(stream, in_network_of.is_some()), drain, |request| {
                self.respond(&connection, request)
            })
            .await;
        })
    }

    async fn respond(&self, connection: &Connection, request: Request<Incoming>) -> Response {
        let begun = Instant::now();
        // The body is dropped unread; hyper closes the connection rather than take it for the next request.
        let (head, _) = request.into_parts();
        let dialect =
            Dialect::pick(connection.orig_dst(), connection.accepted_at, &head.headers, head.uri.path());
        let mut pending = PendingRequest { metrics: &self.metrics, dialect, is_answered: false };
        let answer = self.answer(dialect, connection, &head, begun + TIMEOUT);
        let answer = tokio::time::timeout_at((begun + DEADLINE).into(), answer).await;
        pending.is_answered = true;
        let answer = answer.unwrap_or_else(|_| Err(error_response::slow()));
        let (mut response, refusal) = match answer {
            Ok(response) => (response, None),
            Err(refusal) => (dialect.refuse(&refusal), Some(refusal)),
        };
        connection.finish(&mut response);
        self.metrics.count(dialect, response.status());
        let entry = Entry {
            connection,
            resolver: &self.resolver,
            dialect,
            status: response.status(),
            refusal: refusal.as_ref(),
            elapsed: begun.elapsed(),
        };
        entry.write();
        response
    }

    async fn answer(
        &self,
        dialect: Dialect,
        connection: &Connection,
        head: &Parts,
        deadline: Instant,
    ) -> Result<Response, Refusal> {
        let now = Timestamp::now();
        match dialect {
            Dialect::PodIdentity => {
                let sent = pod_identity::parse(head, now)?;
                let credentials = self.container(connection, head, sent, deadline).await?;
                Ok(pod_identity::credentials(&credentials))
            }
            Dialect::Ecs => {
                let sent = ecs::parse(head, now)?;
                let credentials = self.container(connection, head, sent, deadline).await?;
                Ok(ecs::credentials(&credentials))
            }
            Dialect::Imds => self.imds(connection, head, now, deadline).await,
        }
    }

    async fn policy(&self, pod: &Pod, deadline: Instant) -> Result<Policy, Refusal> {
        self.policies.wait(pod, deadline).await.ok_or_else(|| error_response::namespace_unknown(pod))
    }

    /// The pod that connected, if it did so from its own network. Through another network it may be a proxy: then the
    /// caller is anonymous if it sent a token, and refused if not.
    async fn attested(
        &self,
        connection: &Connection,
        origin: &Origin,
        sent: Option<&SentToken>,
        deadline: Instant,
    ) -> Result<Option<Arc<Pod>>, Refusal> {
        let source_pod = self.source_pod(connection, origin)?;
        let pod = match sent {
            // The token names the very pod whose cgroup connected: EKS Auth knows it, even if the watch does not yet.
            Some(sent) if sent.claims.pod == Some(source_pod.uid) => self.resolver.known(source_pod.uid),
            _ => {
                let pod = self.resolver.pod(source_pod.uid, deadline).await;
                Some(pod.map_err(|error| error_response::identity(&error))?)
            }
        };
        let Some(pod) = pod else { return Ok(None) };
        // A listener in a pod's own network proves where the connection came from.
        if connection.in_network_of.is_some()
            || connection.own_network.get().is_some()
            || !holds(Defense::OwnNetwork)
        {
            return Ok(Some(pod));
        }
        match self.resolver.own_network(&pod, &source_pod, origin, connection.peer).await {
            Ok(()) => {
                let _ = connection.own_network.set(());
                Ok(Some(pod))
            }
            Err(error) if sent.is_none() => Err(error_response::foreign_network(&error)),
            Err(error) => {
                debug!(%error, "the connection is not attested: its token decides");
                Ok(None)
            }
        }
    }

    /// The pod whose cgroup connected, while it has that cgroup: afterwards a process of another pod may hold the
    /// connection.
    fn source_pod<'a>(
        &self,
        connection: &'a Connection,
        origin: &Origin,
    ) -> Result<Cow<'a, SourcePod>, Refusal> {
        let cgroup_id = origin.cgroup_id;
        let source_pod = match &connection.source_pod {
            Some(_) if connection.permit.is_revoked() => Err(IdentityError::CgroupRemoved { cgroup_id }),
            Some(source_pod) => Ok(Cow::Borrowed(source_pod)),
            None => self.resolver.source_pod(cgroup_id).map(Cow::Owned),
        };
        source_pod.map_err(|error| error_response::identity(&error))
    }
}

// === impl PendingRequest ===

impl Drop for PendingRequest<'_> {
    fn drop(&mut self) {
        if !self.is_answered {
            self.metrics.count_abandoned(self.dialect);
        }
    }
}
