//! One accepted connection: what the kernel said of it, and how HTTP is spoken on it.
//!
//! Owns the limits of a connection; never decides about a request.

use std::{
    convert::Infallible,
    net::IpAddr,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use agent_common::{
    net::{Endpoint, Service},
    origin::Origin,
};
use hyper::{
    Request,
    body::Incoming,
    header::{CONNECTION, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpStream, sync::Notify, time::timeout};
use tracing::debug;

use super::{limit::ConnectionPermit, stream::Stream};
use crate::{
    dialect::Response,
    drain::DrainWatch,
    identity::{PodUid, SourcePod},
};

/// A connection is closed after so many requests. SDKs send a few an hour.
const REQUESTS_MAX: u32 = 1_000;
/// How long a request's head may take, and how long a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection that is there when draining begins has for its first request to arrive.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_millis(500);
/// Longest head in bytes: a token has 1 to 2 kB, and nothing else is long.
const HEAD_MAX: usize = 32 * 1024;

/// A connection and what the kernel said of it when it was accepted, which holds while the pod has its cgroup.
pub(super) struct Connection {
    pub(super) origin: Option<Origin>,
    pub(super) peer: IpAddr,
    /// The service whose own address podgate accepted it at; `None` at podgate's own addresses.
    pub(super) accepted_at: Option<Service>,
    pub(super) source_pod: Option<SourcePod>,
    /// The pod in whose own network it was accepted.
    pub(super) in_network_of: Option<PodUid>,
    pub(super) permit: ConnectionPermit,
    /// Set once the connection is known to come from the pod's own network.
    pub(super) own_network: OnceLock<()>,
    requests: AtomicU32,
}

// === impl Connection ===

impl Connection {
    pub(super) fn new(
        stream: &TcpStream,
        origin: Option<Origin>,
        peer: IpAddr,
        source_pod: Option<SourcePod>,
        in_network_of: Option<PodUid>,
        permit: ConnectionPermit,
    ) -> Self {
        let accepted_at = match &origin {
            Some(origin) => origin.target.service(),
            None => stream.local_addr().ok().and_then(|own| Endpoint::new(own.ip(), own.port()).service()),
        };
        Self {
            origin,
            peer,
            accepted_at,
            source_pod,
            in_network_of,
            permit,
            own_network: OnceLock::new(),
            requests: AtomicU32::new(0),
        }
    }

    /// The service that the caller connected to. Unknown without an origin, and where the caller connected to podgate's
    /// own address: every connection is redirected there, and a sidecar sees that address.
    pub(super) fn orig_dst(&self) -> Option<Service> {
        let origin = self.origin.as_ref()?;
        if origin.orig_dst.same(&origin.target) { None } else { origin.orig_dst.service() }
    }

    /// The UID of the pod that connected, if the kernel attests one.
    pub(super) fn pod_uid(&self) -> Option<PodUid> {
        self.source_pod.as_ref().map(|source_pod| source_pod.uid)
    }

    /// Counts a response, and asks the caller to reconnect where this is the last one.
    pub(super) fn finish(&self, response: &mut Response) {
        let requests = self.requests.fetch_add(1, Relaxed) + 1;
        if requests >= REQUESTS_MAX || self.permit.is_revoked() {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

/// Serves a connection until it ends. Once `drain` begins, the request in flight is the last, or the first one that
/// arrives.
pub(super) async fn serve<F>(
    stream: Stream,
    mut drain: DrainWatch,
    respond: impl Fn(Request<Incoming>) -> F + Send + Sync,
) where
    F: Future<Output = Response> + Send,
{
    #[cfg(feature = "undefended")]
    let stream = crate::undefended::Unframed(stream);
    let requested = Notify::new();
    let service = service_fn(|request| {
        requested.notify_one();
        let response = respond(request);
        async move { Ok::<_, Infallible>(response.await) }
    });
    let served = protocol().serve_connection(TokioIo::new(stream), service);
    let mut served = std::pin::pin!(served);
    let result = tokio::select! {
        result = served.as_mut() => result,
        () = async {
            drain.begun().await;
            // hyper closes a connection at once that has sent nothing yet: to its client, without an answer.
            let _ = timeout(FIRST_REQUEST_TIMEOUT, requested.notified()).await;
        } => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = result {
        // No HTTP, a head too long or too slow, or a caller that hung up: only its own connection ends.
        debug!(%error, "a connection ended with an error");
    }
}

/// HTTP/1.1 with the limits of every connection. Header names are written as EC2 and the EKS Pod Identity Agent write them.
pub(crate) fn protocol() -> http1::Builder {
    let mut protocol = http1::Builder::new();
    protocol
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_MAX)
        .title_case_headers(true);
    protocol
}
