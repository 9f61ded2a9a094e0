//! The steps of a request, in order: dialect, identity, policy, credentials, answer.
//!
//! Owns that sequence and what each failure means to the caller; the one place that awaits every stage. Never
//! parses a format, never calls AWS.

use std::{
    borrow::Cow,
    convert::Infallible,
    net::IpAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use agent_common::{
    defense::{Defense, holds},
    net::{Endpoint, Service},
    origin::Origin,
};
use hyper::{
    Request, StatusCode,
    body::Incoming,
    header::{CONNECTION, HeaderValue},
    http::request::Parts,
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use jiff::Timestamp;
use tokio::{net::TcpStream, sync::watch};
use tracing::{debug, info, warn};

mod limit;
pub mod metrics;
mod refusal;

pub use self::limit::ConnectionLimit;
use self::{
    limit::{LimitKey, Place},
    metrics::RequestMetrics,
};
use crate::{
    accept::Accepted,
    credentials::{
        Credentials, Floor, cache::CredentialCache, source::CredentialSource, token::claims::SentToken,
    },
    dialect::{
        Dialect, Refusal, Response, ecs, forwarded, imds, imds::ReadPath, imds_token::ImdsTokens,
        is_forwarded, pod_identity,
    },
    drain::DrainWatch,
    identity::{CallerResolver, Error as IdentityError, Pod, PodUid, ServiceAccountRef, SourcePod},
    instance_metadata::Instance,
    policy::lookup::Policies,
    policy::{ImdsMode, Policy},
};

/// Every request is answered by then: SDKs give up at one second.
pub const DEADLINE: Duration = Duration::from_millis(800);
/// What a request waits for says a little earlier what is missing.
const TIMEOUT: Duration = Duration::from_millis(780);
/// After so many requests a connection is closed. SDKs send a few an hour.
const REQUESTS_MAX: u32 = 1_000;
/// How long a request's head may take, and how long a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest head, in bytes: a token has 1 to 2 kB, and nothing else is long.
const HEAD_MAX: usize = 32 * 1024;

/// Serves callers.
#[derive(Debug)]
pub struct Server<S> {
    /// What pods may do.
    pub policies: Policies,
    /// Who a caller is.
    pub resolver: CallerResolver,
    /// What it gets.
    pub engine: Arc<CredentialCache<S>>,
    /// The session tokens of IMDSv2.
    pub imds_tokens: ImdsTokens,
    /// Whose pods may present the tokens of other pods on this node.
    pub token_delegates: Vec<ServiceAccountRef>,
    /// What is known of the instance.
    pub instance: watch::Receiver<Instance>,
    /// How many connections each caller has open.
    pub connections: ConnectionLimit,
    /// What is counted.
    pub metrics: RequestMetrics,
}

/// Counts a request whose caller hangs up: then it is dropped unanswered.
struct Waiting<'a> {
    metrics: &'a RequestMetrics,
    dialect: Dialect,
    is_answered: bool,
}

/// A connection and what the kernel said of it when it was accepted. That holds for as long as the pod has its cgroup.
struct Connection {
    origin: Option<Origin>,
    peer: IpAddr,
    /// The service at whose own address podgate took it; `None` for podgate's own pair.
    to: Option<Service>,
    source_pod: Option<SourcePod>,
    caller: Place,
    requests: AtomicU32,
    /// Set once the dial is known to be from the pod's own network.
    own_network: OnceLock<()>,
}

// === impl Server ===

impl<S: CredentialSource> Server<S> {
    /// Takes a connection: what comes of it serves it to its end. When `drain` begins, the request in flight is the last.
    /// `None`, and it is closed at once, when its caller has as many as it may.
    pub fn admit(
        self: Arc<Self>,
        accepted: Accepted,
        drain: DrainWatch,
    ) -> Option<impl Future<Output = ()> + Send + use<S>> {
        let Accepted { stream, origin, peer } = accepted;
        let source_pod = origin.as_ref().and_then(|origin| self.resolver.source_pod(origin.cgroup_id).ok());
        #[cfg(feature = "undefended")]
        let (origin, source_pod) = crate::undefended::by_address(peer, origin, source_pod);
        let whose =
            source_pod.as_ref().map_or(LimitKey::Address(peer), |source_pod| LimitKey::Pod(source_pod.uid));
        let Some(caller) = self.connections.enter(whose) else {
            self.metrics.refused_connections.inc();
            return None;
        };
        let connection = Connection {
            to: to(&stream, origin.as_ref()),
            origin,
            peer,
            source_pod,
            caller,
            requests: AtomicU32::new(0),
            own_network: OnceLock::new(),
        };
        Some(self.connection(stream, connection, drain))
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, connection: Connection, mut drain: DrainWatch) {
        #[cfg(feature = "undefended")]
        let stream = crate::undefended::Unframed(stream);
        let service =
            service_fn(|request| async { Ok::<_, Infallible>(self.request(&connection, request).await) });
        let served = protocol().serve_connection(TokioIo::new(stream), service);
        let mut served = std::pin::pin!(served);
        let result = tokio::select! {
            result = served.as_mut() => result,
            () = drain.begun() => {
                served.as_mut().graceful_shutdown();
                served.await
            }
        };
        if let Err(error) = result {
            // Garbage, a head too long or too slow, a caller who hung up: its own connection ends, no more.
            debug!(%error, "a connection ended early");
        }
    }

    async fn request(&self, connection: &Connection, request: Request<Incoming>) -> Response {
        let begun = Instant::now();
        let (head, _) = request.into_parts();
        let dialect = Dialect::pick(connection.dialled(), connection.to, &head.headers, head.uri.path());
        let mut waiting = Waiting { metrics: &self.metrics, dialect, is_answered: false };
        let answer = self.answer(dialect, connection, &head, begun + TIMEOUT);
        let answer = tokio::time::timeout_at((begun + DEADLINE).into(), answer).await;
        waiting.is_answered = true;
        let answer = answer.unwrap_or_else(|_| Err(refusal::slow()));
        let (mut response, refusal) = match answer {
            Ok(response) => (response, None),
            Err(refusal) => (dialect.refuse(&refusal), Some(refusal)),
        };
        let requests = connection.requests.fetch_add(1, Relaxed) + 1;
        if requests >= REQUESTS_MAX || connection.caller.is_revoked() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        self.metrics.count(dialect, response.status());
        self.log(connection, dialect, &response, refusal.as_ref(), begun);
        // A body is dropped unread; hyper closes the connection rather than take it for the next request.
        response
    }

    /// Logs a request, unless its caller has filled the log already: how often it asks is its own affair.
    fn log(
        &self,
        connection: &Connection,
        dialect: Dialect,
        response: &Response,
        refusal: Option<&Refusal>,
        begun: Instant,
    ) {
        let Some(more) = connection.caller.may_log() else { return };
        if let Some(refusal) = refusal {
            log_refusal(connection, dialect, refusal);
        }
        let outcome = refusal.map_or("ok", |refusal| &refusal.code);
        let uid = connection.uid();
        let pod = uid.and_then(|uid| self.resolver.known(uid));
        info!(
            target: "access",
            dialect = dialect.label(),
            status = response.status().as_u16(),
            outcome,
            more,
            pod.uid = uid.map(tracing::field::display),
            pod.name = pod.as_deref().map(Pod::full_name),
            sa = pod.as_deref().map(|pod| tracing::field::display(&pod.service_account)),
            process = connection.process(),
            ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            "request"
        );
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
                let sent = pod_identity::ask(head, now)?;
                let credentials = self.container(connection, head, sent, deadline).await?;
                Ok(pod_identity::credentials(&credentials))
            }
            Dialect::Ecs => {
                let sent = ecs::ask(head, now)?;
                let credentials = self.container(connection, head, sent, deadline).await?;
                Ok(ecs::credentials(&credentials))
            }
            Dialect::Imds => self.imds(connection, head, now, deadline).await,
        }
    }

    /// The container endpoints: by the caller's token, by the kernel's attestation, or by both, which must agree.
    async fn container(
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
            return Err(refusal::pod_identity_is_off());
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
                    return Err(pod_identity::no_token(refusal::TOKENLESS_HINT));
                }
                if is_forwarded(&head.headers) {
                    return Err(forwarded());
                }
                (pod, None)
            }
        };
        let answer = self.engine.for_pod(&pod, sent, Floor::Container, deadline).await;
        answer.map_err(|error| refusal::credentials(&error, Some(&pod)))
    }

    /// A caller of whom nobody knows more than its token.
    async fn anonymous(
        &self,
        connection: &Connection,
        sent: SentToken,
        deadline: Instant,
    ) -> Result<Arc<Credentials>, Refusal> {
        let answer = self.engine.for_token(sent, connection.peer, deadline).await;
        answer.map_err(|error| refusal::credentials(&error, None))
    }

    /// The refusal of a token that is not the caller's own, and word of it: somebody may have stolen it.
    fn mismatched_token(&self, connection: &Connection, pod: &Pod, sent: &SentToken) -> Refusal {
        self.metrics.count_mismatched_token(&pod.service_account);
        if let Some(more) = connection.caller.may_audit() {
            let process = connection.process();
            warn!(
                target: "audit",
                process,
                more,
                pod.uid = %pod.uid,
                pod.name = pod.full_name(),
                sa = %pod.service_account,
                claimed.uid = sent.claims.pod.map(tracing::field::display),
                "a pod presented a token that is not its own; what it says of itself is not verified"
            );
        }
        refusal::mismatched_token()
    }

    /// A caller that the operator lets present the tokens of other pods, as CSI drivers do while they fill a pod's volumes.
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
        if let Some(more) = connection.caller.may_audit() {
            info!(
                target: "audit",
                more,
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
        let answer = self.engine.for_pod(&pod, Some(sent), Floor::Container, deadline).await;
        answer.map_err(|error| refusal::credentials(&error, Some(&pod)))
    }

    /// The pod of this node whose token a delegate presents. Nothing but the token speaks for that pod, so that it is
    /// verified here, whatever EKS Auth would say.
    async fn presented(&self, sent: &SentToken, deadline: Instant) -> Result<Arc<Pod>, Refusal> {
        let verified = self.engine.is_verified(sent).await;
        if !verified.map_err(|error| refusal::credentials(&error, None))? {
            return Err(refusal::unverified());
        }
        let uid = sent.claims.pod.ok_or_else(refusal::mismatched_token)?;
        let pod = self.resolver.pod(uid, deadline).await.map_err(|error| refusal::identity(&error))?;
        if self.policy(&pod, deadline).await?.pod_identity {
            Ok(pod)
        } else {
            Err(refusal::pod_identity_is_off())
        }
    }

    async fn imds(
        &self,
        connection: &Connection,
        head: &Parts,
        now: Timestamp,
        deadline: Instant,
    ) -> Result<Response, Refusal> {
        let origin = connection.origin.as_ref().ok_or_else(refusal::anonymous)?;
        let ask = imds::ask(head)?;
        let uid = self.source_pod(connection, origin)?.uid;
        let (session, path) = match ask {
            // Never waits for anything: every SDK that knows IMDSv2 begins here.
            imds::Ask::Token { ttl_secs } => {
                return Ok(imds::token(self.imds_tokens.mint(uid, now, ttl_secs), ttl_secs));
            }
            imds::Ask::Read { session, path } => (session, path),
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

    /// What a path has for the pod that dialled. A session was valid, or there is none.
    async fn imds_read(
        &self,
        connection: &Connection,
        origin: &Origin,
        head: &Parts,
        path: ReadPath<'_>,
        has_session: bool,
        deadline: Instant,
    ) -> Result<Response, Refusal> {
        // Of use to whoever asks, and nothing to anybody else: not even the pod need be known.
        if let ReadPath::Fact(fact) = path
            && (has_session || (fact.is_place() && !is_forwarded(&head.headers)))
        {
            return imds::fact(fact, &self.instance.borrow());
        }
        let attested = self.attested(connection, origin, None, deadline).await?;
        let pod = attested.ok_or_else(refusal::anonymous)?;
        allow_read(self.policy(&pod, deadline).await?, head, has_session)?;
        match path {
            ReadPath::Fact(fact) => return imds::fact(fact, &self.instance.borrow()),
            ReadPath::Listing(names) => return Ok(imds::listing(names)),
            ReadPath::Other => return Err(imds::nothing()),
            ReadPath::Roles | ReadPath::Role(_) | ReadPath::Iam | ReadPath::Info => {}
        }
        let answer = self.engine.for_pod(&pod, None, Floor::Imds, deadline).await;
        let credentials = answer.map_err(|error| refusal::credentials(&error, Some(&pod)))?;
        imds::own(path, &credentials)
    }

    async fn policy(&self, pod: &Pod, deadline: Instant) -> Result<Policy, Refusal> {
        self.policies.wait(pod, deadline).await.ok_or_else(|| refusal::namespace_unknown(pod))
    }

    /// The pod that dialled, if the dial came from its own network. One through another's is not the pod's own: with a
    /// token it is anonymous, without one it is refused.
    async fn attested(
        &self,
        connection: &Connection,
        origin: &Origin,
        sent: Option<&SentToken>,
        deadline: Instant,
    ) -> Result<Option<Arc<Pod>>, Refusal> {
        let source_pod = self.source_pod(connection, origin)?;
        let pod = match sent {
            // The token names the very pod whose cgroup dialled: EKS Auth knows it, even if the watch does not yet.
            Some(sent) if sent.claims.pod == Some(source_pod.uid) => self.resolver.known(source_pod.uid),
            _ => Some(
                self.resolver
                    .pod(source_pod.uid, deadline)
                    .await
                    .map_err(|error| refusal::identity(&error))?,
            ),
        };
        let Some(pod) = pod else { return Ok(None) };
        if connection.own_network.get().is_some() || !holds(Defense::OwnNetwork) {
            return Ok(Some(pod));
        }
        match self.resolver.own_network(&pod, &source_pod, origin, connection.peer).await {
            Ok(()) => {
                let _ = connection.own_network.set(());
                Ok(Some(pod))
            }
            Err(error) if sent.is_none() => Err(refusal::foreign_network(&error)),
            Err(error) => {
                debug!(%error, "the kernel's attestation does not count, the token must");
                Ok(None)
            }
        }
    }

    /// The pod whose cgroup dialled, as long as it has one: a process of another pod may have been given its connection.
    fn source_pod<'a>(
        &self,
        connection: &'a Connection,
        origin: &Origin,
    ) -> Result<Cow<'a, SourcePod>, Refusal> {
        let cgroup_id = origin.cgroup_id;
        let source_pod = match &connection.source_pod {
            Some(_) if connection.caller.is_revoked() => Err(IdentityError::CgroupGone { cgroup_id }),
            Some(source_pod) => Ok(Cow::Borrowed(source_pod)),
            None => self.resolver.source_pod(cgroup_id).map(Cow::Owned),
        };
        source_pod.map_err(|error| refusal::identity(&error))
    }
}

