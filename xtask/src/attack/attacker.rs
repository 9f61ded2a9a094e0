//! The attacker's side: what a hostile process does inside of a pod, and what it got.
//!
//! Owns the attempts; never judges them. It is this very program, static in a virtual machine, so that an attack needs no
//! tools in the pod. It prints one line of JSON when it is done; one that stays says `ready` first, and goes on when its
//! standard input has a line or ends.

mod flood;
mod forge;
mod join;
mod local;
mod relay;
mod segment;
mod socket;

use std::{
    collections::BTreeSet,
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use lab::cgroupfs;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// The name of the hidden subcommand.
pub(crate) const SUBCOMMAND: &str = "attacker";
/// What an attacker that stays says when it may be told to go on.
pub(super) const READY: &str = "ready";
/// How long an answer may take: longer than the agent may.
const TIMEOUT: Duration = Duration::from_secs(2);

/// How long to listen for a handshake: the process that begins it may take a while to start.
const SNIFFING: Duration = Duration::from_secs(3);

/// What to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Act {
    /// Sends these bytes on one connection, and reads to its end.
    Ask { route: Route, request: String },
    /// The three requests of IMDSv2, each with these headers.
    Imds { to: SocketAddr, headers: String },
    /// The same again and again until told to stop; every answer with other credentials, or the last refusal.
    ImdsForEver { to: SocketAddr },
    /// Connects, stays, and sends these bytes when told to.
    AskLater { to: SocketAddr, request: String },
    /// Connects, hangs up, stays, and gives the socket to whoever comes to `path`.
    GiveSocket { path: PathBuf, to: SocketAddr },
    /// The same with a socket whose connect fails before a handshake begins.
    GiveUnsent { path: PathBuf, to: SocketAddr },
    /// Fetches that socket, connects it and sends these bytes.
    TakeSocket { path: PathBuf, to: SocketAddr, request: String },
    /// Makes connections by hand, one for each ticket, and sends these bytes on each, until credentials come; with no more
    /// rights than a container has.
    Forge { from: Ipv4Addr, to: Ipv4Addr, layer: Layer, tickets: Vec<Option<u64>>, request: String },
    /// Tells the first ticket that `from` sends in a handshake.
    Sniff { from: Ipv4Addr },
    /// Begins so many connections, none of which completes, and stays.
    BeginConnects { to: Vec<SocketAddr>, count: u32 },
    /// Opens so many connections, stays, and says this on them as long as it does.
    HoldConnections { to: SocketAddr, count: u32, saying: String },
    /// Opens connections on and on, and holds so many: a new one takes the place of its oldest.
    ChurnConnections { to: SocketAddr, count: u32 },
    /// Passes connections on, as a mesh's sidecar does, and stays.
    Relay { at: SocketAddr, to: SocketAddr },
    /// Asks each of these sockets each of these, with no more rights than a container has; the first answer that is one.
    AskSockets { paths: Vec<PathBuf>, requests: Vec<String> },
    /// Asks the agent for its credentials, as the next agent does; what comes, with the same rights.
    AskHandover { path: PathBuf },
    /// Puts a socket in the place of the agent's, offers these credentials to whoever asks, and stays.
    OfferHandover { path: PathBuf, entries: String },
    /// Sends first segments of handshakes, stays, and goes on with it.
    FloodHandshakes { from: Ipv4Addr, to: Ipv4Addr, count: u32 },
    /// Listens at this port of every address, shares it with nobody who comes later, and stays.
    Squat { port: u16 },
    /// Listens where somebody else does, makes all connections come here, and tells what is sent on the first.
    Join { at: SocketAddr },
    /// Keeps processors busy, and stays.
    BurnCpu { threads: usize },
    /// Sends a packet; whether anything came back.
    Knock { to: Ipv4Addr, how: Knock },
}

/// Where to connect, and from where.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Route {
    pub(super) to: SocketAddr,
    /// Which port to connect from.
    pub(super) from_port: Option<u16>,
    /// A cgroup to make and to connect from; the socket is older.
    pub(super) cgroup: Option<PathBuf>,
}

/// What packets made by hand are given to.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Layer {
    /// A raw socket.
    Ip,
    /// A packet socket, which is below all that sees a pod's packets.
    Link,
}

