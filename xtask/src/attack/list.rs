//! Every attack.

use agent_common::defense::Defense;
use anyhow::ensure;
use lab::cgroupfs::CgroupDriver;

use super::{
    Attack, InAudit, LabKind, Without, arrivals, credentials, fetches, lifetime, network, packets, pods,
    requests, sockets, translation,
};

/// Settings of an operator that take a defense away: for these the control needs no other build.
const NO_EGRESS_FILTER: Without = Without::Flags("--egress-filter", "off");
const UNKNOWN_AS_KNOWN: Without = Without::Flags("--imds-unknown", "as-known");
const IMDS_V1: Without = Without::Flags("--imds-v1", "allow");
const EVIL_EKS_AGENT: Without = Without::Flags("--eks-agent", "evil/eks-pod-identity-agent");
const EVIL_DELEGATE: Without = Without::Flags("--token-delegate", "evil/attacker");
const TOKENLESS: Without = Without::Annotation("podgate.dev/tokenless", "allow");
const POD_OVERRIDE: Without = Without::Annotation("podgate.dev/imds-pod-override", "true");

macro_rules! attacks {
    ($($name:literal, $tried:literal, [$($without:ident),+], $run:path $(, $option:ident)*;)+) => {
        &[$(Attack {
            name: $name,
            tried: $tried,
            without: &[$(attacks!(@without $without)),+],
            lab: attacks!(@lab $($option)*),
            pods: attacks!(@pods $($option)*),
            driver: attacks!(@driver $($option)*),
            run: |scene| Box::pin($run(scene)),
        }),+]
    };
    (@without NO_EGRESS_FILTER) => { NO_EGRESS_FILTER };
    (@without UNKNOWN_AS_KNOWN) => { UNKNOWN_AS_KNOWN };
    (@without IMDS_V1) => { IMDS_V1 };
    (@without EVIL_EKS_AGENT) => { EVIL_EKS_AGENT };
    (@without EVIL_DELEGATE) => { EVIL_DELEGATE };
    (@without TOKENLESS) => { TOKENLESS };
    (@without POD_OVERRIDE) => { POD_OVERRIDE };
    (@without $defense:ident) => { Without::Defense(Defense::$defense) };
    (@lab) => { LabKind::Shared };
    (@lab own $($rest:ident)*) => { LabKind::Own };
    (@lab quiet $($rest:ident)*) => { LabKind::Quiet };
    (@lab bare $($rest:ident)*) => { LabKind::Bare };
    (@lab $other:ident $($rest:ident)*) => { attacks!(@lab $($rest)*) };
    (@pods) => { InAudit::Audit };
    (@pods imds $($rest:ident)*) => { InAudit::Intercept };
    (@pods $other:ident $($rest:ident)*) => { attacks!(@pods $($rest)*) };
    (@driver) => { CgroupDriver::Systemd };
    (@driver cgroupfs $($rest:ident)*) => { CgroupDriver::Cgroupfs };
    (@driver $other:ident $($rest:ident)*) => { attacks!(@driver $($rest)*) };
}

/// Those whose name contains this.
pub(super) fn select(only: &str) -> anyhow::Result<Vec<&'static Attack>> {
    let selected: Vec<_> = ATTACKS.iter().filter(|attack| attack.name.contains(only)).collect();
    let names = || ATTACKS.iter().map(|attack| attack.name).collect::<Vec<_>>().join(", ");
    ensure!(!selected.is_empty(), "no attack's name contains {only:?}; there are {}", names());
    Ok(selected)
}

