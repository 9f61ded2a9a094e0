//! TCP segments in IPv4 packets, made and read by hand.
//!
//! Owns their layout; never sends one.

use std::net::Ipv4Addr;

use agent_common::abi::{TICKET_OPTION_EXID, TICKET_OPTION_KIND, TICKET_OPTION_LEN};

pub(super) const SYN: u8 = 0x02;
pub(super) const PUSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;
pub(super) const IP_HEADER_LEN: usize = 20;
const TCP_HEADER_LEN: usize = 20;
/// Of TCP, in an IP header.
const PROTOCOL: u8 = 6;

/// A segment to make.
pub(super) struct Segment<'a> {
    pub(super) from: (Ipv4Addr, u16),
    pub(super) to: (Ipv4Addr, u16),
    pub(super) sequence: u32,
    pub(super) acknowledged: u32,
    pub(super) flags: u8,
    pub(super) ticket: Option<u64>,
    pub(super) payload: &'a [u8],
}

/// A segment that was seen.
pub(super) struct Seen {
    pub(super) from: Ipv4Addr,
    pub(super) to_port: u16,
    pub(super) sequence: u32,
    pub(super) flags: u8,
    pub(super) ticket: Option<u64>,
    pub(super) payload: Vec<u8>,
}

// === impl Segment ===

impl Segment<'_> {
    /// The whole packet.
    pub(super) fn packet(&self) -> Vec<u8> {
        let tcp = self.tcp();
        let mut header = vec![0x45, 0];
        header.extend(length(IP_HEADER_LEN + tcp.len()));
        header.extend([0, 0, 0, 0, 64, PROTOCOL, 0, 0]);
        header.extend(self.from.0.octets());
        header.extend(self.to.0.octets());
        let sum = checksum(&header).to_be_bytes();
        header[10..12].copy_from_slice(&sum);
        [header, tcp].concat()
    }

    fn tcp(&self) -> Vec<u8> {
        let options = self.ticket.map(option).unwrap_or_default();
        let words = u8::try_from((TCP_HEADER_LEN + options.len()) / 4).unwrap_or_default();
        let mut tcp = Vec::new();
        tcp.extend(self.from.1.to_be_bytes());
        tcp.extend(self.to.1.to_be_bytes());
        tcp.extend(self.sequence.to_be_bytes());
        tcp.extend(self.acknowledged.to_be_bytes());
        tcp.extend([words << 4, self.flags]);
        tcp.extend(u16::MAX.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(options);
        tcp.extend(self.payload);
        let pseudo =
            [&self.from.0.octets()[..], &self.to.0.octets(), &[0, PROTOCOL], &length(tcp.len()), &tcp];
        let sum = checksum(&pseudo.concat()).to_be_bytes();
        tcp[16..18].copy_from_slice(&sum);
        tcp
    }
}

// === impl Seen ===

impl Seen {
    /// The segment in an IPv4 packet, if it is one.
    pub(super) fn parse(packet: &[u8]) -> Option<Self> {
        let header = usize::from(packet.first()? & 0xf) * 4;
        if packet.get(9) != Some(&PROTOCOL) {
            return None;
        }
        let end = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
        let tcp = packet.get(header..end)?;
        let options_end = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            from: Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?),
            to_port: u16::from_be_bytes(tcp.get(2..4)?.try_into().ok()?),
            sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
            flags: *tcp.get(13)?,
            ticket: ticket_in(tcp.get(TCP_HEADER_LEN..options_end)?),
            payload: tcp.get(options_end..)?.to_vec(),
        })
    }
}

/// The option that carries a ticket.
fn option(ticket: u64) -> Vec<u8> {
    let [x, y] = TICKET_OPTION_EXID;
    [&[TICKET_OPTION_KIND, TICKET_OPTION_LEN, x, y], &ticket.to_be_bytes()[..]].concat()
}

fn ticket_in(options: &[u8]) -> Option<u64> {
    let [x, y] = TICKET_OPTION_EXID;
    let head = [TICKET_OPTION_KIND, TICKET_OPTION_LEN, x, y];
    let at = options.windows(head.len()).position(|window| window == head)? + head.len();
    Some(u64::from_be_bytes(options.get(at..at + 8)?.try_into().ok()?))
}

/// As both headers have it.
fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).unwrap_or_default().to_be_bytes()
}

fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or_default());
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_is_read_as_it_was_made_and_its_sums_are_right() {
        let (from, to) = (Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2));
        let ticket = Some(0x0123_4567_89ab_cdef);
        let segment = Segment {
            from: (from, 7),
            to: (to, 80),
            sequence: 8,
            acknowledged: 9,
            flags: SYN,
            ticket,
            payload: b"odd",
        };
        let packet = segment.packet();
        let seen = Seen::parse(&packet).unwrap();
        assert_eq!((seen.from, seen.to_port, seen.sequence, seen.flags), (from, 80, 8, SYN));
        assert_eq!((seen.ticket, &seen.payload[..]), (ticket, &b"odd"[..]));
        let (header, tcp) = packet.split_at(IP_HEADER_LEN);
        assert_eq!(checksum(header), 0);
        let pseudo = [&from.octets()[..], &to.octets(), &[0, PROTOCOL], &length(tcp.len()), tcp].concat();
        assert_eq!(checksum(&pseudo), 0);
    }
}
