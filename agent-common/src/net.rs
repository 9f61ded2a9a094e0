//! Addresses as the kernel's socket hooks see them, and the link-local endpoints podgate is about.

use core::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// EKS Pod Identity over IPv4.
pub const POD_IDENTITY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 170, 23);
/// EKS Pod Identity over IPv6.
pub const POD_IDENTITY_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23);
/// The EC2 instance metadata service over IPv4.
pub const IMDS_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// The EC2 instance metadata service over IPv6.
pub const IMDS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// The ECS credential endpoint, which every SDK since 2016 accepts.
pub const ECS_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 170, 2);
/// The port of all of them.
pub const HTTP_PORT: u16 = 80;

/// A port in network byte order, as `bpf_sock_addr.user_port` holds it.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct NetPort(u16);

/// Address and port of one side of a connection. IPv4 is kept in its v4-mapped form, so that a dual-stack
/// socket's connect and an IPv4 socket's compare equal.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    /// The address's four words in network byte order, as `bpf_sock_addr.user_ip6`.
    pub addr: [u32; 4],
    /// The port.
    pub port: NetPort,
    /// Always 0.
    pub(crate) _pad: u16,
}

/// What an endpoint is to podgate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// 169.254.170.23 and `fd00:ec2::23`.
    PodIdentity,
    /// 169.254.169.254 and `fd00:ec2::254`.
    Imds,
    /// 169.254.170.2.
    Ecs,
}

/// The third word of a v4-mapped address, in network byte order.
const MAPPED: u32 = 0xffff_u32.to_be();
/// 127.0.0.1, in network byte order.
const LOOPBACK4: u32 = u32::from_ne_bytes(Ipv4Addr::LOCALHOST.octets());
/// The last word of `::1`, in network byte order.
const LOOPBACK6: u32 = 1_u32.to_be();

// === impl NetPort ===

impl NetPort {
    /// From a port in host byte order.
    #[inline(always)]
    pub const fn new(port: u16) -> Self {
        Self(port.to_be())
    }

    /// From a port that is in network byte order already.
    #[inline(always)]
    pub const fn from_be(port: u16) -> Self {
        Self(port)
    }

    /// The port in network byte order.
    #[inline(always)]
    pub const fn to_be(self) -> u16 {
        self.0
    }

    /// The port in host byte order.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

impl fmt::Debug for NetPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

// === impl Service ===

impl Service {
    /// The service whose address this is, as in a URL: IPv6 in brackets.
    pub fn named(host: &str) -> Option<Self> {
        let address = host.trim_matches(['[', ']']).parse().ok()?;
        Endpoint::new(address, HTTP_PORT).service()
    }
}

// === impl Endpoint ===

impl Endpoint {
    /// No endpoint: the unspecified address and port 0.
    pub const NONE: Self = Self { addr: [0; 4], port: NetPort::new(0), _pad: 0 };

    /// An IPv4 endpoint; `ip` is in network byte order, as `bpf_sock_addr.user_ip4`.
    #[inline(always)]
    pub const fn from_ip4_be(ip: u32, port: NetPort) -> Self {
        Self { addr: [0, 0, MAPPED, ip], port, _pad: 0 }
    }

    /// An IPv6 endpoint; the words are in network byte order, as `bpf_sock_addr.user_ip6`.
    #[inline(always)]
    pub const fn from_ip6_be(addr: [u32; 4], port: NetPort) -> Self {
        Self { addr, port, _pad: 0 }
    }

    /// An endpoint of either family.
    pub const fn new(ip: IpAddr, port: u16) -> Self {
        match ip {
            IpAddr::V4(ip) => Self::from_ip4_be(u32::from_ne_bytes(ip.octets()), NetPort::new(port)),
            IpAddr::V6(ip) => Self::from_ip6_be(words(ip), NetPort::new(port)),
        }
    }

    /// 127.0.0.1 or `::1`, at this port.
    #[inline(always)]
    pub const fn loopback(is_ip4: bool, port: NetPort) -> Self {
        let addr = if is_ip4 { [0, 0, MAPPED, LOOPBACK4] } else { [0, 0, 0, LOOPBACK6] };
        Self { addr, port, _pad: 0 }
    }

    /// Whether the address is 127.0.0.1 or `::1`; the rest of 127.0.0.0/8 does not count.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        self.addr[0] == 0
            && self.addr[1] == 0
            && (self.addr[2] == MAPPED && self.addr[3] == LOOPBACK4
                || self.addr[2] == 0 && self.addr[3] == LOOPBACK6)
    }

    /// Whether the address is IPv4, plain or v4-mapped.
    #[inline(always)]
    pub const fn is_ip4(&self) -> bool {
        self.addr[0] == 0 && self.addr[1] == 0 && self.addr[2] == MAPPED
    }

    /// Whether this is [`Endpoint::NONE`].
    #[inline(always)]
    pub const fn is_none(&self) -> bool {
        self.port.to_be() == 0
    }

