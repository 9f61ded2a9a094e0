//! Plain TCP between two pods: connections, one stream, and small requests one after the other.
//!
//! Owns both ends. There is no HTTP in it, and nothing waits for anything but the kernel.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};

/// Connections in one measurement.
pub(super) const CONNECTIONS: u32 = 1_000;
/// How long a stream or an exchange is measured.
const DURATION: Duration = Duration::from_millis(500);
/// Bytes in one write of a stream.
const CHUNK: usize = 125_000;
const CHUNK_MEGABYTES: f64 = 0.125;
/// Bytes in a small request, and in its answer.
const MESSAGE: usize = 64;

/// What goes on between the two ends. Each has a port of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Traffic {
    /// Connections that are closed again: the median time of a connect, in microseconds.
    Connect,
    /// One stream to the server: megabytes per second.
    Stream,
    /// Small requests on one connection: requests per second.
    Exchange,
}

#[derive(Debug, Args)]
pub(crate) struct TrafficArguments {
    /// The server, or where to be one.
    #[arg(long)]
    address: IpAddr,
    /// Measure this; without it, be the server.
    #[arg(long, value_enum)]
    measure: Option<Traffic>,
}

// === impl Traffic ===

impl Traffic {
    pub(super) const ALL: [Self; 3] = [Self::Connect, Self::Stream, Self::Exchange];

    fn port(self) -> u16 {
        match self {
            Self::Connect => 8091,
            Self::Stream => 8092,
            Self::Exchange => 8093,
        }
    }

    /// Its name on the command line.
    pub(super) fn argument(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Stream => "stream",
            Self::Exchange => "exchange",
        }
    }
}

/// Serves until killed, or measures and prints one number.
pub(crate) fn traffic(arguments: &TrafficArguments) -> anyhow::Result<()> {
    let Some(traffic) = arguments.measure else { return serve(arguments.address) };
    let server = SocketAddr::new(arguments.address, traffic.port());
    let measured = match traffic {
        Traffic::Connect => connect(server),
        Traffic::Stream => stream(server),
        Traffic::Exchange => exchange(server),
    };
    println!("{}", measured.with_context(|| format!("no {} with {server}", traffic.argument()))?);
    Ok(())
}

fn serve(address: IpAddr) -> anyhow::Result<()> {
    let mut servers = Vec::new();
    for traffic in Traffic::ALL {
        let listener = TcpListener::bind((address, traffic.port()))?;
        servers.push(thread::spawn(move || {
            loop {
                // A client that goes away is no failure of the server.
                if let Ok((connection, _)) = listener.accept() {
                    let _ = answer(traffic, connection);
                }
            }
        }));
    }
    println!("{}", super::server::READY);
    if servers.into_iter().any(|server| server.join().is_err()) {
        bail!("BUG: a server ended");
    }
    Ok(())
}

fn answer(traffic: Traffic, mut connection: TcpStream) -> std::io::Result<()> {
    match traffic {
        // The server closes: TIME_WAIT is then not the client's, which would run out of ports.
        Traffic::Connect => {}
        Traffic::Stream => {
            let mut chunk = vec![0; CHUNK];
            while connection.read(&mut chunk)? > 0 {}
            // Everything has arrived.
            connection.write_all(&[0])?;
        }
        Traffic::Exchange => {
            connection.set_nodelay(true)?;
            let mut message = [0; MESSAGE];
            loop {
                connection.read_exact(&mut message)?;
                connection.write_all(&message)?;
            }
        }
    }
    Ok(())
}

fn connect(server: SocketAddr) -> anyhow::Result<f64> {
    let mut took = Vec::new();
    for _ in 0..CONNECTIONS {
        let began = Instant::now();
        let mut connection = TcpStream::connect(server)?;
        took.push(began.elapsed().as_secs_f64() * 1e6);
        connection.read_to_end(&mut Vec::new())?;
    }
    Ok(super::median(&took))
}

fn stream(server: SocketAddr) -> anyhow::Result<f64> {
    let mut connection = TcpStream::connect(server)?;
    let chunk = vec![0; CHUNK];
    let began = Instant::now();
    let mut chunks = 0_u32;
    while began.elapsed() < DURATION {
        connection.write_all(&chunk)?;
        chunks += 1;
    }
    connection.shutdown(std::net::Shutdown::Write)?;
    connection.read_exact(&mut [0])?;
    Ok(f64::from(chunks) * CHUNK_MEGABYTES / began.elapsed().as_secs_f64())
}

fn exchange(server: SocketAddr) -> anyhow::Result<f64> {
    let mut connection = TcpStream::connect(server)?;
    connection.set_nodelay(true)?;
    let mut message = [0; MESSAGE];
    let began = Instant::now();
    let mut requests = 0.0;
    while began.elapsed() < DURATION {
        connection.write_all(&message)?;
        connection.read_exact(&mut message)?;
        requests += 1.0;
    }
    Ok(requests / began.elapsed().as_secs_f64())
}
