//! Probes and metrics over TCP, and commands over a private Unix socket.
//!
//! Owns both sockets and their limits; never serves a pod, never returns a secret. The TCP port belongs to the active agent
//! of the node, so that metrics come from one agent only. Each agent has a Unix socket of its own, where the kubelet's
//! probes (`podgate probe`) are answered by exactly this agent.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use agent_common::defense::{Defense, holds};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode, body::Incoming, header::CONTENT_TYPE, server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
    sync::{Semaphore, watch},
    time::{Instant, sleep, timeout_at},
};
use tracing::warn;

use crate::{files, identity::peer::Peers, whois::Whois};

/// How long the head of a request may take to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// After an error that lasts, as too many open files.
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// How long the predecessor may keep the port after it was succeeded.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Connections at a time over TCP, by peers who may command, and by peers who may not. The three limits are separate, so
/// that whoever opens many only harms its own kind, and uses up no descriptors that pods' connections need.
const CONNECTIONS_MAX: usize = 16;

type Answer = Response<Full<Bytes>>;

/// What the kubelet and Prometheus ask for.
#[derive(Debug)]
pub(crate) struct Probes {
    /// Whether pods are served: `/readyz`.
    pub ready: Arc<AtomicBool>,
    /// Every metric: `/metrics`.
    pub registry: Registry,
}

/// Answers probes at `address` whenever this agent is active.
pub(crate) async fn serve_probes(
    address: SocketAddr,
    probes: Arc<Probes>,
    mut active: watch::Receiver<bool>,
) {
    while active.wait_for(|active| *active).await.is_ok() {
        tokio::select! {
            () = serve_port(address, &probes) => {}
            _ = active.wait_for(|active| !active) => {}
        }
    }
}

async fn serve_port(address: SocketAddr, probes: &Arc<Probes>) {
    let listener = bind(address).await;
    let permits = permits();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let probes = Arc::clone(probes);
                serve(stream, &permits, move |request| probes.answer(request));
            }
            Err(_) => sleep(RETRY_DELAY).await,
        }
    }
}

/// Waits until the predecessor has left the port, and warns when that takes too long: pods are served without metrics
/// too.
async fn bind(address: SocketAddr) -> TcpListener {
    let mut warn_at = Instant::now() + TIMEOUT;
    loop {
        let error = match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => error,
        };
        if timeout_at(warn_at, sleep(RETRY_DELAY)).await.is_err() {
            warn!(%address, %error, "cannot listen for probes and metrics: trying again");
            warn_at += 10 * TIMEOUT;
        }
    }
}

/// Answers commands forever: those of the node's own processes and of podgate's own pod. Another pod that has mounted the
/// socket from the host is refused.
pub(crate) async fn serve_commands(
    listener: UnixListener,
    peers: Peers,
    whois: Arc<Whois>,
    probes: Arc<Probes>,
) {
    let (permits, foreign_permits) = (permits(), permits());
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (whois, probes) = (Arc::clone(&whois), Arc::clone(&probes));
                let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
                let may_command =
                    pid.is_some_and(|pid| peers.may_command(pid)) || !holds(Defense::OwnCommands);
                let permits = if may_command { &permits } else { &foreign_permits };
                serve(stream, permits, move |request| {
                    if may_command { command(&whois, &probes, request) } else { forbidden() }
                });
            }
            Err(_) => sleep(RETRY_DELAY).await,
        }
    }
}

/// Makes the socket for commands, and replaces one that a predecessor has left.
///
/// # Errors
/// When the socket cannot be made, or the directory is not the user's own and private.
pub(crate) fn bind_commands(socket: &Path) -> io::Result<UnixListener> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    files::private_directory(directory)?;
    files::remove_if_present(socket)?;
    UnixListener::bind(socket)
}

// === impl Probes ===

impl Probes {
    fn answer(&self, request: &Request<Incoming>) -> Answer {
        match request.uri().path() {
            "/livez" => text(StatusCode::OK, "ok"),
            "/readyz" if self.ready.load(Relaxed) => text(StatusCode::OK, "ok"),
            "/readyz" => text(StatusCode::SERVICE_UNAVAILABLE, "not serving pods"),
            "/metrics" => self.metrics(),
            _ => text(StatusCode::NOT_FOUND, "/livez, /readyz and /metrics are here"),
        }
    }

    fn metrics(&self) -> Answer {
        let mut body = String::new();
        if prometheus_client::encoding::text::encode(&mut body, &self.registry).is_err() {
            return text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written");
        }
        typed(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", body)
    }
}

fn command(whois: &Whois, probes: &Probes, request: &Request<Incoming>) -> Answer {
    #[cfg(feature = "undefended")]
    if let Some(labels) = request.uri().path().strip_prefix("/without/") {
        return match crate::undefended::switch(labels) {
            Ok(()) => text(StatusCode::OK, "switched"),
            Err(error) => text(StatusCode::UNPROCESSABLE_ENTITY, error),
        };
    }
    let pid = request.uri().path().strip_prefix("/whois/").and_then(|pid| pid.parse().ok());
    let (&Method::GET, Some(pid)) = (request.method(), pid) else {
        return probes.answer(request);
    };
    match whois.of_process(pid) {
        Ok(answer) => match serde_json::to_string(&answer) {
            Ok(answer) => typed(StatusCode::OK, "application/json", answer),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        },
        Err(error) => text(StatusCode::UNPROCESSABLE_ENTITY, error),
    }
}

fn forbidden() -> Answer {
    text(
        StatusCode::FORBIDDEN,
        "this socket is for podgate's own pod and for the node's processes outside of pods",
    )
}

fn permits() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(CONNECTIONS_MAX))
}

/// Answers on a connection, or closes it when there are [`CONNECTIONS_MAX`] of its kind.
fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    permits: &Arc<Semaphore>,
    answer: impl Fn(&Request<Incoming>) -> Answer + Send + Sync + 'static,
) {
    let permit = Arc::clone(permits).try_acquire_owned().ok();
    if permit.is_none() && holds(Defense::ProbeLimit) {
        return;
    }
    tokio::spawn(async move {
        let _permit = permit;
        let service = service_fn(|request| std::future::ready(Ok::<_, Infallible>(answer(&request))));
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service);
        // An error means that the client has hung up.
        let _ = served.await;
    });
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    typed(status, "text/plain; charset=utf-8", body)
}

fn typed(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    answer
}