// === impl Waiting ===

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.is_answered {
            self.metrics.count_abandoned(self.dialect);
        }
    }
}

// === impl Connection ===

impl Connection {
    /// The process that dialled, as logs name it.
    fn process(&self) -> Option<String> {
        self.origin.as_ref().map(|origin| process(&origin.comm, origin.tgid))
    }

    fn uid(&self) -> Option<PodUid> {
        self.source_pod.as_ref().map(|source_pod| source_pod.uid)
    }

    /// The service that the caller dialled. Without an origin nobody knows, nor where the caller dialled podgate itself:
    /// that is where every dial is sent, and where sidecars see it go.
    fn dialled(&self) -> Option<Service> {
        let origin = self.origin.as_ref()?;
        if origin.orig_dst.same(&origin.target) { None } else { origin.orig_dst.service() }
    }
}

/// HTTP/1.1 as every connection speaks it. Names of headers are written as EC2 and the EKS Pod Identity Agent write them.
pub fn protocol() -> http1::Builder {
    let mut protocol = http1::Builder::new();
    protocol
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_MAX)
        .title_case_headers(true);
    protocol
}

/// The service at whose address a connection was accepted.
fn to(stream: &TcpStream, origin: Option<&Origin>) -> Option<Service> {
    match origin {
        Some(origin) => origin.target.service(),
        None => stream.local_addr().ok().and_then(|own| Endpoint::new(own.ip(), own.port()).service()),
    }
}

