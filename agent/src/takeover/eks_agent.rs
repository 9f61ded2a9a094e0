//! What podgate knows of the EKS Pod Identity Agent: whether it is on the node, and whether it answers.
//!
//! Owns the probe of its address; never decides what follows from it.

use std::{io, net::SocketAddrV4, time::Duration};

use agent_common::net::{HTTP_PORT, POD_IDENTITY_V4};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::watch,
    time::{sleep, timeout},
};
use tracing::info;

use crate::tasks::Tasks;

/// Time between two probes.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// How long an answer may take: it is on this node.
const TIMEOUT: Duration = Duration::from_millis(500);
const ADDRESS: SocketAddrV4 = SocketAddrV4::new(POD_IDENTITY_V4, HTTP_PORT);
/// What every HTTP response begins with.
const HTTP: [u8; 5] = *b"HTTP/";

/// The EKS Pod Identity Agent, as far as podgate knows it.
pub(crate) struct EksAgent {
    is_here: watch::Receiver<bool>,
    may_ask: watch::Sender<bool>,
    answers: watch::Receiver<bool>,
}

// === impl EksAgent ===

impl EksAgent {
    /// `is_here` says whether a pod of it is on the node.
    pub(crate) fn new(is_here: watch::Receiver<bool>, tasks: &mut Tasks) -> Self {
        let (may_ask, asked) = watch::channel(false);
        let (answer, answers) = watch::channel(false);
        tasks.spawn("the probe of the EKS Pod Identity Agent", ask(asked, answer));
        Self { is_here, may_ask, answers }
    }

    /// Whether a pod of it is on the node.
    pub(crate) fn is_here(&self) -> bool {
        *self.is_here.borrow()
    }

    /// Whether it answered the last probe.
    pub(crate) fn answers(&self) -> bool {
        *self.answers.borrow()
    }

    /// Probes it every second from now on, or not at all.
    pub(crate) fn ask(&self, may_ask: bool) {
        self.may_ask.send_if_modified(|before| std::mem::replace(before, may_ask) != may_ask);
    }

    /// Waits until one of these changes.
    pub(crate) async fn changed(&mut self) {
        tokio::select! {
            Ok(()) = self.is_here.changed() => {}
            Ok(()) = self.answers.changed() => {}
            // The senders are gone: the agent is shutting down.
            else => std::future::pending().await,
        }
    }
}

/// Probes every second while it may, forever. While it may not, the answer is that nobody answers.
async fn ask(mut may_ask: watch::Receiver<bool>, answer: watch::Sender<bool>) {
    let tell = |answers: bool| {
        if answer.send_replace(answers) != answers {
            info!(answers, "whether the EKS Pod Identity Agent answers has changed");
        }
    };
    while may_ask.wait_for(|may_ask| *may_ask).await.is_ok() {
        let asking = async {
            loop {
                // Before the first probe: podgate's own listeners may just be closing there.
                sleep(PROBE_INTERVAL).await;
                tell(matches!(timeout(TIMEOUT, first_bytes(ADDRESS)).await, Ok(Ok(HTTP))));
            }
        };
        tokio::select! {
            () = asking => {}
            _ = may_ask.wait_for(|may_ask| !may_ask) => tell(false),
        }
    }
}

/// The first bytes of a response, whatever it is.
async fn first_bytes(address: SocketAddrV4) -> io::Result<[u8; 5]> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET / HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", address.ip());
    stream.write_all(request.as_bytes()).await?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