/// A packet.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Knock {
    /// UDP to port 80.
    Datagram,
    /// ICMP.
    Ping,
}

/// What an attacker got.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Got {
    /// What was answered, or learned.
    pub(super) said: String,
    /// The system's word, where there was no answer.
    pub(super) error: Option<String>,
    /// The ticket that was seen, or how many of them there are.
    pub(super) number: Option<u64>,
    /// How long it took.
    pub(super) milliseconds: u64,
    /// When it asked and when it was refused, where it did so again and again, in milliseconds of `CLOCK_MONOTONIC`.
    pub(super) asked_at: BTreeSet<u64>,
    pub(super) refused_at: BTreeSet<u64>,
}

// === impl Route ===

impl From<SocketAddr> for Route {
    fn from(to: SocketAddr) -> Self {
        Self { to, from_port: None, cgroup: None }
    }
}

impl Route {
    fn connect(&self) -> io::Result<TcpStream> {
        if self.from_port.is_none() && self.cgroup.is_none() {
            return TcpStream::connect_timeout(&self.to, TIMEOUT);
        }
        let socket = socket::tcp(self.to)?;
        if let Some(cgroup) = &self.cgroup {
            cgroupfs::create(cgroup).and_then(|()| cgroupfs::join(cgroup, 0)).map_err(io::Error::other)?;
        }
        socket::connect_to(socket, self.from_port, self.to)
    }
}

// === impl Got ===

impl Got {
    /// HTTP status of the first answer; 0 without one.
    pub(super) fn status(&self) -> u16 {
        let status = self.said.split(' ').nth(1).filter(|_| self.said.starts_with("HTTP/"));
        status.and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// What an attacker without loot was told.
    pub(super) fn refusal(&self) -> String {
        match (&self.error, self.status()) {
            (Some(error), _) => error.clone(),
            (None, 0) if self.said.is_empty() => "no answer".to_owned(),
            (None, 0) => self.said.chars().take(60).collect(),
            (None, status) => format!("HTTP {status}"),
        }
    }

    /// The access keys in what was said.
    pub(super) fn access_keys(&self) -> BTreeSet<&str> {
        let after_name = self.said.split("\"AccessKeyId\"").skip(1);
        after_name.filter_map(|text| text.split('"').nth(1)).collect()
    }

    fn of(result: io::Result<String>) -> Self {
        match result {
            Ok(said) => Self { said, ..Self::default() },
            Err(error) => {
                let name = error.raw_os_error().map(|number| nix::errno::Errno::from_raw(number).to_string());
                let name = name.unwrap_or_else(|| error.to_string());
                Self { error: Some(name.split(':').next().unwrap_or_default().to_owned()), ..Self::default() }
            }
        }
    }
}

/// Does it, and prints what came of it.
pub(crate) fn run(act: &str) -> anyhow::Result<()> {
    let act = serde_json::from_str(act).context("BUG: the attacker does not understand what it is to do")?;
    let began = Instant::now();
    let mut got = act_out(&act)?;
    got.milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    println!("{}", serde_json::to_string(&got)?);
    Ok(())
}

fn act_out(act: &Act) -> anyhow::Result<Got> {
    Ok(match act {
        Act::Ask { route, request } => Got::of(route.connect().and_then(|stream| exchange(stream, request))),
        Act::Imds { to, headers } => Got::of(imds(*to, headers)),
        Act::ImdsForEver { to } => imds_until_told(*to)?,
        Act::AskLater { to, request } => {
            let stream = TcpStream::connect_timeout(to, TIMEOUT)?;
            stay()?;
            Got::of(exchange(stream, request))
        }
        Act::GiveSocket { path, to } => {
            socket::give(path, *to)?;
            Got::default()
        }
        Act::GiveUnsent { path, to } => {
            socket::give_unsent(path, *to)?;
            Got::default()
        }
        Act::TakeSocket { path, to, request } => {
            let taken = socket::take(path).and_then(|socket| socket::connect_to(socket, None, *to));
            Got::of(taken.and_then(|stream| exchange(stream, request)))
        }
        Act::Forge { from, to, layer, tickets, request } => {
            local::drop_rights()?;
            Got::of(forge::ask_with_each(&forge::Forger::new(*from, *to, *layer)?, tickets, request))
        }
        Act::Sniff { from } => {
            let sniffer = forge::Sniffer::new()?;
            ready()?;
            let number = match sniffer.ticket_from(*from, SNIFFING) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => None,
                seen => seen?,
            };
            Got { number, ..Got::default() }
        }
        Act::BeginConnects { to, count } => flood::begin_connects(to, *count)?,
        Act::HoldConnections { to, count, saying } => flood::hold_connections(*to, *count, saying)?,
        Act::ChurnConnections { to, count } => flood::churn_connections(*to, *count)?,
        Act::Relay { at, to } => {
            relay::relay(*at, *to)?;
            Got::default()
        }
        Act::AskSockets { paths, requests } => Got::of(local::ask(paths, requests)),
        Act::AskHandover { path } => Got::of(local::ask_handover(path)),
        Act::OfferHandover { path, entries } => {
            local::offer_handover(path, entries)?;
            Got::default()
        }
        Act::FloodHandshakes { from, to, count } => {
            flood::handshakes(&forge::Forger::new(*from, *to, Layer::Link)?, *count)?
        }
        Act::Squat { port } => {
            join::squat(*port)?;
            Got::default()
        }
        Act::Join { at } => Got::of(join::join(*at)),
        Act::BurnCpu { threads } => {
            flood::burn_cpu(*threads)?;
            Got::default()
        }
        Act::Knock { to, how } => Got::of(forge::knock(*to, *how)),
    })
}

