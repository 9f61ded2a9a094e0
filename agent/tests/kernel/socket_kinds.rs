//! Every kind of socket: each arrives with the pod's origin.

use std::{
    fs,
    io::{self, IoSlice, IoSliceMut, Read as _},
    mem::MaybeUninit,
    net::{SocketAddr, TcpStream},
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    path::Path,
    process,
};

use agent::accept::listen;
use agent_common::{
    counter::Counter,
    policy::{IMDS_INTERCEPT, POD_IDENTITY_ON, PodPolicy},
};
use io_uring::{IoUring, opcode, squeue, types};
use nix::{
    sys::wait::{WaitStatus, waitpid},
    unistd::{self, ForkResult, Pid},
};
use rustix::{
    io::ioctl_fionbio,
    net::{
        AddressFamily, Protocol, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, SocketAddrAny, SocketFlags, SocketType, addr::SocketAddrArg as _,
        recvmsg, sendmsg, sendto, socket_with, socketpair,
    },
};

use crate::{
    ECS, IMDS, IMDS_MAPPED, IMDS_V6, POD_IDENTITY, endpoint,
    kernel_node::{AGENT_V4, AGENT_V6, Agent, Node, Pod, RealService, soon},
    options::set_fastopen_connect,
    reconnect, tcp_socket,
};

/// `IPPROTO_MPTCP`.
const MPTCP: Protocol = Protocol::from_raw(std::num::NonZeroU32::new(262).unwrap());
/// `MSG_FASTOPEN`.
const FASTOPEN: SendFlags = SendFlags::from_bits_retain(0x2000_0000);

fn socket_for(address: &str, protocol: Option<Protocol>) -> io::Result<OwnedFd> {
    let family = if address.starts_with('[') { AddressFamily::INET6 } else { AddressFamily::INET };
    Ok(socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, protocol)?)
}

/// Accepts the connection of `pod` to `address`, and nothing besides.
fn arrives(node: &Node, agent: &Agent, pod: &Pod, address: &str, way: &str) {
    let origin = agent.accept().unwrap_or_else(|| panic!("{way}, {address}: anonymous"));
    assert_eq!(origin.pod_cgroup_id, pod.cgroup.id, "{way}, {address}");
    assert_eq!(origin.orig_dst, endpoint(address), "{way}, {address}");
    assert!(agent.try_accept().is_none(), "{way}, {address}: it came twice");
    assert_eq!(node.live_tickets(), 0, "{way}, {address}");
}

#[test]
fn a_repeated_non_blocking_connect_counts_once() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        for address in [IMDS, IMDS_V6, IMDS_MAPPED] {
            let before = node.count(Counter::Redirected);
            let socket = pod.run(|| socket_for(address, None)).unwrap();
            ioctl_fionbio(&socket, true).unwrap();
            let first = pod.run(|| reconnect(&socket, address)).expect_err("the handshake takes a moment");
            assert_eq!(first.raw_os_error(), Some(libc::EINPROGRESS));
            let last = soon(|| {
                let again = pod.run(|| reconnect(&socket, address));
                again.err().filter(|error| error.raw_os_error() != Some(libc::EALREADY))
            });
            assert_eq!(last.raw_os_error(), Some(libc::EISCONN), "{address}");
            arrives(node, &agent, &pod, address, "non-blocking");
            assert_eq!(node.count(Counter::Redirected), before + 1);
        }
    });
}

