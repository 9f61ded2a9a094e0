//! What happens to a dial: leave it alone, refuse it, or send it to the agent and remember its origin.
//!
//! Owns the decision and the origin; never defines a map, never touches the handshake.

use agent_common::{
    counter::Counter,
    net::{Endpoint, HTTP_PORT, NetPort, Service},
    origin::{Origin, STATE_MINTED},
    policy::{
        IMDS_AUDIT, IMDS_DENY, IMDS_INTERCEPT, IMDS_OFF, POD_IDENTITY_OFF, POD_IDENTITY_ON, PodPolicy,
        UNKNOWN_IN_POD_NETWORK, UNKNOWN_ON_HOST_NETWORK,
    },
};
use aya_ebpf::helpers::{
    bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_comm,
    bpf_get_current_pid_tgid, bpf_ktime_get_boot_ns,
};

use crate::{
    counters::count,
    ctx::Dial,
    events,
    globals::{HOST_NETNS, KUBEPODS_ID, KUBEPODS_LEVEL},
    limit,
    maps::{ORIGINS, POLICIES, TARGET_INDEX, TARGETS, UNKNOWN_POD},
    storage, ticket,
};

/// The port of every service.
const HTTP: NetPort = NetPort::new(HTTP_PORT);

/// The strictest policy, for the case that the map has none.
const STRICTEST: PodPolicy = PodPolicy { imds: IMDS_DENY, pod_identity: POD_IDENTITY_ON };

/// What `connect` is told.
pub(crate) enum Verdict {
    /// Go on, to wherever the context says now.
    Allow,
    /// `EPERM`.
    Deny,
}

/// Who dials.
struct Caller {
    /// 0 while nothing is known of the pod.
    pod_cgroup_id: u64,
    /// The cgroup that its tickets count for.
    counts_for: u64,
    policy: PodPolicy,
}

/// The dial gets `EPERM`; the reason is counted and told.
struct Refused;

/// What the policy says about a dial to one of our addresses.
enum Mode {
    /// Leave it alone, and count it so.
    Leave(Counter),
    Serve,
    Deny,
}

// === impl Verdict ===

impl Verdict {
    /// The value that a `cgroup/connect` program returns.
    #[inline(always)]
    pub(crate) fn code(self) -> i32 {
        match self {
            Self::Allow => 1,
            Self::Deny => 0,
        }
    }
}

// === impl Caller ===

impl Caller {
    /// The pod of the running task; `None` for a task that is in no pod.
    ///
    /// The task decides and not the socket, which may have been made elsewhere. Only while nothing is known of the pod
    /// does its socket's network tell host-network pods from others.
    #[inline(always)]
    fn current(dial: &Dial) -> Option<Self> {
        let level = KUBEPODS_LEVEL.load();
        // Guaranteed pods are one level below kubepods, others two. A Guaranteed pod's second level is a container
        // and the others' first is a QoS class: neither is ever a key of the map.
        let outer = ancestor(level + 1);
        if ancestor(level) != KUBEPODS_ID.load() || outer == 0 {
            return None;
        }
        let inner = ancestor(level + 2);
        // SAFETY: a policy is copied at once; entries are replaced whole.
        let known = unsafe {
            if let Some(policy) = POLICIES.get(inner) {
                Some((inner, *policy))
            } else {
                POLICIES.get(outer).map(|policy| (outer, *policy))
            }
        };
        if let Some((pod, policy)) = known {
            return Some(Self { pod_cgroup_id: pod, counts_for: pod, policy });
        }
        let on_host_network = dial.netns_cookie() == HOST_NETNS.load();
        let slot = if on_host_network { UNKNOWN_ON_HOST_NETWORK } else { UNKNOWN_IN_POD_NETWORK };
        Some(Self {
            pod_cgroup_id: 0,
            // Not the outer one where there is a choice: it may be a QoS class, and one pod would use up the tickets of
            // all. At worst each container of a Guaranteed pod counts for itself.
            counts_for: if inner == 0 { outer } else { inner },
            policy: UNKNOWN_POD.get(slot).copied().unwrap_or(STRICTEST),
        })
    }
}

/// `cgroup/connect4`.
#[inline(always)]
pub(crate) fn connect4(dial: &Dial) -> Verdict {
    let Ok(redirect) = decide(dial, &dial.address4()) else { return Verdict::Deny };
    if let Some(target) = redirect {
        dial.set_address4(target);
    }
    Verdict::Allow
}

/// `cgroup/connect6`, of v4-mapped dials too.
#[inline(always)]
pub(crate) fn connect6(dial: &Dial) -> Verdict {
    let Ok(redirect) = decide(dial, &dial.address6()) else { return Verdict::Deny };
    if let Some(target) = redirect {
        dial.set_address6(target);
    }
    Verdict::Allow
}

