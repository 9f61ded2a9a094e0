//! The control flow: what happens on the node and in the cluster becomes what the kernel holds and what operators read.

pub mod fence;
pub(crate) mod kernel_events;
pub(crate) mod policy_map;
pub(crate) mod reconcile;
