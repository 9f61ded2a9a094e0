//! podgate gives every pod of an EKS node the AWS credentials of its own service account.
//!
//! ```text
//!             kernel                                        this crate
//!   pod connect() ─ connect4/6 ─ sock_ops ─┐
//!                                          ▼ (ticket in the SYN)
//!       origin on the socket ─────▶ accept ─▶ identity ─▶ policy ─▶ credentials ─▶ dialect
//! ```

// Request.
pub mod accept;
pub mod credentials;
pub mod dialect;
pub mod identity;
pub mod intercept;
pub mod policy;
pub mod serve;

// Control.
pub mod control;
pub mod instance_metadata;

// Takeover.
pub mod takeover;

// Around them.
pub mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub mod drain;
pub mod error;
pub mod preflight;
pub mod tasks;
pub mod telemetry;
pub mod whois;

// Low level.
mod bpf;
mod log_limit;
pub mod mapdump;
pub mod netdev;
pub mod secret;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(feature = "undefended")]
mod undefended;
