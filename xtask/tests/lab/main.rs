//! podgate's binary on a simulated node: real programs, real pods, nothing faked between them.
//!
//! Run by `cargo xtask test --tier lab`, as root. Each test has a node of its own and leaves nothing behind.

mod connections;
mod containment;
mod death;
mod eks_agent;
mod faults;
mod gone;
mod handover;
mod identity;
mod isolation;
mod lab_commands;
mod lab_node;
mod load;
mod mesh;
mod pod_loopback;
mod pod_networks;
mod policy;
mod roles;
mod routing;
mod startup;
mod take_back;
mod upgrade;
