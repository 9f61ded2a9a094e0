//! The simulated node: its cgroups, its network namespace, its kubelet's directory, a bpffs of its own.
//!
//! Owns what exists before the first pod and after the last one. Never runs a server or the agent.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::UnixStream,
};

use crate::{
    cgroupfs::{self, CgroupDriver, NodeCgroups},
    enter::{self, Entry, RunDirectory, base_environment},
    process_id::Process,
    simulated_network::{NetNs, Routing, wire_node},
};

/// The node's name.
pub const NODE_NAME: &str = "ip-10-10-0-10.us-west-2.compute.internal";

/// Where the node is on this machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodePlace {
    /// The lab's directory.
    pub directory: PathBuf,
    /// The node's cgroups.
    pub cgroups: NodeCgroups,
    /// A process that only keeps the node's network namespace alive.
    pub keeper: Process,
}

/// The node, held by the process that made it.
#[derive(Debug)]
pub struct Node {
    /// Where it is.
    pub place: NodePlace,
    /// Its network namespace.
    pub netns: NetNs,
    /// That of the instance metadata service, beyond the node's uplink.
    pub imds_netns: NetNs,
    /// How it routes its pods.
    pub routing: Routing,
    helper: PathBuf,
    keeper: Child,
}

/// The answer to [`Node::get`].
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body.
    pub body: String,
}

// === impl NodePlace ===

impl NodePlace {
    /// The kubelet's root directory.
    pub fn kubelet(&self) -> PathBuf {
        self.directory.join("kubelet")
    }

    /// The node's bpffs; it outlives any one agent.
    pub fn bpffs(&self) -> PathBuf {
        Self::bpffs_in(&self.directory)
    }

    pub(crate) fn bpffs_in(directory: &Path) -> PathBuf {
        directory.join("bpffs")
    }

    /// What the agent sees as `/run/podgate`.
    pub fn agent_run(&self) -> PathBuf {
        self.directory.join("agent")
    }

    /// Where agents hand credentials over to each other.
    pub fn handover(&self) -> PathBuf {
        self.directory.join("handover")
    }

    /// The socket of the agent that was started last.
    pub fn agent_socket(&self) -> PathBuf {
        self.agent_run().join("podgate.sock")
    }

    /// The way to run something on the node outside any pod.
    pub fn entry(&self) -> Entry {
        Entry {
            cgroup: self.cgroups.system(),
            netns: self.keeper.netns(),
            run: RunDirectory::Host,
            env: base_environment(),
        }
    }
}

// === impl Node ===

impl Node {
    /// Builds the node of the lab called `name` in its directory.
    pub(crate) fn up(
        name: &str,
        directory: &Path,
        driver: CgroupDriver,
        routing: Routing,
        helper: PathBuf,
    ) -> anyhow::Result<Self> {
        let cgroups = NodeCgroups::create(name, driver)?;
        let netns = NetNs::create()?;
        let imds_netns = NetNs::create()?;
        wire_node(&netns, &imds_netns, routing)?;
        let keeper = keep(&helper, &netns, &cgroups.system())?;
        let place = NodePlace { directory: directory.to_owned(), cgroups, keeper: Process::of(keeper.id())? };
        fs::create_dir(place.kubelet())?;
        fs::DirBuilder::new().mode(0o700).create(place.agent_run())?;
        let bpffs = place.bpffs();
        fs::create_dir(&bpffs)?;
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
            .context("cannot mount a bpffs: the kernel needs CONFIG_BPF_SYSCALL, and this root")?;
        Ok(Self { place, netns, imds_netns, routing, helper, keeper })
    }

    /// Starts a process that keeps `netns` and `cgroup` busy.
    pub(crate) fn keep(&self, netns: &NetNs, cgroup: &Path) -> anyhow::Result<Child> {
        keep(&self.helper, netns, cgroup)
    }

    /// Fetches `http://ADDRESS/PATH` from the node, outside any pod.
    pub async fn get(&self, address: SocketAddr, path: &str) -> io::Result<Answer> {
        let stream = self.netns.connect(address)?;
        stream.set_nonblocking(true)?;
        fetch(tokio::net::TcpStream::from_std(stream)?, &address.to_string(), path).await
    }

    /// Sends a request to the socket of the agent that was started last.
    pub async fn ask_agent(&self, path: &str) -> io::Result<Answer> {
        fetch(UnixStream::connect(self.place.agent_socket()).await?, "podgate", path).await
    }
}

/// One request and its answer.
async fn fetch(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    host: &str,
    path: &str,
) -> io::Result<Answer> {
    // HTTP/1.0: the answer ends with the connection.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::InvalidData)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    Ok(Answer { status: status.ok_or(io::ErrorKind::InvalidData)?, body: body.to_owned() })
}

impl Drop for Node {
    /// Reaps the keeper. Removing the cgroup may have killed it already.
    fn drop(&mut self) {
        let _ = self.keeper.kill();
        let _ = self.keeper.wait();
    }
}

fn keep(helper: &Path, netns: &NetNs, cgroup: &Path) -> anyhow::Result<Child> {
    cgroupfs::create(cgroup)?;
    let child = netns.run(|| {
        Command::new(helper)
            .arg(enter::PAUSE_SUBCOMMAND)
            .env_clear()
            .envs(base_environment())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start a process to keep a network namespace")
    })?;
    cgroupfs::join(cgroup, child.id())?;
    Ok(child)
}
