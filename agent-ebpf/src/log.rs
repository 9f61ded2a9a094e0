//! The programs' debugging log: what is decided about a dial and about a ticket, in words.
//!
//! Owns the lines' texts; never says a ticket. It costs nothing while it is off, as it is unless the agent's log is
//! asked for it: the loader sets the level, and the verifier leaves out what can never run.

use agent_common::{
    counter::{self, Counter},
    net::Endpoint,
    origin::Origin,
};
use aya_ebpf::helpers::bpf_get_current_cgroup_id;
use aya_log_ebpf::{
    debug,
    macro_support::{Level, level_enabled},
};

/// Every counter's label, of one length: the verifier must know how long a text is.
static LABELS: [[u8; LABEL_LEN]; counter::COUNT as usize] = labels();
/// The longest label's length, and then some.
const LABEL_LEN: usize = 24;

/// What becomes of a dial, as it is made.
#[inline(always)]
pub(crate) fn of_dial(what: Counter, destination: &Endpoint) {
    if is_on() {
        // SAFETY: the helper has no precondition.
        line(what as u32, unsafe { bpf_get_current_cgroup_id() }, destination);
    }
}

/// What becomes of a dial's ticket.
#[inline(always)]
pub(crate) fn of_ticket(what: Counter, origin: &Origin) {
    if is_on() {
        line(what as u32, origin.cgroup_id, &origin.orig_dst);
    }
}

/// What becomes of a ticket of which no more is known than where it comes from.
#[inline(always)]
pub(crate) fn of_peer(what: Counter, peer: &Endpoint) {
    if is_on() {
        line(what as u32, 0, peer);
    }
}

/// Known to the verifier. The macro asks the same, but within [`line`], which would then be called all the same.
#[inline(always)]
fn is_on() -> bool {
    level_enabled(Level::Debug)
}

/// A function of its own, so that its work is neither on the callers' stacks nor gone through with each of their ways.
#[inline(never)]
fn line(what: u32, cgroup_id: u64, address: &Endpoint) {
    let Some(label) = LABELS.get(what as usize) else { return };
    // SAFETY: labels are ASCII.
    let label = unsafe { core::str::from_utf8_unchecked(label) };
    debug!((), "cgroup {}, {:i} port {}: {}", cgroup_id, address.octets(), address.port.get(), label);
}

const fn labels() -> [[u8; LABEL_LEN]; counter::COUNT as usize] {
    let mut labels = [[b' '; LABEL_LEN]; counter::COUNT as usize];
    let mut slot = 0;
    while slot < labels.len() {
        let label = Counter::ALL[slot].label().as_bytes();
        let mut place = 0;
        while place < label.len() {
            labels[slot][place] = label[place];
            place += 1;
        }
        slot += 1;
    }
    labels
}
