//! Segments on the wire: watched, and made by hand as a pod with `CAP_NET_RAW` can make them.
//!
//! Owns the segments' layout; never completes more than a handshake.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    num::{NonZeroU16, NonZeroU32},
    os::fd::OwnedFd,
};

use agent_common::abi::{TICKET_OPTION_EXID, TICKET_OPTION_KIND, TICKET_OPTION_LEN};
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto,
    socket_with,
};

use crate::kernel_node::{AGENT_V4, NOBODY, outside};

/// The flag of the first segment of either side.
pub(crate) const SYN: u8 = 0x02;
/// The flag of every segment but the first.
pub(crate) const ACK: u8 = 0x10;
const IP_HEADER_LEN: usize = 20;
const TCP_HEADER_LEN: usize = 20;
/// The initial sequence number of the forged side.
const SEQUENCE: u32 = 1_000;

/// Every IPv4 packet of the namespace from now on.
pub(crate) struct Wire(OwnedFd);

/// Sends the agent at [`AGENT_V4`], port 80, segments in the name of [`NOBODY`].
pub(crate) struct Forger(OwnedFd);

// === impl Wire ===

impl Wire {
    pub(crate) fn watch() -> Self {
        let ip = NonZeroU32::from(NonZeroU16::new(0x0800_u16.to_be()).unwrap());
        let ip = Some(Protocol::from_raw(ip));
        Self(socket_with(AddressFamily::PACKET, SocketType::DGRAM, SocketFlags::CLOEXEC, ip).unwrap())
    }

    /// Of each segment that has left `port` since the last call: whether there is a ticket in it.
    pub(crate) fn tickets_from(&self, port: u16) -> Vec<bool> {
        let mut packet = [0; 2048];
        let mut found = Vec::new();
        while let Ok((length, _)) = recv(&self.0, &mut packet[..], RecvFlags::DONTWAIT) {
            let tcp = &packet[IP_HEADER_LEN..length];
            if tcp[0..2] == port.to_be_bytes() {
                let options = &tcp[TCP_HEADER_LEN..usize::from(tcp[12] >> 4) * 4];
                let [x, y] = TICKET_OPTION_EXID;
                let head = [TICKET_OPTION_KIND, TICKET_OPTION_LEN, x, y];
                found.push(options.windows(head.len()).any(|window| window == head));
            }
        }
        found
    }

    /// The sequence number of the SYN and ACK that the agent sends to `port`.
    fn answer_to(&self, port: u16) -> u32 {
        let mut packet = [0; 256];
        loop {
            let (length, _) = recv(&self.0, &mut packet[..], RecvFlags::empty()).unwrap();
            let Some(tcp) = packet[..length].get(IP_HEADER_LEN..) else { continue };
            let is_answer = packet[12..16] == AGENT_V4.octets()
                && tcp.get(2..4) == Some(&port.to_be_bytes())
                && tcp.get(13) == Some(&(SYN | ACK));
            if is_answer {
                return u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
            }
        }
    }
}

// === impl Forger ===

impl Forger {
    /// In the network in which the caller is, but in no pod: the egress filter would stop a pod.
    pub(crate) fn new() -> Self {
        let flags = SocketFlags::CLOEXEC;
        let raw = outside(|| socket_with(AddressFamily::INET, SocketType::RAW, flags, Some(ipproto::RAW)));
        Self(raw.unwrap())
    }

    /// Shakes hands with the agent, with `ticket`, if any, in both segments.
    pub(crate) fn shake_hands(&self, port: u16, ticket: Option<u64>) {
        let wire = Wire::watch();
        self.begin_handshake(port, ticket);
        let theirs = wire.answer_to(port);
        self.send(&segment(port, SEQUENCE + 1, theirs + 1, ACK, &option(ticket)));
    }

    /// Sends the first segment of such a handshake.
    pub(crate) fn begin_handshake(&self, port: u16, ticket: Option<u64>) {
        self.send(&segment(port, SEQUENCE, 0, SYN, &option(ticket)));
    }

    fn send(&self, packet: &[u8]) {
        sendto(&self.0, packet, SendFlags::empty(), &SocketAddrV4::new(AGENT_V4, 80)).unwrap();
    }
}

/// A whole handshake by a forger of its own.
pub(crate) fn shake_hands(port: u16, ticket: u64) {
    Forger::new().shake_hands(port, Some(ticket));
}

/// The option that carries a ticket, or none.
fn option(ticket: Option<u64>) -> Vec<u8> {
    let Some(ticket) = ticket else { return Vec::new() };
    let mut option = vec![TICKET_OPTION_KIND, TICKET_OPTION_LEN];
    option.extend(TICKET_OPTION_EXID);
    option.extend(ticket.to_be_bytes());
    option
}

/// An IPv4 packet from [`NOBODY`] with one segment in it; the kernel completes the IP header.
fn segment(port: u16, sequence: u32, acknowledged: u32, flags: u8, options: &[u8]) -> Vec<u8> {
    let header_len = TCP_HEADER_LEN + options.len();
    let mut tcp = Vec::with_capacity(header_len);
    tcp.extend(port.to_be_bytes());
    tcp.extend(80_u16.to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(acknowledged.to_be_bytes());
    let words: u8 = (header_len / 4).try_into().unwrap();
    tcp.extend([words << 4, flags]);
    tcp.extend(u16::MAX.to_be_bytes());
    tcp.extend([0; 4]);
    tcp.extend(options);
    let sum = checksum(NOBODY, AGENT_V4, &tcp);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());

    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0];
    packet.extend(NOBODY.octets());
    packet.extend(AGENT_V4.octets());
    packet.extend(tcp);
    packet
}

/// The TCP checksum over IPv4.
fn checksum(from: Ipv4Addr, to: Ipv4Addr, tcp: &[u8]) -> u16 {
    let length: u16 = tcp.len().try_into().unwrap();
    let pseudo = [&from.octets()[..], &to.octets(), &[0, 6], &length.to_be_bytes(), tcp].concat();
    let sum: u32 = pseudo.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
}