#[test]
fn fast_open_connections_arrive_with_origin_and_data() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let targets = [SocketAddr::from((AGENT_V4, 80)), (AGENT_V6, 80).into()];
        let listeners = node.as_agent(|| targets.map(|target| listen(target).unwrap()));
        // 1: asks for a cookie; 5: sends data with the SYN without one.
        for sysctl in ["1", "5"] {
            fs::write("/proc/sys/net/ipv4/tcp_fastopen", sysctl).unwrap();
            for (put_off, address) in [true, false]
                .into_iter()
                .flat_map(|put_off| [IMDS, IMDS_V6, IMDS_MAPPED].map(|to| (put_off, to)))
            {
                let case = format!("{address}, tcp_fastopen={sysctl}, TCP_FASTOPEN_CONNECT={put_off}");
                let socket = pod.run(|| socket_for(address, None)).unwrap();
                if put_off {
                    set_fastopen_connect(&socket);
                    pod.run(|| reconnect(&socket, address)).unwrap();
                    rustix::io::write(&socket, b"hello").unwrap();
                } else {
                    let address: SocketAddr = address.parse().unwrap();
                    pod.run(|| sendto(&socket, b"hello", FASTOPEN, &address)).unwrap();
                }
                let (mut accepted, _) = soon(|| listeners.iter().find_map(|listener| listener.accept().ok()));
                let origin = node.origin(&accepted).unwrap_or_else(|| panic!("{case}: anonymous"));
                let expected = (pod.cgroup.id, endpoint(address));
                assert_eq!((origin.pod_cgroup_id, origin.orig_dst), expected, "{case}");
                let mut data = [0; 5];
                accepted.set_nonblocking(false).unwrap();
                accepted.read_exact(&mut data).unwrap();
                assert_eq!(&data, b"hello", "{case}");
                assert_eq!(TcpStream::from(socket).peer_addr().unwrap(), address.parse().unwrap(), "{case}");
                assert_eq!(node.live_tickets(), 0, "{case}");
            }
        }
    });
}

#[test]
fn mptcp_connections_arrive_with_their_origin() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        for address in [IMDS, IMDS_V6, IMDS_MAPPED, POD_IDENTITY] {
            let socket = match pod.run(|| socket_for(address, Some(MPTCP))) {
                Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => {
                    // Then pods cannot connect this way either.
                    assert!(!Path::new("/proc/sys/net/mptcp").exists(), "the kernel has MPTCP: {error}");
                    return;
                }
                socket => socket.unwrap(),
            };
            pod.run(|| reconnect(&socket, address)).unwrap();
            arrives(node, &agent, &pod, address, "MPTCP");
        }
    });
}

#[test]
fn io_uring_connections_arrive_with_their_origin() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        let agent = node.agent();
        for (way, poller, flags) in [
            ("inline", false, squeue::Flags::empty()),
            ("by a worker", false, squeue::Flags::ASYNC),
            ("by a poller", true, squeue::Flags::empty()),
        ] {
            for address in [IMDS, IMDS_V6, IMDS_MAPPED, POD_IDENTITY] {
                let result = pod.run(|| {
                    let socket = socket_for(address, None).unwrap();
                    connect_by_ring(&socket, address, poller, flags)
                });
                assert_eq!(result, 0, "{way}, {address}");
                arrives(node, &agent, &pod, address, way);
            }
        }
    });
}

/// `IORING_OP_CONNECT`: what `connect` would have returned.
#[expect(unsafe_code, reason = "the kernel reads the address while the ring works")]
fn connect_by_ring(socket: &OwnedFd, address: &str, poller: bool, flags: squeue::Flags) -> i32 {
    let mut builder = IoUring::builder();
    if poller {
        // A thread of the kernel submits, until it has been idle for so many milliseconds.
        builder.setup_sqpoll(100);
    }
    let ring = builder.build(1);
    let mut ring: IoUring = ring.expect("io_uring is switched off here: sysctl kernel.io_uring_disabled=0");
    let address: SocketAddr = address.parse().unwrap();
    let address: SocketAddrAny = address.as_any();
    let entry =
        opcode::Connect::new(types::Fd(socket.as_raw_fd()), address.as_ptr().cast(), address.addr_len());
    // SAFETY: the socket and the address live until the ring has answered.
    unsafe { ring.submission().push(&entry.build().flags(flags)) }.unwrap();
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().unwrap().result()
}

