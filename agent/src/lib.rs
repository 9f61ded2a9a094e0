//! podgate gives every pod of an EKS node the AWS credentials of its own service account.
//!
//! ```text
//!             kernel                                        this crate
//!   pod connect() ─ connect4/6 ─ sock_ops ─┐
//!                                          ▼ (ticket in the SYN)
//!       origin on the socket ─────▶ accept ─▶ identity ─▶ policy ─▶ credentials ─▶ dialect
//!                                   one       cgroup→pod  may it?   cache, token,  Pod Identity,
//!                                   look-up   →service              EKS Auth       IMDS, ECS
//!                                             account
//! ```
//!
//! Data moves from left to right and never back. A later stage knows the types of an earlier one, never its
//! internals; [`serve`] is the one place that awaits them all, and [`app`] the one that builds them.

pub mod accept;
pub mod admin;
pub mod app;
mod bpf;
pub mod cli;
pub mod config;
pub mod credentials;
pub mod dialect;
pub mod drain;
pub mod enforce;
pub mod error;
pub mod handover;
pub mod identity;
pub mod instance;
pub mod intercept;
pub mod link;
pub mod maps;
pub mod netns;
pub mod observe;
pub mod policies;
pub mod policy;
pub mod preflight;
pub mod secret;
pub mod serve;
pub mod telemetry;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(feature = "undefended")]
mod undefended;
pub mod whois;
