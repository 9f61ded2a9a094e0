//! A node's network as packets see it: pods behind veths, and IMDS beyond the uplink. And what pods send there.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    thread,
    time::{Duration, Instant},
};

use agent_common::{
    net::{IMDS_V4, IMDS_V6},
    policy::POD_IDENTITY_ON,
};
use futures::TryStreamExt as _;
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::Pid,
};
use rtnetlink::{
    Handle, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{address::AddressHeaderFlags, route::RouteMessage},
};

use crate::{
    kernel_node::{Node, Pod, in_network, netlink, new_network, outside},
    socket_kinds::fork_and_stay,
};

/// What tells a datagram of a test from all others.
pub(super) type Mark = [u8; 8];

pub(super) const UPLINK: &str = "uplink";
/// The hardware address of the uplink's other end.
pub(super) const BEYOND: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub(super) const POD_UIDS: [&str; 3] = [
    "0c5cb3f2_7a47_4a4b_8f0c_5b0f6a3d2e11",
    "1c5cb3f2_7a47_4a4b_8f0c_5b0f6a3d2e11",
    "2c5cb3f2_7a47_4a4b_8f0c_5b0f6a3d2e11",
];

/// The instance metadata service, behind the node's uplink.
pub(super) struct Imds {
    pub(super) network: File,
    datagrams: [UdpSocket; 2],
}

/// A pod with a network of its own, and a process in it as long as it lives.
pub(super) struct NetworkPod {
    pub(super) pod: Pod,
    pub(super) network: File,
    sandbox: Option<Pid>,
    /// The node's end of its veth.
    pub(super) netdev: u32,
    /// That end's hardware address.
    pub(super) gateway: [u8; 6],
    pub(super) eth0: u32,
}

// === impl Imds ===

impl Imds {
    /// In place of the one on the node's `lo`.
    pub(super) fn beyond_an_uplink() -> Self {
        let network = new_network();
        netlink(async |handle| {
            for ip in [IpAddr::from(IMDS_V4), IMDS_V6.into()] {
                remove_address(&handle, ip).await?;
            }
            let uplink = add_veth(&handle, UPLINK, [2, 0, 0, 0, 0, 1], &network).await?;
            add_address(&handle, uplink, "192.168.7.2", 24).await?;
            add_address(&handle, uplink, "fd77::2", 64).await?;
            for route in
                [route_v4("169.254.169.254", 32, "192.168.7.1"), route_v6("fd00:ec2::254", 128, "fd77::1")]
            {
                handle.route().add(route).execute().await?;
            }
            Ok(())
        });
        for switch in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            fs::write(format!("/proc/sys/net/{switch}"), "1").unwrap();
        }
        let datagrams = in_network(&network, || {
            netlink(async |handle| {
                up(&handle, 1).await?;
                let eth0 = index(&handle, "eth0").await?;
                let address = LinkUnspec::new_with_index(eth0).address(BEYOND.to_vec());
                handle.link().set(address.build()).execute().await?;
                up(&handle, eth0).await?;
                add_address(&handle, eth0, "192.168.7.1", 24).await?;
                add_address(&handle, eth0, "fd77::1", 64).await?;
                add_address(&handle, 1, "169.254.169.254", 32).await?;
                add_address(&handle, 1, "fd00:ec2::254", 128).await?;
                handle.route().add(route_v4("10.70.0.0", 16, "192.168.7.2")).execute().await?;
                handle.route().add(route_v6("fd70::", 32, "fd77::2")).execute().await
            });
            [IpAddr::from(IMDS_V4), IMDS_V6.into()].map(|ip| {
                let listener = outside(|| TcpListener::bind((ip, 80)).unwrap());
                thread::spawn(move || {
                    for stream in listener.incoming() {
                        let _ = stream.and_then(|mut stream| stream.write_all(b"node-role"));
                    }
                });
                let socket = outside(|| UdpSocket::bind((ip, 53)).unwrap());
                socket.set_nonblocking(true).unwrap();
                socket
            })
        });
        Self { network, datagrams }
    }

    /// How many datagrams have arrived that nobody has looked for.
    pub(super) fn arrived(&self) -> usize {
        let waiting = |socket: &UdpSocket| std::iter::from_fn(|| socket.recv(&mut [0; 64]).ok()).count();
        self.datagrams.iter().map(waiting).sum()
    }

    /// Whether a datagram with a mark arrives that `send` sends.
    pub(super) fn gets(&self, patience: Duration, send: impl FnOnce(Mark)) -> bool {
        static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0x5aa5_0001_3cc3_0000);
        let mark = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed).to_be_bytes();
        send(mark);
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            let mut received = [0; 64];
            for socket in &self.datagrams {
                while let Ok(length) = socket.recv(&mut received) {
                    if received[..length] == mark {
                        return true;
                    }
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

// === impl NetworkPod ===

impl NetworkPod {
    pub(super) fn create(node: &mut Node, number: u8, imds: u32) -> Self {
        let pod = node.pod(POD_UIDS[usize::from(number)], imds, POD_IDENTITY_ON);
        let mut created = Self::behind_a_veth(pod, number);
        created.start();
        created
    }

    /// Without a process yet.
    pub(super) fn behind_a_veth(pod: Pod, number: u8) -> Self {
        let network = new_network();
        let gateway = [2, 0, 0, 1, 0, number];
        let netdev = netlink(async |handle| {
            let netdev = add_veth(&handle, &name(number), gateway, &network).await?;
            for (ip, prefix) in gateways(number) {
                add_address(&handle, netdev, &ip, prefix).await?;
            }
            Ok(netdev)
        });
        let eth0 = in_network(&network, || {
            netlink(async |handle| {
                up(&handle, 1).await?;
                let eth0 = index(&handle, "eth0").await?;
                up(&handle, eth0).await?;
                add_address(&handle, eth0, &format!("10.70.{number}.2"), 24).await?;
                add_address(&handle, eth0, &format!("fd70:0:0:{number}::2"), 64).await?;
                handle.route().add(route_v4("0.0.0.0", 0, &format!("10.70.{number}.1"))).execute().await?;
                handle.route().add(route_v6("::", 0, &format!("fd70:0:0:{number}::1"))).execute().await?;
                Ok(eth0)
            })
        });
        Self { pod, network, sandbox: None, netdev, gateway, eth0 }
    }

    /// The node's end of its veth.
    pub(super) fn name(&self) -> String {
        name(self.gateway[5])
    }

    /// The node's addresses at that end.
    pub(super) fn gateways(&self) -> [(String, u8); 2] {
        gateways(self.gateway[5])
    }

    /// Its first process, as a sandbox has one.
    pub(super) fn start(&mut self) {
        self.sandbox = Some(self.run(|| fork_and_stay(|| Ok(()))));
    }

    pub(super) fn stop(&mut self) {
        if let Some(sandbox) = self.sandbox.take() {
            kill(sandbox, Signal::SIGKILL).unwrap();
            waitpid(sandbox, None).unwrap();
        }
    }

    /// Runs `work` in the pod and in its network.
    pub(super) fn run<T>(&self, work: impl FnOnce() -> T) -> T {
        self.pod.run(|| in_network(&self.network, work))
    }
}

impl Drop for NetworkPod {
    fn drop(&mut self) {
        self.stop();
    }
}

fn name(number: u8) -> String {
    format!("veth{number}")
}

fn gateways(number: u8) -> [(String, u8); 2] {
    [(format!("10.70.{number}.1"), 24), (format!("fd70:0:0:{number}::1"), 64)]
}

/// Whether IMDS answers there.
pub(super) fn is_answered(address: &str, patience: Duration) -> bool {
    let ask = || -> io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address.parse().unwrap(), patience)?;
        stream.set_read_timeout(Some(patience))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer == "node-role")
}

