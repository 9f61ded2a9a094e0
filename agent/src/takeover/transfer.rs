//! Hands the cached credentials of an agent over to its successor, so that an upgrade does not start with a cold cache.
//!
//! Owns the socket between the two, in a directory that the containers of both see, and the protocol:
//!
//! ```text
//! successor ─── "podgate/hand/v1\n", nonce ──────────▶ predecessor, whose programs are attached
//!            ◀───────────────────────────── nonce ──
//!            ── HMAC(key, purpose, both nonces) ────▶   proves that it has the key, or gets nothing
//!            ◀── length, credentials sealed with
//!                HMAC(key, purpose, both nonces) ────   cannot be opened or made without the key
//! ```
//!
//! The key is in a map next to the predecessor's programs, and takes `CAP_SYS_ADMIN` to read. A pod that mounts the host's
//! files may reach the socket or replace it, but it learns nothing and nothing that it sends is believed. A process of a
//! pod that is not podgate's is refused at once, so that it cannot keep an agent waiting. Credentials never go to disk.
//! Never decides which of them are used: that is the cache's.

use std::{
    fs::{self, DirEntry},
    future::{self, Ready},
    io,
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use agent_common::defense::{Defense, holds};
use futures::{StreamExt as _, stream::FuturesUnordered};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    sync::watch,
    time::{sleep, timeout},
};
use tracing::{info, warn};

mod session;
pub(crate) mod wire;

use self::session::{NONCE, Nonce, PROOF, Session};
use crate::{
    credentials::{
        cache::{CredentialCache, Transferred},
        source::CredentialSource,
    },
    files,
    identity::peer::{Peer, Peers},
    intercept::{self, HandoverKey},
    log_limit::LogLimit,
};

/// Name of the socket.
pub const SOCKET: &str = "handover.sock";
/// What the successor sends first; the version is that of the protocol.
const HELLO: [u8; 16] = *b"podgate/hand/v1\n";
/// How long a handover may take: both agents are on this node, and a cold cache is not worth waiting longer.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Most bytes that are accepted: several times what all pods of the largest instance need.
const SEALED_MAX: usize = 8 << 20;
/// Handovers at a time. There is one successor; any other client is cut off after [`TIMEOUT`].
const CONCURRENT_MAX: usize = 8;
/// The log has one line in this time of those who got nothing.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// After an error that lasts, as too many open files.
const RETRY_DELAY: Duration = Duration::from_millis(50);

/// Why credentials were not handed over.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No agent listens there.
    #[error("no agent answers there")]
    NoPredecessor,
    /// The socket or its directory cannot be used.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The other side is too slow.
    #[error("it took longer than {} ms", TIMEOUT.as_millis())]
    Slow,
    /// The other side does not have the key of the attached programs.
    #[error(
        "the other side does not have the key: it is not the active agent of this node, or has just been superseded"
    )]
    NoProof,
    /// A process of another pod, or one that has ended.
    #[error(
        "the other side is a process of a pod that is not podgate's: is the socket mounted into another pod?"
    )]
    Foreign,
    /// Too much, or not the protocol.
    #[error("the other side is not podgate, or speaks another version of the protocol")]
    Malformed,
}

/// Counts handovers.
#[derive(Clone, Debug, Default)]
pub struct HandoverMetrics(Family<Labels, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    side: &'static str,
    outcome: &'static str,
}

/// Answers successors.
#[derive(Debug)]
pub struct Predecessor<E, M> {
    /// Where the socket is.
    pub directory: PathBuf,
    /// The key that is next to this agent's own programs.
    pub key: HandoverKey,
    /// The credentials, as they are when a successor asks.
    pub entries: E,
    /// Whether the process with this id may be the successor.
    pub may_be_successor: M,
    /// Counts what comes of it.
    pub metrics: HandoverMetrics,
}

// === impl Error ===

impl Error {
    const fn label(&self) -> &'static str {
        match self {
            Self::NoPredecessor => "no_predecessor",
            Self::Io(_) => "failed",
            Self::Slow => "slow",
            Self::NoProof => "no_proof",
            Self::Foreign => "foreign",
            Self::Malformed => "malformed",
        }
    }
}

