//! Counting what happens, one slot per branch.

use agent_common::counter::Counter;

use crate::maps::COUNTERS;

/// Adds one on this CPU.
#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot is this CPU's own, and the kernel does not move a running program to another CPU.
        unsafe { *slot += 1 };
    }
}
