//! What podgate's kernel programs and its agent share: the records in the maps, the names of maps, programs
//! and pins, and the link-local addresses they are about.
//!
//! Owns the binary interface between kernel and agent; never does anything with it.
#![no_std]
#![expect(
    clippy::inline_always,
    reason = "the kernel programs' calls must vanish: structs do not fit BPF's registers"
)]

pub mod abi;
pub mod counter;
pub mod defense;
pub mod egress;
pub mod event;
pub mod net;
pub mod origin;
pub mod pod_listener;
pub mod policy;
pub mod siphash;
pub mod target;