pub(super) const ATTACKS: &[Attack] = attacks! {
    "guessed-ticket", "a handshake by hand, with every ticket that the time suggests, while another pod's connection is under way",
        [PodListeners, PeerAddress, UnguessableTickets], packets::guessed_ticket;
    "replayed-ticket", "a ticket read off the node's wire, in a handshake by hand, after its owner was served",
        [PodListeners, PeerAddress, SingleUse], packets::replayed_ticket;
    "stolen-ticket", "a ticket read off the node's wire, in a handshake by hand, after its owner's connection has failed",
        [PodListeners, PeerAddress, RevokedTickets], packets::stolen_ticket;
    "no-ticket", "a handshake by hand without a ticket, from the address of a pod that has completed",
        [PodListeners, PeerAddress, OwnNetwork, IdentityByTicket, RemovedPods], packets::no_ticket;
    "absent-ticket", "a connection without a ticket, from an address shared with another pod",
        [IdentityByTicket], network::absent_ticket;
    "source-port-reuse", "the same from the very port that the other pod has just used",
        [IdentityByTicket], network::reused_port;
    "ip-reuse", "a new pod with the address of one that has completed asks for credentials",
        [PodListeners, PeerAddress, OwnNetwork, IdentityByTicket, RemovedPods], network::reused_address;
    "doubled-address", "the address and the port of a pod that lives, in a second network namespace",
        [PodListeners, IdentityByTicket], network::doubled_address;
    "from-the-node", "a process of the node, in no pod, connects where pods on the host's network do",
        [IdentityByTicket], network::from_the_node;
    "another-namespace", "a process of the node, in no pod, connects through a pod's network",
        [PodListeners, IdentityByTicket], network::beside_a_pod;
    "foreign-network", "a process of one pod connects through another pod's network, as a node-wide mesh proxy does",
        [OwnNetwork], network::foreign_network;
    "syn-flood", "thousands of handshakes begun by hand, so that the node answers with SYN cookies",
        [PodListeners, TicketInAck], packets::syn_flood, bare;
    "half-open-connections", "50,000 connections that never complete, to use up the room for tickets",
        [PodListeners, TicketLimit], packets::half_open_connections, quiet;
    "held-connections", "1,000 idle connections to an agent that may have 512 files open",
        [ConnectionLimit], packets::held_connections, quiet;
    "held-probes", "520 connections to the port for probes and metrics of an agent that may have 512 files open",
        [ProbeLimit], packets::held_probes, quiet;
    "full-accept-queue", "four processes go on opening connections to an agent that may have 512 files open",
        [ConnectionLimit], packets::full_queue, quiet;
    "raw-tcp-to-imds", "a whole HTTP exchange with the real IMDS by raw packets",
        [NO_EGRESS_FILTER, Fence], packets::raw_tcp, imds;
    "udp-to-imds", "a datagram to the real IMDS",
        [NO_EGRESS_FILTER, Fence], packets::datagram, imds;
    "icmp-to-imds", "a ping to the real IMDS",
        [NO_EGRESS_FILTER, Fence], packets::ping, imds;
    "ipv6-to-imds", "IMDSv2 at fd00:ec2::254",
        [Ipv6, NO_EGRESS_FILTER, Fence], network::ipv6, imds;
    "v4-mapped-to-imds", "IMDSv2 at ::ffff:169.254.169.254",
        [Ipv6, NO_EGRESS_FILTER, Fence], network::mapped, imds;
    "socket-passed-on", "a socket that another pod has connected is passed on and connected again",
        [OriginOfEveryConnect], pods::passed_socket;
    "unsent-socket-passed-on", "the same with a socket whose connect has failed before its handshake",
        [PodListeners, OriginOfEveryConnect], pods::unsent_socket;
    "earlier-socket", "a connection to the real IMDS from before podgate came is used after",
        [NO_EGRESS_FILTER, Fence], pods::earlier_socket, bare, imds;
    "lookalike-cgroup", "a cgroup named like another pod's outside kubepods, and a pod's socket",
        [BelowKubepods, OwnNetwork], pods::lookalike_cgroup;
    "nested-pod-cgroup", "a cgroup named like another pod's below one's own container",
        [PodListeners, OutermostPod, OwnNetwork], pods::nested_cgroup;
    "nested-pod-cgroup-cgroupfs", "the same on a node whose kubelet names cgroups with the driver cgroupfs",
        [PodListeners, OutermostPod, OwnNetwork], pods::nested_cgroup, cgroupfs;
    "static-pod-annotation", "a tenant's pod with the annotations of a static pod, which then asks for credentials",
        [StaticPods], pods::static_pod;
    "claimed-owner", "a tenant's pod that says to be of the EKS Pod Identity Agent, which is left alone",
        [EVIL_EKS_AGENT], pods::claimed_owner, imds;
    "pod-not-known-yet", "IMDSv2 from a pod that the API server does not show yet",
        [UnknownPods], pods::unknown_pod, imds;
    "loosening-annotation", "a tenant's pod with podgate.dev/imds: off",
        [POD_OVERRIDE], pods::loosening_annotation, imds;
    "forged-token", "a token of another pod's name with a signature of one's own, while the pod's credentials are cached",
        [AcceptedTokens], credentials::forged_token;
    "stolen-token", "another pod's token, sent by a pod",
        [EVIL_DELEGATE], credentials::stolen_token;
    "stolen-token-at-own-pair", "the same at podgate's own pair of addresses, where nothing is redirected",
        [PeerAddress, ConnectedAddresses], credentials::stolen_token_at_own_pair;
    "stolen-token-when-left-alone", "the same at every address by a pod with podgate.dev/pod-identity: off",
        [PeerAddress, ConnectedAddresses], credentials::stolen_token_of_one_left_alone;
    "stolen-token-by-sidecar", "the same by way of a mesh's sidecar, which connects again",
        [EVIL_DELEGATE], credentials::stolen_token_by_sidecar;
    "joined-listener", "a root pod on the host's network listens where the agent does, and takes its connections",
        [PodListeners, AddressReservation, OwnListeners], credentials::joined_listener, own;
    "wildcard-listener", "the same at every address, also after the agent is killed with -9",
        [OwnListeners], credentials::wildcard_listener, own;
    "command-socket", "a root pod to which the node's files are shown asks the socket for podgate's commands",
        [OwnCommands], sockets::commands;
    "handover-socket", "the same pod asks the agent for its credentials as the next agent does",
        [HandoverProof], sockets::asked_handover;
    "fake-handover-socket", "the same pod puts its own socket there, and offers the next agent credentials for another pod",
        [HandoverProof], sockets::offered_handover, own;
    "arrival-while-dead", "pods to be kept from the node's role start while the agent is dead, and ask IMDS at once",
        [UNKNOWN_AS_KNOWN], arrivals::while_dead, own;
    "arrival-while-hung", "the same while it hangs",
        [UnknownPods], arrivals::while_hung;
    "arrival-while-blind", "the same while the API server answers it nothing",
        [UnknownPods], arrivals::while_blind;
    "arrival-while-starved", "the same while busy loops leave it hardly any processor",
        [UnknownPods], arrivals::while_starved, quiet;
    "agent-killed", "IMDSv2 without pause while the agent is killed with -9 and started again",
        [RefusalWhenDown, NO_EGRESS_FILTER, Fence], lifetime::killed, own, imds;
    "agent-stopped", "the same while it is stopped",
        [RefusalWhenDown, NO_EGRESS_FILTER, Fence], lifetime::stopped, own, imds;
    "agent-hung", "the same while it hangs",
        [RefusalWhenDown, NO_EGRESS_FILTER, Fence], lifetime::hung, imds;
    "agent-succeeded", "the same while others take over from it, one after the other",
        [ReplacedInPlace, Fence], lifetime::succeeded, own, imds;
    "agent-of-another-abi", "the same while one of another ABI takes over from it, and then one of its own again",
        [ReplacedInPlace, Fence], lifetime::succeeded_by_other_abi, own, imds;
    "squatted-port", "a pod on the host's network listens at port 80 of every address after the agent is killed with -9, and \
                      it is started again",
        [OwnPorts], lifetime::squatted_after_death, own, imds;
    "squatted-port-at-boot", "the same before the agent is started for the first time",
        [OwnPorts], lifetime::squatted_at_boot, bare, imds;
    "rebound-name", "a page in a pod's browser whose name resolves to the endpoint",
        [HostHeader], requests::rebound_name;
    "rebound-imds", "the same with PUT and GET at IMDS, as a browser sends them",
        [WebPages], requests::rebound_imds, imds;
    "open-proxy", "a server in a pod that passes requests on to any of podgate's addresses, and says for whom",
        [Forwarding], fetches::open_proxy, imds;
    "fetched-url", "a server in a pod with a token that can be made to fetch a URL with GET, at each of podgate's addresses",
        [TOKENLESS], fetches::fetched_url;
    "kubelet-probe", "a tenant's probes and lifecycle hooks, with podgate's addresses or the loopback for a host: the kubelet asks",
        [IdentityByTicket], fetches::probed_by_kubelet;
    "port-forward", "a process of the node, or of another pod, in a pod's network at podgate's own listener there",
        [IdentityByTicket], fetches::port_forward;
    "tricked-server", "a server in a pod that can be made to fetch a URL with GET",
        [IMDS_V1], requests::tricked_server, imds;
    "host-of-another-dialect", "the same with the path and the Host of EKS Pod Identity, at IMDS's address",
        [DialectByAddress], requests::other_dialect, imds;
    "smuggled-request", "two requests in one segment: a proxy's, with another one in its body",
        [Framing], requests::smuggled_request;
    "absolute-form", "a page in a pod's browser, with the endpoint in the request line and another name in Host",
        [HostHeader], requests::absolute_form;
    "service-to-imds", "IMDSv2 at a Service's address that the node translates to IMDS's",
        [Fence], translation::service, imds;
    "service-to-imds-over-ipv6", "the same over IPv6",
        [Fence], translation::service_over_ipv6, imds;
    "packet-socket-to-imds", "a whole HTTP exchange with the real IMDS by a packet socket, below all that sees a pod's packets",
        [Fence], packets::packet_socket, imds;
    "rewritten-to-imds", "a pod's own netdev rules write IMDS's address into its packets, below the egress filter",
        [Fence], translation::rewritten, imds;
    "stolen-on-its-way", "a host port takes another pod's handshake, whose ticket is used while the connection is under way",
        [PodListeners, PeerAddress], translation::stolen_on_its_way;
    "stolen-from-host-network", "the same of a pod on the host's network",
        [PeerAddress], translation::stolen_from_host_network;
    "host-port-in-the-way", "a host port takes other pods' connections to podgate, and answers none",
        [PodListeners], translation::host_port;
    "masqueraded", "a pod without identity, where the node gives all pods its own address on their way to podgate",
        [PodListeners, IdentityByTicket], translation::masqueraded;
};
