//! TCP by hand, as a pod with `CAP_NET_RAW` can speak it: handshakes with tickets of one's own choice, and packets that
//! are no TCP.
//!
//! Owns the conversation, and keeps the pod's kernel out of it, which would reset what it knows nothing of.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket},
    num::{NonZeroU16, NonZeroU32},
    os::fd::{AsRawFd as _, OwnedFd},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto,
        netdevice::name_to_index, recv, sendto, socket_with,
    },
};

use super::{
    Knock, Layer,
    segment::{ACK, IP_HEADER_LEN, PUSH, SYN, Seen, Segment},
};

/// `ETH_P_IP`.
const ETH_P_IP: u16 = 0x0800;
/// The initial sequence number of this side.
const SEQUENCE: u32 = 1_000;
/// The first port of handshakes with a ticket each.
const FIRST_PORT: u16 = 20_000;
/// How long a handshake may be unanswered.
const FOR_HANDSHAKE: Duration = Duration::from_millis(300);
/// How long a request may be unanswered.
const FOR_ANSWER: Duration = Duration::from_millis(1_500);

/// Speaks TCP from one address to port 80 of another.
pub(super) struct Forger {
    from: Ipv4Addr,
    to: Ipv4Addr,
    way: Way,
    wire: Sniffer,
}

/// Sees every IPv4 packet of the network.
pub(super) struct Sniffer(OwnedFd);

enum Way {
    Ip(OwnedFd),
    Link(OwnedFd, libc::sockaddr_ll),
}

// === impl Forger ===

impl Forger {
    pub(super) fn new(from: Ipv4Addr, to: Ipv4Addr, layer: Layer) -> io::Result<Self> {
        let way = match layer {
            Layer::Ip => Way::Ip(socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW))?),
            Layer::Link => Way::Link(socket(AddressFamily::PACKET, SocketType::DGRAM, None)?, gateway()?),
        };
        Ok(Self { from, to, way, wire: Sniffer::new()? })
    }

    /// Sends the first segment of a handshake.
    pub(super) fn begin(&self, port: u16, ticket: Option<u64>) -> io::Result<()> {
        self.send(&Segment { flags: SYN, ..self.segment(port, ticket) })
    }

    /// Shakes hands, sends a request and reads the answer.
    fn ask(&self, port: u16, ticket: Option<u64>, request: &str) -> io::Result<String> {
        let _kept_out = keep_kernel_out(port)?;
        self.begin(port, ticket)?;
        let is_mine = |seen: &Seen| seen.from == self.to && seen.to_port == port;
        let theirs = self.wire.next(FOR_HANDSHAKE, |seen| is_mine(seen) && seen.flags & SYN != 0)?;
        let acknowledged = theirs.sequence.wrapping_add(1);
        let next = || Segment { sequence: SEQUENCE + 1, acknowledged, ..self.segment(port, ticket) };
        self.send(&next())?;
        self.send(&Segment { flags: ACK | PUSH, payload: request.as_bytes(), ..next() })?;
        let mut answer = Vec::new();
        let deadline = Instant::now() + FOR_ANSWER;
        while !is_whole(&answer) {
            let expected = acknowledged.wrapping_add(u32::try_from(answer.len()).unwrap_or(u32::MAX));
            let is_next =
                |seen: &Seen| is_mine(seen) && !seen.payload.is_empty() && seen.sequence == expected;
            match self.wire.next(deadline.saturating_duration_since(Instant::now()), is_next) {
                Ok(seen) => answer.extend(seen.payload),
                Err(error) if answer.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    fn segment(&self, port: u16, ticket: Option<u64>) -> Segment<'static> {
        Segment {
            from: (self.from, port),
            to: (self.to, 80),
            sequence: SEQUENCE,
            acknowledged: 0,
            flags: ACK,
            ticket,
            payload: &[],
        }
    }

    fn send(&self, segment: &Segment<'_>) -> io::Result<()> {
        let packet = segment.packet();
        match &self.way {
            Way::Ip(raw) => {
                sendto(raw, &packet, SendFlags::empty(), &SocketAddrV4::new(self.to, 80))?;
                Ok(())
            }
            Way::Link(raw, gateway) => send_below_ip(raw, gateway, &packet),
        }
    }
}

// === impl Sniffer ===

impl Sniffer {
    pub(super) fn new() -> io::Result<Self> {
        let ip = NonZeroU16::new(ETH_P_IP.to_be()).map(NonZeroU32::from).map(Protocol::from_raw);
        Ok(Self(socket(AddressFamily::PACKET, SocketType::DGRAM, ip)?))
    }

    /// The ticket in a handshake of `from`.
    pub(super) fn ticket_from(&self, from: Ipv4Addr, timeout_limit: Duration) -> io::Result<Option<u64>> {
        let has_ticket = |seen: &Seen| seen.from == from && seen.flags & SYN != 0 && seen.ticket.is_some();
        Ok(self.next(timeout_limit, has_ticket)?.ticket)
    }

    fn next(&self, timeout_limit: Duration, is_wanted: impl Fn(&Seen) -> bool) -> io::Result<Seen> {
        let deadline = Instant::now() + timeout_limit;
        let mut packet = vec![0; 70_000];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(timed_out());
            }
            let left = Timespec::try_from(left).map_err(io::Error::other)?;
            poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&left))?;
            while let Ok((length, _)) = recv(&self.0, &mut packet[..], RecvFlags::DONTWAIT) {
                if let Some(seen) = Seen::parse(&packet[..length]).filter(|seen| is_wanted(seen)) {
                    return Ok(seen);
                }
            }
        }
    }
}

