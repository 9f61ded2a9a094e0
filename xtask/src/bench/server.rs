//! A hyper server that answers every request with the same bytes: the least that a server can cost.

use std::{convert::Infallible, net::SocketAddr};

use clap::Args;
use http_body_util::Full;
use hyper::{Request, Response, body::Bytes, header, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// A port of the node that nothing else uses.
pub(super) const BARE_PORT: u16 = 8090;
/// What the server prints once it listens.
pub(super) const READY: &str = "ready";

#[derive(Debug, Args)]
pub(crate) struct ServerArguments {
    /// Where to listen.
    #[arg(long)]
    address: SocketAddr,
    /// Size of the body.
    #[arg(long)]
    body_bytes: usize,
}

/// Serves until killed.
pub(crate) fn serve(arguments: &ServerArguments) -> anyhow::Result<()> {
    let body = Bytes::from(vec![b'x'; arguments.body_bytes]);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(arguments.address).await?;
        println!("{READY}");
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let body = body.clone();
            let service = service_fn(move |_: Request<_>| {
                let mut response = Response::new(Full::new(body.clone()));
                let json = header::HeaderValue::from_static("application/json");
                response.headers_mut().insert(header::CONTENT_TYPE, json);
                async { Ok::<_, Infallible>(response) }
            });
            // A client that goes away is no failure of the server.
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    })
}