// === impl HandoverMetrics ===

impl HandoverMetrics {
    /// Counters that `registry` knows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "podgate_handovers",
            "Attempts to hand credentials over, by side (predecessor, successor) and outcome (unstable)",
            metrics.0.clone(),
        );
        metrics
    }

    fn count<T>(&self, side: &'static str, result: &Result<T, Error>) {
        let outcome = result.as_ref().err().map_or("ok", Error::label);
        self.0.get_or_create(&Labels { side, outcome }).inc();
    }
}

// === impl Predecessor ===

impl<E, M, F> Predecessor<E, M>
where
    E: Fn() -> Vec<Transferred>,
    M: Fn(i32) -> F,
    F: Future<Output = bool>,
{
    /// Answers from the moment at which this agent becomes active, and while it is on standby or shutting down: until its
    /// successor has replaced the socket. Never ends.
    pub async fn serve(self, mut active: watch::Receiver<bool>) {
        loop {
            becomes(&mut active, true).await;
            let active_again = async {
                becomes(&mut active, false).await;
                becomes(&mut active, true).await;
            };
            tokio::select! {
                () = self.answer_all() => {}
                () = active_again => {}
            }
        }
    }

    async fn answer_all(&self) {
        let listener = match listen(&self.directory) {
            Ok(listener) => listener,
            Err(error) => {
                warn!(directory = %self.directory.display(), %error,
                    "cannot make the socket on which a successor asks for credentials: it will fetch all of them");
                return future::pending().await;
            }
        };
        let (mut handovers, mut failures) = (FuturesUnordered::new(), LogLimit::new(1, LOG_INTERVAL));
        loop {
            tokio::select! {
                accepted = listener.accept(), if handovers.len() < CONCURRENT_MAX => match accepted {
                    Ok((stream, _)) => handovers.push(within_timeout(self.answer(stream))),
                    Err(_) => sleep(RETRY_DELAY).await,
                },
                Some(answered) = handovers.next() => self.report(&answered, &mut failures),
            }
        }
    }

    fn report(&self, answered: &Result<usize, Error>, failures: &mut LogLimit) {
        self.metrics.count("predecessor", answered);
        match answered {
            Ok(pods) => info!(pods, "credentials were handed over to the successor"),
            Err(error) => {
                if let Some(suppressed) = failures.admit(Instant::now()) {
                    warn!(%error, suppressed, "a handover was asked for and refused");
                }
            }
        }
    }

    async fn answer(&self, mut stream: UnixStream) -> Result<usize, Error> {
        let may_be_successor = match stream.peer_cred()?.pid() {
            Some(pid) => (self.may_be_successor)(pid).await,
            None => false,
        };
        if !may_be_successor && holds(Defense::HandoverProof) {
            return Err(Error::Foreign);
        }
        let mut hello = [0; HELLO.len() + NONCE];
        stream.read_exact(&mut hello).await?;
        let Some((&HELLO, successor)) = hello.split_first_chunk() else { return Err(Error::Malformed) };
        let successor = Nonce::try_from(successor).map_err(|_| Error::Malformed)?;
        let own = nonce()?;
        stream.write_all(&own).await?;
        let mut proof = [0; PROOF];
        stream.read_exact(&mut proof).await?;
        let session = Session::new(&self.key, successor, own);
        if !session.accepts(&proof) {
            return Err(Error::NoProof);
        }
        let entries = (self.entries)();
        let credentials = wire::encode(&entries).map_err(|_| Error::Malformed)?;
        let sealed = session.seal(credentials).map_err(|_| Error::Malformed)?;
        let length = u32::try_from(sealed.len()).map_err(|_| Error::Malformed)?;
        stream.write_all(&length.to_be_bytes()).await?;
        stream.write_all(&sealed).await?;
        Ok(entries.len())
    }
}

/// Asks the predecessor, whose programs have this key, for its credentials.
pub async fn ask(
    directory: &Path,
    key: &HandoverKey,
    metrics: &HandoverMetrics,
) -> Result<Vec<Transferred>, Error> {
    let received = within_timeout(receive(&directory.join(SOCKET), key)).await;
    metrics.count("successor", &received);
    received
}