/// Whether the pod may read from IMDS here and now. The kernel has asked this when it dialled; it may have changed.
fn allow_read(policy: Policy, head: &Parts, has_session: bool) -> Result<(), Refusal> {
    match policy.imds {
        ImdsMode::Intercept => {}
        ImdsMode::Deny => return Err(refusal::denied()),
        ImdsMode::Off | ImdsMode::Audit => return Err(refusal::not_intercepted()),
    }
    if has_session {
        return Ok(());
    }
    if !policy.imds_v1 {
        return Err(imds::v1_is_off());
    }
    if is_forwarded(&head.headers) { Err(forwarded()) } else { Ok(()) }
}

/// A process as logs name it, `name/pid`. The pod chooses the name.
pub(crate) fn process(comm: &[u8; 16], tgid: u32) -> String {
    let end = comm.iter().position(|byte| *byte == 0).unwrap_or(comm.len());
    let name = String::from_utf8_lossy(&comm[..end]);
    format!("{}/{tgid}", name.escape_debug())
}

/// Refusals that somebody should look at; the rest is in the access log.
fn log_refusal(connection: &Connection, dialect: Dialect, refusal: &Refusal) {
    if refusal.status.is_server_error() || refusal.status == StatusCode::FORBIDDEN {
        warn!(
            dialect = dialect.label(),
            pod.uid = connection.uid().map(tracing::field::display),
            process = connection.process(),
            reason = refusal.message,
            "a caller was refused"
        );
    }
}
