//! The programs' debugging log: what is decided about a connection attempt and about a ticket, in words.
//!
//! Owns the texts; never prints a ticket. Off by default, when it costs nothing: the loader sets the level, and the
//! verifier drops code that can never run.

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

/// Every counter's label, padded to one length: the verifier must know how long a text is.
static LABELS: [[u8; LABEL_LEN]; counter::COUNT as usize] = labels();
/// At least the length of the longest label.
const LABEL_LEN: usize = 24;

/// What is decided about the running task's connection attempt.
#[inline(always)]
pub(crate) fn of_connect(what: Counter, destination: &Endpoint) {
    if is_on() {
        // SAFETY: the helper has no precondition.
        line(what as u32, unsafe { bpf_get_current_cgroup_id() }, destination);
    }
}

/// What happens to the ticket of a connection attempt.
#[inline(always)]
pub(crate) fn of_ticket(what: Counter, origin: &Origin) {
    if is_on() {
        line(what as u32, origin.cgroup_id, &origin.orig_dst);
    }
}

/// What happens to a ticket of which only the peer's address is known.
#[inline(always)]
pub(crate) fn of_peer(what: Counter, peer: &Endpoint) {
    if is_on() {
        line(what as u32, 0, peer);
    }
}

/// Constant to the verifier. The macro checks the same, but inside [`line`], after the call.
#[inline(always)]
fn is_on() -> bool {
    level_enabled(Level::Debug)
}

/// A function of its own: it needs no stack of its callers, and the verifier does not repeat it for each of their paths.
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
