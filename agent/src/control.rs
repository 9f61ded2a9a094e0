//! The control flow: what happens on the node and in the cluster becomes what the kernel holds and what operators read.

pub mod fence;
pub mod kernel_events;
pub mod policy_map;
pub mod reconcile;
