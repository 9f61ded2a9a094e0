//! Values that the loader sets and that hold for the life of the programs.
//!
//! Owns their names (`agent_common::abi::global`); never holds anything that changes with the agent's generation.

use agent_common::abi;
use aya_ebpf::Global;

/// Key of the ticket's keyed hash. Readable by the node's root only.
#[unsafe(no_mangle)]
pub(crate) static TICKET_KEY: Global<[u64; 2]> = Global::new([0; 2]);

/// Ancestor level of the kubepods cgroup; the root of the cgroup2 hierarchy is 0.
#[unsafe(no_mangle)]
pub(crate) static KUBEPODS_LEVEL: Global<u32> = Global::new(0);

/// Cgroup id of the kubepods cgroup.
#[unsafe(no_mangle)]
pub(crate) static KUBEPODS_ID: Global<u64> = Global::new(0);

/// Cookie of the host's network namespace, 0 where it is not known. No namespace has the cookie 0.
#[unsafe(no_mangle)]
pub(crate) static HOST_NETNS: Global<u64> = Global::new(0);

/// How long a ticket may be redeemed, in nanoseconds.
#[unsafe(no_mangle)]
#[expect(clippy::cast_possible_truncation, reason = "half a minute")]
pub(crate) static TICKET_LIFE: Global<u64> = Global::new(abi::TICKET_LIFE.as_nanos() as u64);
