//! Gives the credentials that an agent holds to the one that takes its place, so that an upgrade is no cold start.
//!
//! Owns the socket between the two, in a directory that the containers of both see, and the conversation:
//!
//! ```text
//! next agent ── "podgate/hand/v1\n", nonce ──────────▶ predecessor, whose programs are effective
//!            ◀───────────────────────────── nonce ──
//!            ── HMAC(key, purpose, both nonces) ────▶   proves that it has the key, or gets nothing
//!            ◀── length, credentials sealed with
//!                HMAC(key, purpose, both nonces) ────   cannot be opened or made without the key
//! ```
//!
//! The key is with the predecessor's programs in the kernel, and takes `CAP_SYS_ADMIN` to read. So whoever gets at the
//! socket or puts another in its place, as a pod can that the host's files are shown to, learns nothing, and nothing of it
//! is believed. A process of a pod that is none of podgate's is not listened to, so that it keeps no agent waiting. Never on
//! disk. Never decides what of it is used: that is the engine's.

use std::{
    fs::{self, DirBuilder, DirEntry, Permissions},
    io,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _},
    },
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
use crate::{credentials::cache::Transferred, intercept::HandoverKey, log_limit::LogLimit};

/// Name of the socket.
pub const SOCKET: &str = "handover.sock";
/// What the next agent says first; the version is that of the conversation.
const HELLO: [u8; 16] = *b"podgate/hand/v1\n";
/// How long a conversation may take: both are on this node, and a cold start is no harm worth waiting for.
const TIMEOUT: Duration = Duration::from_secs(1);
/// Most bytes that are taken: several times what all pods of the largest instance need.
const SEALED_MAX: usize = 8 << 20;
/// Conversations at once. There is one next agent, and each of the others ends with its time.
const AT_ONCE: usize = 8;
/// The log has one line in this time of those who got nothing.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// After an error that lasts, as too many open files.
const RETRY_DELAY: Duration = Duration::from_millis(50);

/// Why credentials have not changed hands.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No agent is there that could answer.
    #[error("no agent answers there")]
    Nobody,
    /// The socket or its directory cannot be used.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The other side takes its time.
    #[error("it took longer than {} ms", TIMEOUT.as_millis())]
    Slow,
    /// The other side has not the key of the programs effective.
    #[error(
        "the other side does not have the key: it is no agent active on this node, or has just been succeeded"
    )]
    NoProof,
    /// A process of another pod, or one that is gone already.
    #[error(
        "the other side is no process of podgate's or of the node's own: a pod to which the socket is shown?"
    )]
    Foreign,
    /// Too much, or not what an agent says.
    #[error("the other side is no podgate, or one that this one does not understand")]
    Garbage,
}

/// Counts handovers.
#[derive(Clone, Debug, Default)]
pub struct HandoverMetrics(Family<Labels, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    side: &'static str,
    outcome: &'static str,
}

/// What one agent gives to the next.
#[derive(Debug)]
pub struct Predecessor<E, M> {
    /// Where the socket is.
    pub directory: PathBuf,
    /// That of this agent's own programs.
    pub key: HandoverKey,
    /// What is given, as it is when it is asked for.
    pub entries: E,
    /// Whether the process with this id may be the next agent.
    pub may_be_next: M,
    /// What is counted.
    pub metrics: HandoverMetrics,
}

// === impl Error ===

