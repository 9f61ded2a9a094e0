//! The real programs in the running kernel: each test has a network namespace and a kubepods cgroup of its own.
//!
//! Needs root, a cgroup2 mount, and an agent built with the eBPF object.
#![expect(
    clippy::expect_used,
    clippy::unwrap_used,
    reason = "a test fails where something is not as it should be"
)]

use std::{io, net::SocketAddr, os::fd::OwnedFd};

use agent_common::net::Endpoint;
use rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

mod decisions;
mod egress;
mod events;
mod fence;
mod flood;
mod generations;
mod handover;
mod heartbeat;
mod identity;
mod kernel_node;
mod limits;
mod log;
mod maps;
mod options;
mod pod_listeners;
mod pod_network;
mod socket_kinds;
mod ticket_life;
mod tickets;
mod wire;

const IMDS: &str = "169.254.169.254:80";
const IMDS_V6: &str = "[fd00:ec2::254]:80";
const IMDS_MAPPED: &str = "[::ffff:169.254.169.254]:80";
const POD_IDENTITY: &str = "169.254.170.23:80";
const POD_IDENTITY_V6: &str = "[fd00:ec2::23]:80";
const POD_IDENTITY_MAPPED: &str = "[::ffff:169.254.170.23]:80";
const ECS: &str = "169.254.170.2:80";

/// An address as the origin has it.
fn endpoint(address: &str) -> Endpoint {
    let address: SocketAddr = address.parse().unwrap();
    Endpoint::new(address.ip(), address.port())
}

/// Whether the kernel has refused the connection.
fn is_eperm<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EPERM))
}

/// An IPv4 socket that has not been connected to yet.
fn tcp_socket() -> OwnedFd {
    socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap()
}

/// Connects with a socket that may have been connected to before.
fn reconnect(socket: &OwnedFd, address: &str) -> io::Result<()> {
    let address: SocketAddr = address.parse().unwrap();
    Ok(connect(socket, &address)?)
}