pub(super) fn datagram(to: IpAddr, mark: Mark) {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    // Whether it is refused at once or later makes no difference here.
    let _ = socket.send_to(&mark, (to, 53));
}

/// A datagram to IMDS with its IP header, from a pod's own address. It needs no checksum of UDP's.
pub(super) fn packet(pod: &NetworkPod, mark: Mark) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 36, 0, 1, 0, 0, 64, 17, 0, 0, 10, 70, pod.gateway[5], 2];
    header.extend(IMDS_V4.octets());
    let sum: u32 = header.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    header[10..12].copy_from_slice(&(!folded).to_be_bytes());
    [&header[..], &[0x9c, 0x40, 0, 53, 0, 16, 0, 0], &mark].concat()
}

pub(super) async fn up(handle: &Handle, netdev: u32) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(netdev).up().build()).execute().await
}

pub(super) async fn index(handle: &Handle, name: &str) -> Result<u32, rtnetlink::Error> {
    let found = handle.link().get().match_name(name.to_owned()).execute().try_next().await?;
    Ok(found.unwrap().header.index)
}

/// A veth whose other end is `eth0` of another network.
pub(super) async fn add_veth(
    handle: &Handle,
    name: &str,
    address: [u8; 6],
    other: &File,
) -> Result<u32, rtnetlink::Error> {
    let pair = LinkVeth::new(name, "eth0").address(address.to_vec()).build();
    handle.link().add(pair).execute().await?;
    let end = LinkUnspec::new_with_name("eth0").setns_by_fd(other.as_fd().as_raw_fd()).build();
    handle.link().set(end).execute().await?;
    let netdev = index(handle, name).await?;
    up(handle, netdev).await?;
    Ok(netdev)
}

pub(super) async fn add_address(
    handle: &Handle,
    netdev: u32,
    ip: &str,
    prefix: u8,
) -> Result<(), rtnetlink::Error> {
    let mut request = handle.address().add(netdev, ip.parse().unwrap(), prefix);
    request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    request.execute().await
}

pub(super) async fn remove_address(handle: &Handle, ip: IpAddr) -> Result<(), rtnetlink::Error> {
    let mut found = handle.address().get().set_address_filter(ip).execute();
    while let Some(address) = found.try_next().await? {
        handle.address().del(address).execute().await?;
    }
    Ok(())
}

pub(super) fn route_v4(to: &str, prefix: u8, by: &str) -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to.parse().unwrap(), prefix);
    route.gateway(by.parse().unwrap()).build()
}

pub(super) fn route_v6(to: &str, prefix: u8, by: &str) -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to.parse().unwrap(), prefix);
    route.gateway(by.parse().unwrap()).build()
}
