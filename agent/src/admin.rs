//! Probes and metrics over TCP, and commands over a private Unix socket.
//!
//! Owns what operators and the kubelet ask; never serves a pod, never returns a secret. The TCP port belongs to the agent
//! active on the node, so that metrics come from one; each agent has a Unix socket of its own, where the kubelet's
//! probes (`podgate probe`) get this very agent's answer.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
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

use crate::whois::Whois;

/// How long a question may take to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// After an error that lasts, as too many open files.
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// How long the predecessor may keep the port after it was succeeded.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Most connections at a time over TCP, most of those who may command, and most of those who may not: whoever opens many is
/// in the way of its like alone, and uses up no descriptors that pods' connections need.
const CONNECTIONS_MAX: usize = 16;

type Answer = Response<Full<Bytes>>;

/// What the kubelet and Prometheus ask.
#[derive(Debug)]
pub struct Probes {
    /// Whether pods are served.
    pub ready: AtomicBool,
    /// What is counted.
    pub registry: Registry,
}

/// Answers probes at `address` whenever this agent is in charge.
pub async fn serve_probes(address: SocketAddr, probes: Arc<Probes>, mut active: watch::Receiver<bool>) {
    while active.wait_for(|active| *active).await.is_ok() {
        tokio::select! {
            () = serve_port(address, &probes) => {}
            _ = active.wait_for(|active| !active) => {}
        }
    }
}

async fn serve_port(address: SocketAddr, probes: &Arc<Probes>) {
    let listener = bind(address).await;
    let places = places();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let probes = Arc::clone(probes);
                serve(stream, &places, move |request| probes.answer(request));
            }
            Err(_) => sleep(RETRY_DELAY).await,
        }
    }
}

/// Waits until the predecessor has left the port, and complains when it takes too long: pods are served without
/// metrics as well.
async fn bind(address: SocketAddr) -> TcpListener {
    let mut complain_at = Instant::now() + TIMEOUT;
    loop {
        let error = match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) => error,
        };
        if timeout_at(complain_at, sleep(RETRY_DELAY)).await.is_err() {
            warn!(%address, %error, "cannot listen for probes and metrics: trying again");
            complain_at += 10 * TIMEOUT;
        }
    }
}

/// Answers commands forever: those of the node and of podgate's own pod. A pod to which the socket is shown, by a
/// hostPath, is told nothing.
pub async fn serve_commands(listener: UnixListener, whois: Arc<Whois>, probes: Arc<Probes>) {
    let (places, others_places) = (places(), places());
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (whois, probes) = (Arc::clone(&whois), Arc::clone(&probes));
                let pid = stream.peer_cred().ok().and_then(|peer| peer.pid());
                let may_command =
                    pid.is_some_and(|pid| whois.may_command(pid)) || !holds(Defense::OwnCommands);
                let places = if may_command { &places } else { &others_places };
                serve(stream, places, move |request| {
                    if may_command { command(&whois, &probes, request) } else { not_yours() }
                });
            }
            Err(_) => sleep(RETRY_DELAY).await,
        }
    }
}

/// Makes the socket for commands. What a predecessor left is replaced.
///
/// # Errors
/// When the socket cannot be made, or the directory is not the user's own and private.
pub fn bind_commands(socket: &Path) -> io::Result<UnixListener> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let metadata = std::fs::metadata(directory)?;
    if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
        let refusal = format!("{} must be a directory of podgate's own with mode 0700", directory.display());
        return Err(io::Error::other(refusal));
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
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

fn not_yours() -> Answer {
    text(
        StatusCode::FORBIDDEN,
        "this socket is for podgate's own pod and for the node's processes outside of pods",
    )
}

fn places() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(CONNECTIONS_MAX))
}

/// Answers on a connection, or closes it where no place is free.
fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    places: &Arc<Semaphore>,
    answer: impl Fn(&Request<Incoming>) -> Answer + Send + Sync + 'static,
) {
    let place = Arc::clone(places).try_acquire_owned().ok();
    if place.is_none() && holds(Defense::ProbeLimit) {
        return;
    }
    tokio::spawn(async move {
        let _place = place;
        let service = service_fn(|request| std::future::ready(Ok::<_, Infallible>(answer(&request))));
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service);
        // Whoever asked has hung up: nothing is left to tell.
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
