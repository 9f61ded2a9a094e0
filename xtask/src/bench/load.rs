//! Requests, as many as asked for, from a few clients that each wait for the answer before they ask again.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use clap::Args;
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    Request, StatusCode,
    body::Bytes,
    client::conn::http1::{SendRequest, handshake},
    header,
};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::TcpSocket;

/// Clients at a time: enough to keep a server busy, few enough to measure it and not a queue.
const CLIENTS: u32 = 4;

/// The client's side of a connection.
type Connection = SendRequest<Empty<Bytes>>;

#[derive(Clone, Debug, Args)]
pub(crate) struct LoadArguments {
    /// Whom to ask.
    #[arg(long)]
    address: SocketAddr,
    /// What to ask for.
    #[arg(long)]
    path: String,
    /// How many requests in all.
    #[arg(long)]
    requests: u32,
    /// A connection for each request, instead of one per client for as long as the server keeps it open.
    #[arg(long)]
    new_connections: bool,
    /// Bind every connection's socket to this interface.
    #[arg(long)]
    interface: Option<String>,
}

/// What is printed, as JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct LoadResult {
    pub(super) requests: u32,
    pub(super) seconds: f64,
    pub(super) p50_microseconds: f64,
    pub(super) p99_microseconds: f64,
}

/// Runs the load and prints its result. Any answer but 200 is an error.
pub(crate) fn load(arguments: &LoadArguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let began = Instant::now();
    let mut took = runtime.block_on(async {
        let clients: Vec<_> = (0..CLIENTS).map(|_| tokio::spawn(client(arguments.clone()))).collect();
        let mut took = Vec::new();
        for client in clients {
            took.extend(client.await??);
        }
        anyhow::Ok(took)
    })?;
    let seconds = began.elapsed().as_secs_f64();
    took.sort();
    let percentile = |percent: usize| {
        let at = took.len() * percent / 100;
        took.get(at).copied().unwrap_or_default().as_secs_f64() * 1e6
    };
    let result = LoadResult {
        requests: u32::try_from(took.len())?,
        seconds,
        p50_microseconds: percentile(50),
        p99_microseconds: percentile(99),
    };
    println!("{}", serde_json::to_string(&result)?);
    Ok(())
}

/// One client's share. A new connection counts towards its request's time.
async fn client(arguments: LoadArguments) -> anyhow::Result<Vec<Duration>> {
    let mut took = Vec::new();
    let mut connection = None;
    for _ in 0..arguments.requests / CLIENTS {
        let began = Instant::now();
        let mut sender = match reusable(connection.take()).await {
            Some(sender) => sender,
            None => connect(&arguments).await?,
        };
        ask(&mut sender, &arguments).await?;
        took.push(began.elapsed());
        if !arguments.new_connections {
            connection = Some(sender);
        }
    }
    Ok(took)
}

/// The connection, unless the server has closed it: it limits the requests of one.
async fn reusable(connection: Option<Connection>) -> Option<Connection> {
    let mut sender = connection?;
    sender.ready().await.is_ok().then_some(sender)
}

async fn connect(arguments: &LoadArguments) -> anyhow::Result<Connection> {
    let address = arguments.address;
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.bind_device(arguments.interface.as_deref().map(str::as_bytes))?;
    let stream = socket.connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn ask(sender: &mut Connection, arguments: &LoadArguments) -> anyhow::Result<()> {
    sender.ready().await?;
    let mut request = Request::get(&arguments.path).header(header::HOST, arguments.address.ip().to_string());
    if arguments.new_connections {
        // The server closes: TIME_WAIT is then not the client's, which would run out of ports.
        request = request.header(header::CONNECTION, "close");
    }
    let response = sender.send_request(request.body(Empty::new())?).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    ensure!(status == StatusCode::OK, "{status}: {}", String::from_utf8_lossy(&body));
    Ok(())
}
