//! Plain TCP between two pods: connections, one stream, and small requests one after the other.
//!
//! Owns both ends. There is no HTTP in it, and nothing waits for anything but the kernel. Each measurement takes some
//! milliseconds, on a connection that is there already where it is not about connecting, and gives a median: what else
//! the machine does meanwhile counts little.

use std::{
    io::{self, BufRead as _, Read as _, Write as _, stdin},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::Instant,
};

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, ValueEnum};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// Connections in one measurement.
pub(super) const CONNECTIONS: u32 = 100;
/// Requests in one measurement.
pub(super) const REQUESTS: u32 = 300;
/// Pieces of the stream in one measurement; the server confirms each.
const PIECES: u32 = 16;
/// Bytes in a piece: a megabyte.
const PIECE: usize = 1_000_000;
/// Bytes in one write of a stream.
const CHUNK: usize = 125_000;
/// Bytes in a small request, and in its answer.
const MESSAGE: usize = 64;

/// What goes on between the two ends. Each has a port of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Traffic {
    /// Connections that are closed again: the median time of a connect, in microseconds.
    Connect,
    /// One stream to the server: megabytes per second, at the median time of one.
    Stream,
    /// Small requests on one connection: requests per second, at the median time of one.
    Exchange,
}

#[derive(Debug, Args)]
pub(crate) struct TrafficArguments {
    /// The server, or where to be one.
    #[arg(long)]
    address: IpAddr,
    /// The first of the server's three ports.
    #[arg(long)]
    port: u16,
    /// Measure what standard input names, line by line; without it, be the server.
    #[arg(long)]
    measure: bool,
}

/// The client's side.
struct Client {
    server: IpAddr,
    port: u16,
    stream: TcpStream,
    exchange: TcpStream,
}

// === impl Traffic ===

impl Traffic {
    pub(super) const ALL: [Self; 3] = [Self::Connect, Self::Stream, Self::Exchange];

    /// Its name on the client's standard input.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Stream => "stream",
            Self::Exchange => "exchange",
        }
    }

    fn port(self, first: u16) -> u16 {
        first + self as u16
    }
}

// === impl Client ===

impl Client {
    fn new(server: IpAddr, port: u16) -> anyhow::Result<Self> {
        let connect = |traffic: Traffic| -> anyhow::Result<_> {
            let connection = TcpStream::connect((server, traffic.port(port)))?;
            connection.set_nodelay(true)?;
            Ok(connection)
        };
        Ok(Self { server, port, stream: connect(Traffic::Stream)?, exchange: connect(Traffic::Exchange)? })
    }

    fn measure(&mut self, traffic: Traffic) -> anyhow::Result<f64> {
        match traffic {
            Traffic::Connect => connect(SocketAddr::new(self.server, traffic.port(self.port))),
            Traffic::Stream => stream(&mut self.stream),
            Traffic::Exchange => exchange(&mut self.exchange),
        }
    }
}

/// Serves until killed, or measures what it is told to and prints one number each time.
pub(crate) fn traffic(arguments: &TrafficArguments) -> anyhow::Result<()> {
    if !arguments.measure {
        return serve(arguments.address, arguments.port);
    }
    stay_on_processor(0)?;
    let mut client = Client::new(arguments.address, arguments.port).context("no server")?;
    println!("{}", super::server::READY);
    for line in stdin().lock().lines() {
        let traffic = Traffic::from_str(&line?, false).map_err(|error| anyhow!("BUG: {error}"))?;
        println!("{}", client.measure(traffic).with_context(|| format!("no {}", traffic.name()))?);
    }
    Ok(())
}

/// Both ends stay where they are, or where the scheduler puts them would be what is measured.
fn stay_on_processor(number: usize) -> anyhow::Result<()> {
    let available = thread::available_parallelism()?.get();
    let mut processors = CpuSet::new();
    processors.set(number % available)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &processors)?)
}

fn serve(address: IpAddr, port: u16) -> anyhow::Result<()> {
    stay_on_processor(1)?;
    let mut servers = Vec::new();
    for traffic in Traffic::ALL {
        let listener = TcpListener::bind((address, traffic.port(port)))?;
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

fn answer(traffic: Traffic, mut connection: TcpStream) -> io::Result<()> {
    match traffic {
        // The server closes: TIME_WAIT is then not the client's, which would run out of ports.
        Traffic::Connect => Ok(()),
        Traffic::Stream => {
            let mut chunk = vec![0; CHUNK];
            loop {
                let mut left = PIECE;
                while left > 0 {
                    let most = left.min(CHUNK);
                    let read = connection.read(&mut chunk[..most])?;
                    if read == 0 {
                        return Ok(());
                    }
                    left -= read;
                }
                // Everything has arrived.
                connection.write_all(&[0])?;
            }
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

fn stream(connection: &mut TcpStream) -> anyhow::Result<f64> {
    let chunk = vec![0; CHUNK];
    per_second(PIECES, || {
        for _ in 0..PIECE / CHUNK {
            connection.write_all(&chunk)?;
        }
        connection.read_exact(&mut [0])
    })
}

fn exchange(connection: &mut TcpStream) -> anyhow::Result<f64> {
    let mut message = [0; MESSAGE];
    per_second(REQUESTS, || {
        connection.write_all(&message)?;
        connection.read_exact(&mut message)
    })
}

/// How often something can be done in a second that is done so many times.
fn per_second(times: u32, mut once: impl FnMut() -> io::Result<()>) -> anyhow::Result<f64> {
    let mut took = Vec::new();
    for _ in 0..times {
        let began = Instant::now();
        once()?;
        took.push(began.elapsed().as_secs_f64());
    }
    Ok(super::median(&took).recip())
}