/// Where to send the dial, `None` to leave its address as it is.
#[inline(always)]
fn decide(dial: &Dial, destination: &Endpoint) -> Result<Option<&'static Endpoint>, Refused> {
    let service = destination.service();
    let target = target(destination.is_ip4());
    let at_target = target.is_some_and(|target| target.same_address(destination));
    if service.is_none() && !at_target {
        return Ok(None);
    }

    let caller = Caller::current(dial);
    let pod_cgroup_id = caller.as_ref().map_or(0, |caller| caller.pod_cgroup_id);
    let mut news = (caller.is_some() && pod_cgroup_id == 0).then_some(Counter::UnknownPod);
    if let Some(unknown) = news {
        count(unknown);
    }
    let outcome = match caller {
        None => Err(Counter::DeniedNoPod),
        Some(caller) => match mode(&caller.policy, service, at_target) {
            Mode::Leave(how) => {
                forget(dial);
                count(how);
                if matches!(how, Counter::Audited) {
                    news = Some(how);
                }
                Ok(None)
            }
            _ if !(dial.is_tcp() && is_served(destination, service, target)) => Err(Counter::DeniedPort),
            Mode::Deny => Err(Counter::Denied),
            Mode::Serve => send_to_agent(dial, &caller, destination, target),
        },
    };
    if let Err(reason) = outcome {
        count(reason);
        news = Some(reason);
    }
    // One event a dial, and only one place that makes it: the verifier goes through each.
    if let Some(what) = news {
        events::of_dial(what, dial, pod_cgroup_id, destination);
    }
    outcome.map_err(|_| Refused)
}

/// Whether the port is one that the agent answers for.
#[inline(always)]
fn is_served(destination: &Endpoint, service: Option<Service>, target: Option<&Endpoint>) -> bool {
    service.is_some() && destination.port == HTTP || target.is_some_and(|target| target.same(destination))
}

/// The agent's endpoint of the family in force.
#[inline(always)]
fn target(is_ip4: bool) -> Option<&'static Endpoint> {
    let target = TARGETS.get(*TARGET_INDEX.get(0)?)?;
    let endpoint = if is_ip4 { &target.v4 } else { &target.v6 };
    (!endpoint.is_none()).then_some(endpoint)
}

/// What the policy says. The agent's own address is served to every pod that has any business with the agent.
#[inline(always)]
fn mode(policy: &PodPolicy, service: Option<Service>, at_target: bool) -> Mode {
    let imds = match policy.imds {
        IMDS_OFF => Mode::Leave(Counter::Untouched),
        IMDS_AUDIT => Mode::Leave(Counter::Audited),
        IMDS_INTERCEPT => Mode::Serve,
        _ => Mode::Deny,
    };
    if matches!(service, Some(Service::Imds)) {
        return imds;
    }
    let imds_is_ours = matches!(imds, Mode::Serve | Mode::Deny);
    if policy.pod_identity != POD_IDENTITY_OFF || at_target && imds_is_ours {
        Mode::Serve
    } else {
        Mode::Leave(Counter::Untouched)
    }
}

/// Puts the dial's origin on its socket; where to send it then, `None` where it goes anyway.
#[inline(always)]
fn send_to_agent(
    dial: &Dial,
    caller: &Caller,
    destination: &Endpoint,
    target: Option<&'static Endpoint>,
) -> Result<Option<&'static Endpoint>, Counter> {
    let target = target.ok_or(Counter::DeniedInternal)?;
    let socket = dial.socket().ok_or(Counter::DeniedInternal)?;
    let dialled = storage::get_or_create(&ORIGINS, socket).ok_or(Counter::DeniedInternal)?;
    let redirect = (!target.same(destination)).then_some(target);
    if dialled.origin.state == STATE_MINTED && dialled.origin.target.same(destination) {
        // Two of these programs run while one replaces the other: the first has been here and redirected the dial.
        return Ok(redirect);
    }
    ticket::revoke(dialled);
    if !limit::has_room(caller.counts_for) {
        return Err(Counter::DeniedLimit);
    }
    // SAFETY: these helpers have no precondition.
    let (cgroup_id, dialled_at_ns) = unsafe { (bpf_get_current_cgroup_id(), bpf_ktime_get_boot_ns()) };
    dialled.counts_for = caller.counts_for;
    dialled.origin = Origin {
        cgroup_id,
        pod_cgroup_id: caller.pod_cgroup_id,
        netns_cookie: dial.netns_cookie(),
        ticket: ticket::mint(dial.socket_cookie(), dialled_at_ns),
        dialled_at_ns,
        orig_dst: *destination,
        target: *target,
        state: STATE_MINTED,
        tgid: (bpf_get_current_pid_tgid() >> 32) as u32,
        comm: bpf_get_current_comm().unwrap_or_default(),
    };
    count(Counter::Redirected);
    Ok(redirect)
}

/// The socket is dialled to where it is left alone: a former dial must not show in `getpeername`.
#[inline(always)]
fn forget(dial: &Dial) {
    if let Some(former) = dial.socket().and_then(|socket| storage::get(&ORIGINS, socket)) {
        ticket::revoke(former);
    }
}

/// The cgroup id of the running task's ancestor at `level`, 0 where it has none.
#[inline(always)]
fn ancestor(level: u32) -> u64 {
    // SAFETY: the helper has no precondition; it answers 0 for a level below the task.
    unsafe { bpf_get_current_ancestor_cgroup_id(level.cast_signed()) }
}