/// Sends a request and reads the answer.
fn exchange(mut stream: TcpStream, request: &str) -> io::Result<String> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if answer.is_empty() => return Err(error),
        // What came before it ended badly counts.
        _ => {}
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// A token, the role's name, its credentials; the last answer, which is a refusal if one comes.
fn imds(to: SocketAddr, headers: &str) -> io::Result<String> {
    let ask = |method: &str, path: &str, header: &str| {
        let request = super::request(method, to.ip(), path, &format!("{header}{headers}"));
        TcpStream::connect_timeout(&to, TIMEOUT).and_then(|stream| exchange(stream, &request))
    };
    let token = ask("PUT", "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n")?;
    let Some(session) = body_of_success(&token) else { return Ok(token) };
    let header = format!("X-aws-ec2-metadata-token: {session}\r\n");
    let roles = ask("GET", super::ROLES, &header)?;
    let Some(role) = body_of_success(&roles) else { return Ok(roles) };
    ask("GET", &format!("{}{role}", super::ROLES), &header)
}

fn imds_until_told(to: SocketAddr) -> anyhow::Result<Got> {
    let mut all = Got { number: Some(0), ..Got::default() };
    repeat(|| {
        let began = now_ms();
        let got = Got::of(imds(to, ""));
        all.number = all.number.map(|attempts| attempts + 1);
        all.asked_at.insert(began);
        if got.access_keys().is_empty() {
            all.refused_at.insert(began);
            if all.access_keys().is_empty() {
                (all.said, all.error) = (got.said, got.error);
            }
        } else if !got.access_keys().is_subset(&all.access_keys()) {
            all.said.push_str(&got.said);
            all.error = None;
        }
        Ok(())
    })?;
    Ok(all)
}

/// `CLOCK_MONOTONIC` in milliseconds: the same for everybody on the machine.
pub(super) fn now_ms() -> u64 {
    let now = Duration::try_from(clock_gettime(ClockId::Monotonic)).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn body_of_success(answer: &str) -> Option<&str> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.starts_with("HTTP/1.1 200").then_some(body)
}

/// Says that everything is in place.
fn ready() -> io::Result<()> {
    println!("{READY}");
    io::stdout().flush()
}

/// Waits until told to go on.
fn wait() -> io::Result<()> {
    io::stdin().read_line(&mut String::new()).map(drop)
}

/// Repeats a step until told to go on.
fn repeat(mut step: impl FnMut() -> io::Result<()>) -> io::Result<()> {
    ready()?;
    let told = std::thread::spawn(wait);
    while !told.is_finished() {
        step()?;
    }
    Ok(())
}

fn stay() -> io::Result<()> {
    ready()?;
    wait()
}

/// The literal of an address as `Host` has it.
pub(super) fn host(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}
