//! The kernel's counters, one per branch.

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal,)+) => {
        /// A slot of the per-CPU map `COUNTERS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Counter {
            $($(#[doc = $doc])+ $name,)+
        }

        impl Counter {
            /// Every counter, in the order of the map.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The counter in a slot of the map.
            pub fn from_slot(slot: u32) -> Option<Self> {
                Self::ALL.get(usize::try_from(slot).ok()?).copied()
            }

            /// The counter's name as a metric label.
            pub const fn label(self) -> &'static str {
                match self {
                    $(Self::$name => $label,)+
                }
            }
        }
    };
}

counters! {
    /// Connection attempts redirected to the agent.
    Redirected = "redirected",
    /// Connection attempts to IMDS of pods in mode `off`, and all of an exempt cgroup.
    Untouched = "untouched",
    /// Connection attempts to IMDS of pods in mode `audit`.
    Audited = "audited",
    /// Connection attempts to IMDS of pods in mode `deny`.
    Denied = "denied",
    /// Connection attempts to a port of one of our addresses that is not served.
    DeniedPort = "denied_port",
    /// Connection attempts by a task that is in no pod through a pod's socket.
    DeniedNoPod = "denied_no_pod",
    /// Connection attempts of a pod that has as many tickets alive as it may have, or whose tickets cannot be counted.
    DeniedLimit = "denied_limit",
    /// Connection attempts refused because the agent is down.
    DeniedAgentDown = "denied_agent_down",
    /// Connection attempts left to the EKS Pod Identity Agent because podgate is down.
    PassedAgentDown = "passed_agent_down",
    /// Attempts of others to listen where the agent does.
    DeniedBind = "denied_bind",
    /// Connection attempts for which there was no target, no socket or no storage.
    DeniedInternal = "denied_internal",
    /// Connection attempts of a pod whose policy was not in the map yet.
    UnknownPod = "unknown_pod",
    /// Tickets stored as the handshake began.
    TicketSent = "ticket_sent",
    /// Tickets that found `TICKETS` full, or their pod at its limit: the caller arrives anonymous.
    TicketsFull = "tickets_full",
    /// Segments without room for the option.
    OptionNoRoom = "option_no_room",
    /// Tickets deleted because their connection ended or connected again.
    TicketDropped = "ticket_dropped",
    /// Handshakes that ended without any answer from the agent's side: something in between drops them.
    Unanswered = "unanswered",
    /// Connections accepted with a valid ticket.
    Redeemed = "redeemed",
    /// Connections accepted without a ticket.
    NoTicket = "no_ticket",
    /// Connections accepted with a ticket that is not, or no longer, valid.
    BadTicket = "bad_ticket",
    /// Connections accepted with a ticket whose life was over.
    TicketExpired = "ticket_expired",
    /// Connections accepted with a valid ticket but without room for the origin: the caller is anonymous.
    AcceptedNoRoom = "accepted_no_room",
    /// Packets stopped on their way from a strict pod to IMDS or the agent: they belong to no connection that was let
    /// through.
    EgressDropped = "egress_dropped",
    /// Connections of pods in mode `audit` that asked IMDS for the node's credentials.
    AuditedCredentials = "audited_credentials",
    /// Connections of pods in mode `audit` that asked IMDS for user data.
    AuditedUserData = "audited_user_data",
    /// Connections of pods in mode `audit` that asked IMDS for something else, tokens apart.
    AuditedOther = "audited_other",
    /// Events that found the ring buffer full.
    EventsDropped = "events_dropped",
    /// Connections accepted elsewhere than their ticket was sent to: somebody, or a translation on the way, has diverted it.
    DivertedTicket = "diverted_ticket",
    /// Packets to IMDS that were stopped as they left the node: a strict pod sent them, whatever address it gave them.
    FenceDropped = "fence_dropped",
}

/// How many counters there are: the size of the map.
#[expect(clippy::cast_possible_truncation, reason = "there are a few dozen")]
pub const COUNT: u32 = Counter::ALL.len() as u32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counters_slot_is_its_position_in_the_list() {
        for (place, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, place);
            assert_eq!(Counter::from_slot(*counter as u32), Some(*counter));
        }
        assert_eq!(Counter::from_slot(COUNT), None);
    }
}
