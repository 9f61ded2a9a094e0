//! Network namespaces: the node's and each pod's.
//!
//! Owns a handle that keeps a namespace alive and lets a short-lived thread work inside it. The namespace of the
//! caller never changes.

mod eks_agent_netdev;
mod netlink;
mod routing_mode;
mod tamper;
mod wiring;

use std::{
    fs::File,
    io::{self, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context as _, anyhow, ensure};
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::Handle;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};

pub(crate) use self::{
    eks_agent_netdev::make_eks_agent_netdev,
    wiring::{wire_node, wire_pod},
};
pub use self::{
    routing_mode::Routing,
    wiring::{NodeAddresses, PodAddresses, node_addresses},
};

/// Connections that wait to be accepted: as many as the system lets.
const BACKLOG: i32 = 4096;

/// A network namespace; it lives as long as this handle, or a process or a socket in it.
#[derive(Debug)]
pub struct NetNs(File);

// === impl NetNs ===

impl NetNs {
    /// A new namespace with nothing but a `lo` that is down.
    pub fn create() -> anyhow::Result<Self> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot create a network namespace: run as root")?;
            Self::open(Path::new("/proc/thread-self/ns/net"))
        })
    }

    /// The namespace at `path`, such as `/proc/PID/ns/net`.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let file = File::open(path)
            .with_context(|| format!("cannot open the network namespace {}", path.display()))?;
        Ok(Self(file))
    }

    /// Moves the calling thread into the namespace, for good.
    pub fn enter(&self) -> anyhow::Result<()> {
        setns(&self.0, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace: run as root")
    }

    /// Runs `work` inside, on a thread of its own. Sockets and processes made there stay in the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
        on_thread(|| {
            self.enter()?;
            work()
        })
    }

    /// A listener inside. Others can still listen at the wildcard address of its port: on a real node, not all of these
    /// addresses are local.
    pub fn listen(&self, address: SocketAddr) -> anyhow::Result<TcpListener> {
        self.run(|| listen(address).with_context(|| format!("cannot listen on {address}")))
    }

    /// A connection from inside, by this process: outside any pod's cgroup.
    pub fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        self.run(|| Ok(TcpStream::connect(address))).map_err(io::Error::other)?
    }

    /// Loads a set of nftables' rules.
    pub fn load_rules(&self, rules: &str) -> anyhow::Result<()> {
        self.run(|| {
            let mut nft = Command::new("nft")
                .args(["-f", "-"])
                .stdin(Stdio::piped())
                .spawn()
                .context("cannot run nft: install the package nftables")?;
            nft.stdin.take().context("BUG: nft's input is not a pipe")?.write_all(rules.as_bytes())?;
            let status = nft.wait()?;
            ensure!(
                status.success(),
                "nft refused the rules ({status}): the kernel needs CONFIG_NF_TABLES_INET"
            );
            Ok(())
        })
    }

    /// Runs `work` inside with a netlink connection.
    fn netlink<T: Send>(
        &self,
        work: impl AsyncFnOnce(Handle) -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection()?;
                tokio::spawn(connection);
                work(handle).await
            })
        })
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn listen(address: SocketAddr) -> rustix::io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

fn on_thread<T: Send>(work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    thread::scope(|scope| scope.spawn(work).join())
        .map_err(|_| anyhow!("BUG: a thread in a network namespace panicked"))?
}
