//! The second fence: drops a strict pod's packets to IMDS as they leave the node, whatever gave them that address.
//!
//! Owns the last layer, behind every translation: a Service whose endpoint is IMDS, a pod that rewrites its own packets, a
//! packet socket. Whose a packet is, is told by its socket's cgroup and by the netdev it came in by: a packet that is
//! forwarded has lost its socket, and one of a netdev that shares the node's never came in. Never looks at a packet to
//! anywhere else, never asks whether the agent is alive.

use agent_common::{
    counter::Counter,
    defense::{Defense, holds},
    net::{Endpoint, Service},
    policy::{IMDS_AUDIT, IMDS_OFF, PodPolicy, UNKNOWN_IN_POD_NETWORK, UNKNOWN_ON_HOST_NETWORK},
};

use crate::{
    counters::count,
    ctx::FrameCtx,
    events,
    maps::NETDEVS,
    source_pod::{self, Lineage},
};

/// What happens to a packet.
pub(crate) enum Verdict {
    /// Other programs see it next.
    Pass,
    Drop,
}

/// A pod that a packet may be of.
struct Sender {
    /// Of the socket or the pod, 0 where neither is known.
    cgroup_id: u64,
    /// 0 where the agent knows no policy for it.
    pod_cgroup_id: u64,
    policy: PodPolicy,
}

// === impl Verdict ===

impl Verdict {
    /// `TC_ACT_UNSPEC` or `TC_ACT_SHOT` of `include/uapi/linux/pkt_cls.h`, for tcx `TCX_NEXT` and `TCX_DROP`.
    #[inline(always)]
    pub(crate) fn code(self) -> i32 {
        match self {
            Self::Pass => -1,
            Self::Drop => 2,
        }
    }
}

// === impl Sender ===

impl Sender {
    /// The pod in which the packet's socket was made; `None` where it was not made in a pod.
    #[inline(always)]
    fn by_socket(ctx: &FrameCtx) -> Option<Self> {
        let lineage = Lineage::of(|level| ctx.ancestor(level))?;
        let (pod_cgroup_id, policy) = lineage.known().unwrap_or_else(|| {
            // As in `connect`: one that is not known is strict on the host's network only where such pods may be.
            let slot = if ctx.ingress() == 0 { UNKNOWN_ON_HOST_NETWORK } else { UNKNOWN_IN_POD_NETWORK };
            (0, source_pod::unknown(slot))
        });
        Some(Self { cgroup_id: ctx.cgroup_id(), pod_cgroup_id, policy })
    }

    /// The pod whose netdev the packet came in by; `None` where it came by none. A netdev that is no pod's may be that of a
    /// bridge with pods behind it.
    #[inline(always)]
    fn by_netdev(ctx: &FrameCtx) -> Option<Self> {
        let netdev = ctx.ingress();
        if netdev == 0 {
            return None;
        }
        // SAFETY: the id is copied at once; entries are replaced whole.
        let pod = unsafe { NETDEVS.get(netdev).copied() }.unwrap_or(0);
        Some(match source_pod::of_pod(pod) {
            Some(policy) => Self { cgroup_id: pod, pod_cgroup_id: pod, policy },
            None => {
                Self { cgroup_id: pod, pod_cgroup_id: 0, policy: source_pod::unknown(UNKNOWN_IN_POD_NETWORK) }
            }
        })
    }

    #[inline(always)]
    fn is_strict(&self) -> bool {
        !matches!(self.policy.imds, IMDS_OFF | IMDS_AUDIT)
    }
}

/// tc egress of a netdev that is neither `lo` nor a pod's.
#[inline(always)]
pub(crate) fn fence(ctx: &FrameCtx) -> Verdict {
    match ctx.destination() {
        Some(destination)
            if matches!(destination.service(), Some(Service::Imds)) && holds(Defense::Fence) =>
        {
            judge(ctx, destination)
        }
        _ => Verdict::Pass,
    }
}

/// Either sender may stop it. What has neither is the node's own.
#[inline(always)]
fn judge(ctx: &FrameCtx, destination: Endpoint) -> Verdict {
    let by_socket = Sender::by_socket(ctx).filter(Sender::is_strict);
    let Some(sender) = by_socket.or_else(|| Sender::by_netdev(ctx).filter(Sender::is_strict)) else {
        return Verdict::Pass;
    };
    count(Counter::FenceDropped);
    let destination = Endpoint::from_ip6_be(destination.addr, ctx.port());
    events::of_packet(Counter::FenceDropped, sender.cgroup_id, sender.pod_cgroup_id, destination);
    Verdict::Drop
}
