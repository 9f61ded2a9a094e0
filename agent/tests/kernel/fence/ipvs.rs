//! The kernel's load balancer, as kube-proxy has it in its mode of that name.
//!
//! Owns its configuration, which is generic netlink: `include/uapi/linux/ip_vs.h`.

use std::{fs, io, net::IpAddr};

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

/// The family that knows all others, and its command to find one by name.
const CONTROL: u16 = 16;
const GET_FAMILY: u8 = 3;
const NEW_SERVICE: u8 = 1;
const NEW_DEST: u8 = 5;
/// `NLM_F_REQUEST`, `NLM_F_ACK`, `NLMSG_ERROR`, `NLA_F_NESTED`.
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const ERROR: u16 = 2;
const NESTED: u16 = 0x8000;
/// Of netlink and of generic netlink.
const HEADERS: usize = 20;

/// What the kernel calls it in generic netlink.
pub(super) struct Ipvs {
    family: u16,
}

// === impl Ipvs ===

impl Ipvs {
    pub(super) fn find() -> io::Result<Self> {
        let answer = ask(CONTROL, 0, GET_FAMILY, &attribute(2, b"IPVS\0"))?;
        let mut rest = &answer[HEADERS..];
        while let [a, b, c, d, ..] = *rest {
            let (length, kind) = (u16::from_ne_bytes([a, b]), u16::from_ne_bytes([c, d]));
            if kind == 1 {
                return Ok(Self { family: u16::from_ne_bytes([rest[4], rest[5]]) });
            }
            rest = &rest[usize::from(length).next_multiple_of(4)..];
        }
        panic!("a family without an id: {answer:?}");
    }

    /// Sends TCP connections to a service on to `real`, under another's address.
    pub(super) fn balance(&self, service: IpAddr, real: IpAddr, port: u16) -> io::Result<()> {
        let (family, netmask) = match service {
            IpAddr::V4(_) => (libc::AF_INET, u32::MAX),
            IpAddr::V6(_) => (libc::AF_INET6, 128),
        };
        let family = u16::try_from(family).unwrap().to_ne_bytes();
        let key = [
            attribute(1, &family),
            attribute(2, &6_u16.to_ne_bytes()),
            attribute(3, &address(service)),
            attribute(4, &port.to_be_bytes()),
        ]
        .concat();
        let scheduler = [attribute(6, b"rr\0"), attribute(7, &[0; 8]), attribute(8, &[0; 4])].concat();
        let whole = [&key[..], &scheduler, &attribute(9, &netmask.to_ne_bytes())].concat();
        ask(self.family, ACK, NEW_SERVICE, &attribute(1 | NESTED, &whole))?;

        let numbers = [(3, 0_u32), (4, 1), (5, 0), (6, 0)];
        let method_weight_limits =
            numbers.map(|(kind, value)| attribute(kind, &value.to_ne_bytes())).concat();
        let destination = [
            attribute(1, &address(real)),
            attribute(2, &port.to_be_bytes()),
            method_weight_limits,
            attribute(11, &family),
        ]
        .concat();
        let both = [attribute(1 | NESTED, &key), attribute(2 | NESTED, &destination)].concat();
        ask(self.family, ACK, NEW_DEST, &both).map(drop)
    }
}

/// Without it, nothing is masqueraded.
pub(super) fn track_connections() {
    fs::write("/proc/sys/net/ipv4/vs/conntrack", "1").unwrap();
}

/// `union nf_inet_addr`.
fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => {
            let mut padded = [0; 16];
            padded[..4].copy_from_slice(&ip.octets());
            padded
        }
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + value.len()).unwrap();
    let mut attribute = [&length.to_ne_bytes(), &kind.to_ne_bytes(), value].concat();
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// Asks the kernel in the network that the thread is in; the whole answer.
fn ask(family: u16, flags: u16, command: u8, attributes: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(HEADERS + attributes.len()).unwrap();
    let message = [
        &length.to_ne_bytes()[..],
        &family.to_ne_bytes(),
        &(REQUEST | flags).to_ne_bytes(),
        // Its number and its sender, the command, and version 1 of the family.
        &[0, 0, 0, 0, 0, 0, 0, 0, command, 1, 0, 0],
        attributes,
    ]
    .concat();
    let socket = Socket::new(NETLINK_GENERIC)?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&message, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    if u16::from_ne_bytes([answer[4], answer[5]]) == ERROR {
        let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
        if code != 0 {
            return Err(io::Error::from_raw_os_error(-code));
        }
    }
    Ok(answer)
}