#[test]
fn a_socket_made_before_the_programs_were_there_is_no_way_round_them() {
    Node::run(|node| {
        let pod = node.pod("a", IMDS_INTERCEPT, POD_IDENTITY_ON);
        node.detach();
        let real = RealService::listen(IMDS);
        let connected = pod.run(tcp_socket);
        pod.run(|| reconnect(&connected, IMDS)).unwrap();
        real.accept();
        rustix::net::connect_unspec(&connected).unwrap();
        let fresh = pod.run(tcp_socket);

        node.attach();
        let agent = node.agent();
        node.interceptor
            .set_policy(pod.cgroup.id, PodPolicy { imds: IMDS_INTERCEPT, pod_identity: POD_IDENTITY_ON })
            .unwrap();
        for (way, socket) in [("fresh", fresh), ("connected before", connected)] {
            pod.run(|| reconnect(&socket, IMDS)).unwrap();
            arrives(node, &agent, &pod, IMDS, way);
        }
        assert!(real.try_accept().is_none());
    });
}

#[test]
fn a_socket_connects_as_the_process_that_has_it_now() {
    Node::run(|node| {
        let [giver, taker] = ["a", "b"].map(|name| node.pod(name, IMDS_INTERCEPT, POD_IDENTITY_ON));
        let agent = node.agent();
        for address in [IMDS, IMDS_V6, IMDS_MAPPED, ECS] {
            let (here, there) =
                socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
            let child = giver.run(|| fork(|| give_socket(&there, address)));
            let socket = take_socket(&here);
            taker.run(|| reconnect(&socket, address)).unwrap();
            let origin = agent.accept().unwrap_or_else(|| panic!("{address}: anonymous"));
            assert_eq!((origin.cgroup_id, origin.pod_cgroup_id), (taker.container.id, taker.cgroup.id));
            assert_eq!((origin.tgid, origin.orig_dst), (process::id(), endpoint(address)));

            // The control: the one that gave it away has been in its own pod all the time, with the same socket.
            let cgroup = fs::read_to_string(format!("/proc/{child}/cgroup")).unwrap();
            let name = giver.cgroup.path.file_name().unwrap().to_str().unwrap();
            assert!(cgroup.contains(name), "{cgroup}");
            rustix::io::write(&here, b"!").unwrap();
            assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
        }
    });
}

/// Makes a socket, gives it to the other side, and waits for the other side to be done. Nothing is allocated: after a
/// fork of one thread out of many, another may have held the allocator forever.
fn give_socket(there: &OwnedFd, address: &str) -> rustix::io::Result<()> {
    let family = if address.starts_with('[') { AddressFamily::INET6 } else { AddressFamily::INET };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let descriptors = [socket.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    message.push(SendAncillaryMessage::ScmRights(&descriptors));
    sendmsg(there, &[IoSlice::new(b"!")], &mut message, SendFlags::empty())?;
    rustix::io::read(there, &mut [0_u8]).map(drop)
}

/// The socket that the other side gives.
fn take_socket(here: &OwnedFd) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    recvmsg(here, &mut [IoSliceMut::new(&mut [0])], &mut message, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut descriptors = message.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptors.next().expect("no socket came")
}

/// Does `work`, and nothing else, in a process of its own.
#[expect(unsafe_code, reason = "what a forked process may do")]
pub(crate) fn fork(work: impl FnOnce() -> rustix::io::Result<()>) -> Pid {
    // SAFETY: the child makes system calls only, and ends without running anything of the parent's.
    match unsafe { unistd::fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let status = i32::from(work().is_err());
            // SAFETY: it has no precondition.
            unsafe { libc::_exit(status) }
        }
    }
}

/// A process of its own that does `work` and then stays until it is killed.
#[expect(unsafe_code, reason = "what a forked process may do")]
pub(crate) fn fork_and_stay(work: impl FnOnce() -> rustix::io::Result<()>) -> Pid {
    fork(|| {
        work()?;
        // SAFETY: nothing of this process uses a descriptor. Those of other tests must not stay open: their locks and
        // addresses would be taken as long as it lives. Linux 5.9.
        unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
        loop {
            // SAFETY: it has no precondition.
            unsafe { libc::pause() };
        }
    })
}
