//! Who is active on the node, and who owns which address.

pub(crate) mod active;
pub(crate) mod eks_agent;
pub mod heartbeat;
pub(crate) mod listeners;
pub mod transfer;