async fn receive(socket: &Path, key: &HandoverKey) -> Result<Vec<Transferred>, Error> {
    let mut stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::NoPredecessor,
        _ => Error::Io(error),
    })?;
    let own = nonce()?;
    stream.write_all(&[&HELLO[..], &own].concat()).await?;
    let mut predecessor = Nonce::default();
    stream.read_exact(&mut predecessor).await?;
    let session = Session::new(key, own, predecessor);
    stream.write_all(&session.proof()).await?;
    // A predecessor that refuses the proof hangs up.
    let length = stream.read_u32().await.map_err(|_| Error::NoProof)?;
    let length =
        usize::try_from(length).ok().filter(|length| *length <= SEALED_MAX).ok_or(Error::Malformed)?;
    let mut sealed = vec![0; length];
    stream.read_exact(&mut sealed).await?;
    let credentials = session.open(sealed).map_err(|_| Error::NoProof)?;
    wire::decode(&credentials).ok_or(Error::Malformed)
}

async fn within_timeout<T>(handover: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(TIMEOUT, handover).await.unwrap_or(Err(Error::Slow))
}

/// Makes the socket, and replaces the predecessor's.
fn listen(directory: &Path) -> io::Result<UnixListener> {
    files::closed_directory(directory)?;
    let socket = directory.join(SOCKET);
    // A new name first: there is always a socket to connect to.
    let next = directory.join(format!("{SOCKET}.{}", std::process::id()));
    files::remove_if_present(&next)?;
    let listener = UnixListener::bind(&next)?;
    fs::rename(next, socket)?;
    Ok(listener)
}

/// Asks the active agent for its credentials, if one is alive. A failure costs no more than fetching them.
pub(crate) async fn inherit<S: CredentialSource>(
    directory: &Path,
    predecessor_key: impl Fn() -> Result<Option<HandoverKey>, intercept::Error>,
    cache: &CredentialCache<S>,
    metrics: &HandoverMetrics,
) {
    let key = match predecessor_key() {
        Ok(Some(key)) => key,
        Ok(None) => return,
        Err(error) => {
            warn!(%error, "cannot find the key of the predecessor: all credentials are fetched again");
            return;
        }
    };
    match ask(directory, &key, metrics).await {
        Ok(entries) => cache.stage(entries),
        Err(Error::NoPredecessor) => info!("no predecessor is alive: credentials are fetched"),
        Err(error) => {
            warn!(directory = %directory.display(), %error, "no credentials were handed over: they are fetched again");
        }
    }
}

/// A successor is one of the node's own processes, or in a pod of podgate's.
pub(crate) fn may_be_successor(
    peers: Peers,
    is_podgate_pod: impl Fn(u64) -> bool,
) -> impl Fn(i32) -> Ready<bool> {
    move |pid| {
        future::ready(match peers.of_process(pid) {
            Peer::Node => true,
            Peer::Pod(id) => is_podgate_pod(id),
            Peer::Unknown => false,
        })
    }
}

/// What agents have left in the directory, then the directory itself, unless something else is in it, or it is a volume of
/// the container that this runs in, which cannot be removed from inside.
pub fn left(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let Some(entries) = files::if_present(fs::read_dir(directory))? else { return Ok(Vec::new()) };
    let entries = entries.collect::<io::Result<Vec<_>>>()?;
    let is_socket = |entry: &DirEntry| entry.file_name().as_bytes().starts_with(SOCKET.as_bytes());
    let mut left: Vec<_> = entries.iter().filter(|entry| is_socket(entry)).map(DirEntry::path).collect();
    let parent = directory.parent().unwrap_or(directory);
    let is_volume = fs::metadata(directory)?.dev() != fs::metadata(parent)?.dev();
    if left.len() == entries.len() && !is_volume {
        left.push(directory.to_owned());
    }
    Ok(left)
}

fn nonce() -> io::Result<Nonce> {
    let mut nonce = Nonce::default();
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    Ok(nonce)
}

/// Waits until it is so. When the sender is gone, which is while the agent shuts down, that is never.
async fn becomes(active: &mut watch::Receiver<bool>, value: bool) {
    if active.wait_for(|is| *is == value).await.is_err() {
        future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests;
