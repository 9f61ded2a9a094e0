//! How many tickets a pod may have alive at once, so that none fills `TICKETS` for the others.
//!
//! Owns the counts: one more with each entry of `TICKETS`, one less by whoever removes the entry. Never removes a count
//! (the agent does, when the pod is removed), never touches a ticket.

use agent_common::{
    abi::TICKETS_PER_POD,
    defense::{Defense, holds},
};
use aya_ebpf::bindings::BPF_NOEXIST;

use crate::maps::POD_TICKETS;

/// The limit in the counts' type.
const LIMIT: u64 = TICKETS_PER_POD as u64;

/// A pod's count: a value in `POD_TICKETS`.
struct Count(*mut u64);

// === impl Count ===

impl Count {
    /// The pod's count, 0 if it had none; `None` when the map is full.
    #[inline(always)]
    fn of(pod: u64) -> Option<Self> {
        Self::existing(pod).or_else(|| {
            // Another CPU may make it first; either is as good.
            let _ = POD_TICKETS.insert(pod, 0, u64::from(BPF_NOEXIST));
            Self::existing(pod)
        })
    }

    #[inline(always)]
    fn existing(pod: u64) -> Option<Self> {
        POD_TICKETS.get_ptr_mut(pod).map(Self)
    }

    #[inline(always)]
    fn get(&self) -> u64 {
        // SAFETY: the map's values are aligned and stay readable while the program runs.
        unsafe { self.0.read_volatile() }
    }

    /// Adds in one step, whatever other CPUs do; what the count was before. `u64::MAX` takes one away.
    ///
    /// In assembly, because Rust has no atomic arithmetic for BPF. `BPF_FETCH` exists since Linux 5.12:
    /// <https://github.com/torvalds/linux/commit/5ca419f2864a2c60940dcf4bbaeb69546200e36f>
    #[cfg(target_arch = "bpf")]
    #[inline(always)]
    fn add(&self, mut number: u64) -> u64 {
        // SAFETY: the map's values are aligned and stay writable while the program runs.
        unsafe {
            core::arch::asm!(
                "{number} = atomic_fetch_add((u64 *)({count} + 0), {number})",
                count = in(reg) self.0,
                number = inout(reg) number,
            );
        }
        number
    }

    /// The same where the code is only linted.
    #[cfg(not(target_arch = "bpf"))]
    fn add(&self, number: u64) -> u64 {
        use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.0) }.fetch_add(number, Relaxed)
    }
}

/// Whether the pod may connect: false at the limit, and when there is no room for its count.
#[inline(always)]
pub(crate) fn has_room(pod: u64) -> bool {
    Count::of(pod).is_some_and(|count| count.get() < LIMIT || !holds(Defense::TicketLimit))
}

/// Counts one more ticket; false at the limit, which connection attempts on several CPUs may pass in [`has_room`] at once.
#[inline(always)]
pub(crate) fn take(pod: u64) -> bool {
    let Some(count) = Count::of(pod) else { return false };
    if count.add(1) < LIMIT || !holds(Defense::TicketLimit) {
        return true;
    }
    count.add(u64::MAX);
    false
}

/// Counts one ticket less. Only for the one caller that has removed the ticket.
#[inline(always)]
pub(crate) fn give_back(pod: u64) {
    if let Some(count) = Count::existing(pod)
        && count.add(u64::MAX) == 0
    {
        // The agent removed the count while tickets were alive, and it was made again: this ticket is not in it.
        count.add(1);
    }
}