    /// The service at this *address*, whatever the port.
    #[inline(always)]
    pub fn service(&self) -> Option<Service> {
        const IMDS4: u32 = u32::from_ne_bytes(IMDS_V4.octets());
        const POD_IDENTITY4: u32 = u32::from_ne_bytes(POD_IDENTITY_V4.octets());
        const ECS4: u32 = u32::from_ne_bytes(ECS_V4.octets());
        const IMDS6: [u32; 4] = words(IMDS_V6);
        const POD_IDENTITY6: [u32; 4] = words(POD_IDENTITY_V6);
        if self.is_ip4() {
            return match self.addr[3] {
                IMDS4 => Some(Service::Imds),
                POD_IDENTITY4 => Some(Service::PodIdentity),
                ECS4 => Some(Service::Ecs),
                _ => None,
            };
        }
        // Word by word: comparing whole arrays becomes a call to memcmp, which the kernel has not.
        if self.addr[0] != IMDS6[0] || self.addr[1] != 0 || self.addr[2] != 0 {
            return None;
        }
        if self.addr[3] == IMDS6[3] {
            Some(Service::Imds)
        } else if self.addr[3] == POD_IDENTITY6[3] {
            Some(Service::PodIdentity)
        } else {
            None
        }
    }

    /// Whether both are the same address, whatever the ports.
    #[inline(always)]
    pub const fn same_address(&self, other: &Self) -> bool {
        self.addr[0] == other.addr[0]
            && self.addr[1] == other.addr[1]
            && self.addr[2] == other.addr[2]
            && self.addr[3] == other.addr[3]
    }

    /// Whether both are the same address and port.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        self.same_address(other) && self.port.to_be() == other.port.to_be()
    }

    /// The address; a v4-mapped one as IPv4.
    pub fn ip(&self) -> IpAddr {
        Ipv6Addr::from(self.octets()).to_canonical()
    }

    /// The address's bytes; an IPv4 address is v4-mapped.
    #[inline(always)]
    pub fn octets(&self) -> [u8; 16] {
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(self.addr) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        octets
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::new(self.ip(), self.port.get()).fmt(f)
    }
}

// SAFETY: `repr(C)`, no padding (asserted in `abi`), every bit pattern is valid.
#[cfg(feature = "user")]
#[expect(unsafe_code, reason = "aya writes the address to a map as bytes")]
unsafe impl aya::Pod for Endpoint {}

/// The address's words in network byte order.
const fn words(ip: Ipv6Addr) -> [u32; 4] {
    let o = ip.octets();
    [
        u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
        u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
        u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
        u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
    ]
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::format;

    use super::*;

    #[test]
    fn every_service_is_known_by_its_addresses() {
        let service = |ip: &str| Endpoint::new(ip.parse().unwrap(), 80).service();
        assert_eq!(service("169.254.169.254"), Some(Service::Imds));
        assert_eq!(service("::ffff:169.254.169.254"), Some(Service::Imds));
        assert_eq!(service("fd00:ec2::254"), Some(Service::Imds));
        assert_eq!(service("169.254.170.23"), Some(Service::PodIdentity));
        assert_eq!(service("fd00:ec2::23"), Some(Service::PodIdentity));
        assert_eq!(service("169.254.170.2"), Some(Service::Ecs));
        for other in ["169.254.169.253", "fd00:ec2::253", "fd00:ec2:0:1::254", "fd00:ec2::1:0:254", "::"] {
            assert_eq!(service(other), None, "{other}");
        }
    }

    #[test]
    fn the_loopback_is_one_address_of_each_family() {
        let is_loopback = |ip: &str| Endpoint::new(ip.parse().unwrap(), 61_000).is_loopback();
        for ip in ["127.0.0.1", "::ffff:127.0.0.1", "::1"] {
            assert!(is_loopback(ip), "{ip}");
        }
        for ip in ["127.0.0.2", "::", "::2", "::127.0.0.1", "0.0.0.0", "169.254.169.254"] {
            assert!(!is_loopback(ip), "{ip}");
        }
        let port = NetPort::new(61_000);
        assert_eq!(Endpoint::loopback(true, port), Endpoint::new("127.0.0.1".parse().unwrap(), 61_000));
        assert_eq!(Endpoint::loopback(false, port), Endpoint::new("::1".parse().unwrap(), 61_000));
    }

    #[test]
    fn an_endpoint_prints_as_a_person_writes_it() {
        let endpoint = Endpoint::new("::ffff:169.254.169.254".parse().unwrap(), 80);
        assert_eq!(format!("{endpoint:?}"), "169.254.169.254:80");
        let endpoint = Endpoint::new("fd00:ec2::23".parse().unwrap(), 80);
        assert_eq!(format!("{endpoint:?}"), "[fd00:ec2::23]:80");
    }
}
