//! Whether the EKS Pod Identity Agent is on the node, and answers.

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

/// Time between two questions.
const EVERY: Duration = Duration::from_secs(1);
/// How long it may take: it is on this node.
const TIMEOUT: Duration = Duration::from_millis(500);
const ADDRESS: SocketAddrV4 = SocketAddrV4::new(POD_IDENTITY_V4, HTTP_PORT);
/// What every HTTP answer begins with.
const HTTP: [u8; 5] = *b"HTTP/";

/// the EKS Pod Identity Agent, as far as podgate knows it.
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
        tasks.spawn("the questions to the EKS Pod Identity Agent", ask(asked, answer));
        Self { is_here, may_ask, answers }
    }

    /// Whether a pod of it is on the node.
    pub(crate) fn is_here(&self) -> bool {
        *self.is_here.borrow()
    }

    /// Whether it has answered when it was last asked.
    pub(crate) fn answers(&self) -> bool {
        *self.answers.borrow()
    }

    /// From now on it is asked every second, or not at all.
    pub(crate) fn ask(&self, may_ask: bool) {
        self.may_ask.send_if_modified(|before| std::mem::replace(before, may_ask) != may_ask);
    }

    /// Waits until one of these is another.
    pub(crate) async fn changed(&mut self) {
        tokio::select! {
            Ok(()) = self.is_here.changed() => {}
            Ok(()) = self.answers.changed() => {}
            // Whoever tells has ended, and the agent does.
            else => std::future::pending().await,
        }
    }
}

/// Asks every second, forever, but only while it may: the rest of the time nobody answers.
async fn ask(mut may_ask: watch::Receiver<bool>, answer: watch::Sender<bool>) {
    let tell = |answers: bool| {
        if answer.send_replace(answers) != answers {
            info!(answers, "the EKS Pod Identity Agent answers, or does no more");
        }
    };
    while may_ask.wait_for(|may_ask| *may_ask).await.is_ok() {
        let asking = async {
            loop {
                // First of all: podgate's own listeners may just be closing there.
                sleep(EVERY).await;
                tell(matches!(timeout(TIMEOUT, first_bytes(ADDRESS)).await, Ok(Ok(HTTP))));
            }
        };
        tokio::select! {
            () = asking => {}
            _ = may_ask.wait_for(|may_ask| !may_ask) => tell(false),
        }
    }
}

/// How an answer begins, whatever it is.
async fn first_bytes(address: SocketAddrV4) -> io::Result<[u8; 5]> {
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET / HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", address.ip());
    stream.write_all(request.as_bytes()).await?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