impl Error {
    const fn label(&self) -> &'static str {
        match self {
            Self::Nobody => "nobody",
            Self::Io(_) => "failed",
            Self::Slow => "slow",
            Self::NoProof => "no_proof",
            Self::Foreign => "foreign",
            Self::Garbage => "garbage",
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
            "Attempts to hand credentials over, by side (predecessor, next agent) and with what result (unstable)",
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

impl<E: Fn() -> Vec<Transferred>, M: Fn(i32) -> bool> Predecessor<E, M> {
    /// Answers from the moment on at which this agent is in charge, also when it is no more: until another one has put its
    /// socket in the place of this one. Never ends.
    pub async fn serve(self, mut active: watch::Receiver<bool>) {
        loop {
            becomes(&mut active, true).await;
            let charge_lost_and_regained = async {
                becomes(&mut active, false).await;
                becomes(&mut active, true).await;
            };
            tokio::select! {
                () = self.answer_all() => {}
                () = charge_lost_and_regained => {}
            }
        }
    }

    async fn answer_all(&self) {
        let listener = match listen(&self.directory) {
            Ok(listener) => listener,
            Err(error) => {
                warn!(directory = %self.directory.display(), %error,
                    "cannot make the socket on which the next agent asks for credentials: it will fetch all of them");
                return std::future::pending().await;
            }
        };
        let (mut conversations, mut failures) = (FuturesUnordered::new(), LogLimit::new(1, LOG_INTERVAL));
        loop {
            tokio::select! {
                accepted = listener.accept(), if conversations.len() < AT_ONCE => match accepted {
                    Ok((stream, _)) => conversations.push(in_time(self.answer(stream))),
                    Err(_) => sleep(RETRY_DELAY).await,
                },
                Some(answered) = conversations.next() => self.report(&answered, &mut failures),
            }
        }
    }

    fn report(&self, answered: &Result<usize, Error>, failures: &mut LogLimit) {
        self.metrics.count("former", answered);
        match answered {
            Ok(pods) => info!(pods, "credentials are handed over to the next agent"),
            Err(error) => {
                if let Some(more) = failures.admit(Instant::now()) {
                    warn!(%error, more, "somebody has asked for a handover and got nothing");
                }
            }
        }
    }

    async fn answer(&self, mut stream: UnixStream) -> Result<usize, Error> {
        let peer = stream.peer_cred()?.pid();
        if !peer.is_some_and(&self.may_be_next) && holds(Defense::HandoverProof) {
            return Err(Error::Foreign);
        }
        let mut hello = [0; HELLO.len() + NONCE];
        stream.read_exact(&mut hello).await?;
        let Some((&HELLO, next)) = hello.split_first_chunk() else { return Err(Error::Garbage) };
        let next = Nonce::try_from(next).map_err(|_| Error::Garbage)?;
        let own = nonce()?;
        stream.write_all(&own).await?;
        let mut proof = [0; PROOF];
        stream.read_exact(&mut proof).await?;
        let session = Session::new(&self.key, next, own);
        if !session.accepts(&proof) {
            return Err(Error::NoProof);
        }
        let entries = (self.entries)();
        let credentials = wire::encode(&entries).map_err(|_| Error::Garbage)?;
        let sealed = session.seal(credentials).map_err(|_| Error::Garbage)?;
        let length = u32::try_from(sealed.len()).map_err(|_| Error::Garbage)?;
        stream.write_all(&length.to_be_bytes()).await?;
        stream.write_all(&sealed).await?;
        Ok(entries.len())
    }
}

/// Asks the agent whose programs have this key for its credentials.
pub async fn ask(
    directory: &Path,
    key: &HandoverKey,
    metrics: &HandoverMetrics,
) -> Result<Vec<Transferred>, Error> {
    let received = in_time(receive(&directory.join(SOCKET), key)).await;
    metrics.count("next", &received);
    received
}

async fn receive(socket: &Path, key: &HandoverKey) -> Result<Vec<Transferred>, Error> {
    let mut stream = UnixStream::connect(socket).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::Nobody,
        _ => Error::Io(error),
    })?;
    let own = nonce()?;
    stream.write_all(&[&HELLO[..], &own].concat()).await?;
    let mut former = Nonce::default();
    stream.read_exact(&mut former).await?;
    let session = Session::new(key, own, former);
    stream.write_all(&session.proof()).await?;
    // Who does not like the proof hangs up.
    let length = stream.read_u32().await.map_err(|_| Error::NoProof)?;
    let length = usize::try_from(length).ok().filter(|length| *length <= SEALED_MAX).ok_or(Error::Garbage)?;
    let mut sealed = vec![0; length];
    stream.read_exact(&mut sealed).await?;
    let credentials = session.open(sealed).map_err(|_| Error::NoProof)?;
    wire::decode(&credentials).ok_or(Error::Garbage)
}

async fn in_time<T>(conversation: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(TIMEOUT, conversation).await.unwrap_or(Err(Error::Slow))
}

/// Makes the socket, in the place of that of the predecessor.
fn listen(directory: &Path) -> io::Result<UnixListener> {
    make_private(directory)?;
    let socket = directory.join(SOCKET);
    // A new name first: there is always a socket to connect to.
    let next = directory.join(format!("{SOCKET}.{}", std::process::id()));
    match fs::remove_file(&next) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&next)?;
    fs::rename(next, socket)?;
    Ok(listener)
}

/// What agents have left in the directory, then the directory, unless something else is in it; or it is a volume of the
/// container that this is run in, which cannot be removed from inside.
pub fn left(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?.collect::<io::Result<Vec<_>>>()?,
    };
    let is_socket = |entry: &DirEntry| entry.file_name().as_bytes().starts_with(SOCKET.as_bytes());
    let mut left: Vec<_> = entries.iter().filter(|entry| is_socket(entry)).map(DirEntry::path).collect();
    let parent = directory.parent().unwrap_or(directory);
    let is_volume = fs::metadata(directory)?.dev() != fs::metadata(parent)?.dev();
    if left.len() == entries.len() && !is_volume {
        left.push(directory.to_owned());
    }
    Ok(left)
}

/// Removes what [`left`] has found. What somebody else has removed is fine.
pub fn remove(path: &Path) -> io::Result<()> {
    let removed = if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// The kubelet makes the directory of a `hostPath` for everybody to read.
fn make_private(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let metadata = fs::symlink_metadata(directory)?;
    if !metadata.is_dir() || metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("it must be a directory of podgate's own user"));
    }
    if metadata.mode() & 0o777 != 0o700 {
        fs::set_permissions(directory, Permissions::from_mode(0o700))?;
    }
    Ok(())
}

fn nonce() -> io::Result<Nonce> {
    let mut nonce = Nonce::default();
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    Ok(nonce)
}

/// Waits until it is so. Whoever would tell has ended, and the agent does: nothing changes any more.
async fn becomes(active: &mut watch::Receiver<bool>, value: bool) {
    if active.wait_for(|is| *is == value).await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests;