/// Asks once with each ticket until one opens the door; the last answer otherwise.
pub(super) fn ask_with_each(forger: &Forger, tickets: &[Option<u64>], request: &str) -> io::Result<String> {
    let mut last = Ok(String::new());
    for (ticket, port) in tickets.iter().zip(FIRST_PORT..) {
        last = forger.ask(port, *ticket, request);
        if last.as_ref().is_ok_and(|answer| answer.contains("AccessKeyId")) {
            break;
        }
    }
    last
}

/// Sends one packet and waits for anything that comes back: an answer, or that nobody listens there.
pub(super) fn knock(to: Ipv4Addr, how: Knock) -> io::Result<String> {
    let icmp = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))?;
    match how {
        Knock::Datagram => {
            UdpSocket::bind("0.0.0.0:0")?.send_to(b"?", (to, 80))?;
        }
        Knock::Ping => {
            // An echo request without data; its checksum is the complement of type, identifier and sequence.
            let request = [8, 0, !8, !2, 0, 1, 0, 1];
            sendto(&icmp, &request, SendFlags::empty(), &SocketAddrV4::new(to, 0))?;
        }
    }
    let deadline = Instant::now() + FOR_HANDSHAKE;
    let mut packet = [0; 1024];
    while Instant::now() < deadline {
        match recv(&icmp, &mut packet[..], RecvFlags::DONTWAIT) {
            Ok((length, _)) if length >= IP_HEADER_LEN && packet[12..16] == to.octets() => {
                return Ok(format!("an answer from {to}"));
            }
            _ => thread::sleep(Duration::from_millis(5)),
        }
    }
    Err(timed_out())
}

fn timed_out() -> io::Error {
    io::Error::from_raw_os_error(libc::ETIMEDOUT)
}

fn socket(family: AddressFamily, kind: SocketType, protocol: Option<Protocol>) -> io::Result<OwnedFd> {
    Ok(socket_with(family, kind, SocketFlags::CLOEXEC, protocol)?)
}

/// A listener that nothing reaches, as long as it is: it takes segments of the highest hop limit only, and the kernel drops
/// others to its port without a word.
#[expect(unsafe_code, reason = "neither rustix nor nix has this option")]
fn keep_kernel_out(port: u16) -> io::Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    let highest: libc::c_int = 255;
    // SAFETY: the option takes an int; the pointer and the length are those of one that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            listener.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_MINTTL,
            (&raw const highest).cast(),
            size_of_val(&highest).try_into().unwrap_or(0),
        )
    };
    if result == 0 { Ok(listener) } else { Err(io::Error::last_os_error()) }
}

/// The pod's one neighbor.
fn gateway() -> io::Result<libc::sockaddr_ll> {
    let table = fs::read_to_string("/proc/thread-self/net/arp")?;
    let line = table.lines().nth(1).unwrap_or_default();
    let mut mac = [0; 8];
    for (byte, text) in mac.iter_mut().zip(line.split_whitespace().nth(3).unwrap_or_default().split(':')) {
        *byte = u8::from_str_radix(text, 16).map_err(io::Error::other)?;
    }
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    Ok(libc::sockaddr_ll {
        sll_family: libc::AF_PACKET.try_into().unwrap_or_default(),
        sll_protocol: ETH_P_IP.to_be(),
        sll_ifindex: name_to_index(any, "eth0")?.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: mac,
    })
}

#[expect(unsafe_code, reason = "neither rustix nor nix makes a sockaddr_ll")]
fn send_below_ip(raw: &OwnedFd, gateway: &libc::sockaddr_ll, packet: &[u8]) -> io::Result<()> {
    // SAFETY: both pointers are to as much as is said, for as long as the call takes.
    let sent = unsafe {
        libc::sendto(
            raw.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const *gateway).cast(),
            size_of_val(gateway).try_into().unwrap_or(0),
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether an HTTP answer has come to its end.
fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length =
        |line: &str| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse::<usize>().ok();
    head.lines().find_map(length).is_none_or(|length| body.len() >= length)
}
