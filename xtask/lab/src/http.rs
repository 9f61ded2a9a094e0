//! The HTTP/1.1 plumbing under every server of the lab.
//!
//! Owns accepting, TLS, reading a request whole, and applying faults. Never looks into a request.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    sync::Arc,
};

use anyhow::Context as _;
use bytes::Bytes;
use futures::TryStreamExt as _;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Method, StatusCode,
    body::{Frame, Incoming},
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::{AddressFamily, sockopt};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

use crate::fault_injection::{Fault, Faults, Service};

/// Larger than anything the lab's clients send.
const MAX_BODY: usize = 1 << 20;

/// A response of a lab server.
pub(crate) type Response = hyper::Response<UnsyncBoxBody<Bytes, io::Error>>;

/// In a response's extensions: the hop limit of this answer's packets, and of those after it on the same connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HopLimit(pub(crate) u8);

/// A request, read to its end.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) method: Method,
    /// As sent, not decoded.
    pub(crate) path: String,
    /// As sent, without the question mark; empty where there is none.
    pub(crate) query: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    /// DER of the client's verified certificate.
    pub(crate) client_certificate: Option<Vec<u8>>,
}

/// A service behind the plumbing.
pub(crate) trait Handler: Send + Sync + 'static {
    /// The service whose faults apply.
    const SERVICE: Service;

    /// Sees every request, before any fault.
    fn arrived(&self, _request: &Request) {}

    /// The proper answer.
    fn handle(&self, request: Request) -> impl Future<Output = Response> + Send;

    /// A fault's answer, worded as the service would.
    fn refuse(&self, request: &Request, refusal: &Refusal) -> Response;
}

/// A fault that is an answer.
#[derive(Debug)]
pub(crate) enum Refusal {
    Error { status: StatusCode, code: String, message: String },
    Throttle { retry_after: Option<std::time::Duration> },
}

/// A running server; it stops when this is dropped.
#[derive(Debug)]
pub(crate) struct Server {
    addresses: Vec<SocketAddr>,
    tasks: JoinSet<()>,
}

struct Connection<H> {
    handler: Arc<H>,
    faults: Faults,
    tls: Option<TlsAcceptor>,
}

// === impl Request ===

impl Request {
    /// A header's value where it is text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }
}

// === impl Server ===

impl Server {
    /// Serves on listeners that are bound already, on the current runtime.
    pub(crate) fn spawn<H: Handler>(
        listeners: Vec<std::net::TcpListener>,
        tls: Option<TlsAcceptor>,
        faults: Faults,
        handler: Arc<H>,
    ) -> anyhow::Result<Self> {
        let (mut addresses, mut tasks) = (Vec::new(), JoinSet::new());
        let connection = Arc::new(Connection { handler, faults, tls });
        for listener in listeners {
            addresses.push(listener.local_addr().context("the listener has no address")?);
            listener.set_nonblocking(true).context("cannot make the listener non-blocking")?;
            let listener =
                TcpListener::from_std(listener).context("cannot hand the listener to the runtime")?;
            tasks.spawn(accept(listener, Arc::clone(&connection)));
        }
        Ok(Self { addresses, tasks })
    }

    /// The address of the first listener.
    pub(crate) fn address(&self) -> SocketAddr {
        self.addresses[0]
    }

    /// Stops listening and closes every connection.
    pub(crate) async fn shutdown(&mut self) {
        self.tasks.shutdown().await;
    }
}

// === impl Connection ===

impl<H: Handler> Connection<H> {
    async fn run(&self, stream: TcpStream) {
        let Ok(socket) = stream.as_fd().try_clone_to_owned() else { return };
        let served = async {
            let Some(tls) = &self.tls else { return self.serve(stream, &socket, None).await };
            // A client that does not trust the certificate stops here; it knows why.
            let Ok(stream) = tls.accept(stream).await else { return };
            let certificates = stream.get_ref().1.peer_certificates();
            let client = certificates.and_then(|chain| chain.first()).map(|certificate| certificate.to_vec());
            self.serve(stream, &socket, client).await;
        };
        tokio::select! {
            () = served => {}
            () = self.faults.cut(H::SERVICE) => {}
        }
    }

    async fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin,
        socket: &OwnedFd,
        client: Option<Vec<u8>>,
    ) {
        let service = service_fn(async |request| {
            let response = self.answer(request, client.clone()).await?;
            if let Some(HopLimit(hops)) = response.extensions().get() {
                limit_hops(socket, *hops)?;
            }
            io::Result::Ok(response)
        });
        // An error here is a client that went away, or a fault that closes the connection.
        let _ = http1::Builder::new()
            .timer(TokioTimer::new())
            .serve_connection(TokioIo::new(stream), service)
            .await;
    }

    async fn answer(
        &self,
        request: hyper::Request<Incoming>,
        client_certificate: Option<Vec<u8>>,
    ) -> io::Result<Response> {
        let (head, body) = request.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await.map_err(io::Error::other)?.to_bytes();
        let request = Request {
            method: head.method,
            path: head.uri.path().to_owned(),
            query: head.uri.query().unwrap_or_default().to_owned(),
            headers: head.headers,
            body,
            client_certificate,
        };
        self.handler.arrived(&request);
        let verdict = self.faults.next(H::SERVICE);
        tokio::time::sleep(verdict.delay).await;
        let refusal = match verdict.fault {
            None | Some(Fault::Latency(_) | Fault::Limit { .. }) => {
                return Ok(self.handler.handle(request).await);
            }
            Some(Fault::Drop) => return Err(io::Error::other("dropped on purpose")),
            Some(Fault::Hang) => return std::future::pending().await,
            Some(Fault::Throttle { retry_after }) => Refusal::Throttle { retry_after },
            Some(Fault::Error { status, code, message }) => {
                let status = StatusCode::from_u16(status).map_err(io::Error::other)?;
                Refusal::Error { status, code, message }
            }
        };
        Ok(self.handler.refuse(&request, &refusal))
    }
}

async fn accept<H: Handler>(listener: TcpListener, connection: Arc<Connection<H>>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                let connection = Arc::clone(&connection);
                connections.spawn(async move { connection.run(stream).await });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

fn limit_hops(socket: &OwnedFd, hops: u8) -> io::Result<()> {
    if sockopt::socket_domain(socket)? == AddressFamily::INET6 {
        sockopt::set_ipv6_unicast_hops(socket, Some(hops))?;
    } else {
        sockopt::set_ip_ttl(socket, hops.into())?;
    }
    Ok(())
}

/// A response whose body is complete.
pub(crate) fn response(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response {
    let body = Full::new(body.into()).map_err(|never: Infallible| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// A JSON response whose body is complete.
pub(crate) fn json(status: StatusCode, value: &serde_json::Value) -> Response {
    response(status, "application/json", value.to_string())
}

/// A JSON response whose body lasts as long as the stream.
pub(crate) fn json_stream(
    stream: impl futures::Stream<Item = io::Result<Bytes>> + Send + 'static,
) -> Response {
    let mut response = Response::new(StreamBody::new(stream.map_ok(Frame::data)).boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Sets a header whose value is made at run time; one that is no legal header value is left out.
pub(crate) fn set_header(response: &mut Response, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(HeaderName::from_static(name), value);
    }
}
