//! podgate's defenses by name, for the suite of attacks: its own build of podgate (feature `undefended`) lets some be
//! switched off, to show that an attack works where its defense is missing.
//!
//! Owns the names, and whether a defense holds. In every other build all of them hold; the compiler knows it, and nothing
//! of this is left in the programs and in the agent.

macro_rules! defenses {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal,)+) => {
        /// Something that stands between a pod and what is not its own.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Defense {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Defense {
            /// Every defense.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// Its name.
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)+
                }
            }
        }
    };
}

defenses! {
    /// Tickets are a keyed hash. Without: the time, in ticks of 67 ms.
    UnguessableTickets = "unguessable-tickets",
    /// A ticket is removed once it is redeemed. Without: it stays until its connection ends.
    SingleUse = "single-use",
    /// A ticket is worth nothing once its connection attempt is over. Without: it can be redeemed until it is too old.
    RevokedTickets = "revoked-tickets",
    /// A ticket is good only where its connection was redirected to. Without: at every listener of the agent.
    TicketPath = "ticket-path",
    /// A pod is served in its own network. Without: on the node's addresses.
    PodListeners = "pod-listeners",
    /// A caller on the node's addresses has no other pod's address.
    PeerAddress = "peer-address",
    /// The ticket identifies the source pod. Without: whoever is known at the address.
    IdentityByTicket = "identity-by-ticket",
    /// The ticket is in the handshake's last segment too. Without: in the first alone.
    TicketInAck = "ticket-in-ack",
    /// A pod has so many tickets alive and no more.
    TicketLimit = "ticket-limit",
    /// A pod has so many connections open at the agent and no more.
    ConnectionLimit = "connection-limit",
    /// So many connections are open at the port for probes and metrics, and no more.
    ProbeLimit = "probe-limit",
    /// Every connect counts for its own task. Without: for the task of the socket's first connect.
    OriginOfEveryConnect = "origin-of-every-connect",
    /// IPv6 and v4-mapped connection attempts are decided like IPv4 ones. Without: they are left alone.
    Ipv6 = "ipv6",
    /// Only what is below kubepods is a pod. Without: what is named like one.
    BelowKubepods = "below-kubepods",
    /// The outermost pod on a cgroup's path counts. Without: the innermost.
    OutermostPod = "outermost-pod",
    /// A static pod has no service account. Without: that of the pod that names its hash.
    StaticPods = "static-pods",
    /// A connection must come from the pod's own network.
    OwnNetwork = "own-network",
    /// A strict pod's packets to IMDS do not leave the node, whatever gave them that address.
    Fence = "fence",
    /// Nobody else listens where the agent does.
    AddressReservation = "address-reservation",
    /// Connections to the agent's address go to its listeners alone. Without: to whom the kernel finds among those who
    /// share its port, the agent at first.
    OwnListeners = "own-listeners",
    /// The agent listens at ports of the kernel's choice. Without: at port 80 itself, where others may be first.
    OwnPorts = "own-ports",
    /// The predecessor's programs stay until the successor's take their place. Without: it removes them first.
    ReplacedInPlace = "replaced-in-place",
    /// Without an agent connections are refused. Without: left alone.
    RefusalWhenDown = "refusal-when-down",
    /// Pods that are not known yet are treated like the strictest. Without: left alone.
    UnknownPods = "unknown-pods",
    /// An anonymous caller is served only where connections are redirected. Without: at every address of the agent.
    ConnectedAddresses = "connected-addresses",
    /// A token opens the cache only once EKS Auth has accepted it.
    AcceptedTokens = "accepted-tokens",
    /// A removed pod gets nothing. Without: as long as something of it is cached.
    RemovedPods = "removed-pods",
    /// The original destination says which service is meant. Without: the request's `Host`.
    DialectByAddress = "dialect-by-address",
    /// Credentials change hands between agents that prove who they are. Without: whoever asks gets them, and whoever
    /// answers is believed, in the clear.
    HandoverProof = "handover-proof",
    /// `Host` must be the endpoint's own address.
    HostHeader = "host-header",
    /// Web pages get nothing of IMDS. Without: any name leads to it.
    WebPages = "web-pages",
    /// Requests that passed a proxy are refused.
    Forwarding = "forwarding",
    /// A request's body belongs to it. Without: it is read as the next request.
    Framing = "framing",
    /// Commands are the node's and those of podgate's own pod. Without: whoever reaches their socket.
    OwnCommands = "own-commands",
}

/// Whether a defense holds.
#[cfg(not(feature = "undefended"))]
#[inline(always)]
pub const fn holds(_: Defense) -> bool {
    true
}

#[cfg(feature = "undefended")]
pub use self::switched::{IN_PROGRAMS, holds, switch_to, without};

#[cfg(feature = "undefended")]
#[expect(
    unsafe_code,
    reason = "a symbol that the loader sets, and that the compiler must not take for a constant"
)]
mod switched {
    use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use super::Defense;

    /// The programs' section of what is switched off: a map of this name, with nothing else in it.
    pub const IN_PROGRAMS: &str = ".data.without";

    /// One bit for each defense that is off: in the programs the agent sets it, at start and later.
    #[unsafe(no_mangle)]
    #[cfg_attr(target_arch = "bpf", unsafe(link_section = ".data.without"))]
    static PODGATE_WITHOUT: AtomicU64 = AtomicU64::new(0);

    /// Whether a defense holds.
    #[inline(always)]
    pub fn holds(defense: Defense) -> bool {
        without() & (1 << defense as u32) == 0
    }

    /// Switches these defenses off, and every other one on again; says so in bits, as [`without`] does.
    pub fn switch_to(off: impl IntoIterator<Item = Defense>) -> u64 {
        let bits = off.into_iter().fold(0, |bits, defense| bits | 1 << defense as u32);
        PODGATE_WITHOUT.store(bits, Relaxed);
        bits
    }

    /// The bits of those that are off.
    #[inline(always)]
    pub fn without() -> u64 {
        // SAFETY: the static lives as long as the program. Volatile: in the programs the compiler sees no write. A word
        // that is aligned is read whole while another thread, or the agent, writes it.
        unsafe { PODGATE_WITHOUT.as_ptr().read_volatile() }
    }
}

const _: () = assert!(Defense::ALL.len() <= u64::BITS as usize);
