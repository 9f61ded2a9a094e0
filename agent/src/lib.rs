//! podgate gives every pod of an EKS node the AWS credentials of its own service account.
//!
//! This page is the architecture: three flows, and every module with a line under the flow that it belongs to.
//! `cargo xtask check` holds what each of them may import.
//!
//! # Request
//!
//! A pod asks for credentials. One way, left to right; `serve` is the only place that awaits all stages.
//!
//! ```text
//!   pod: connect(169.254.169.254)                            EKS Auth, API server
//!        │ redirect (connect4/6), ticket in the SYN (sock_ops)        ▲
//!        ▼                                                            │
//!   intercept ─▶ accept ─▶ dialect ─▶ identity ─▶ policy ─▶ credentials ─▶ dialect ─▶ response
//!    programs    origin    (parse)     caller     rules       cache        (render)
//! ```
//!
//! - `intercept`: the programs, maps and pins in the kernel, and their one owner
//! - `accept`: listeners, on the node and in pods' own networks; the origin that the kernel put on an accepted connection
//! - `dialect`: the wire formats `pod-identity`, `imds` and `ecs`: parse a request, render a response (pure)
//! - `identity`: cgroup -> pod -> service account; who may command the agent
//! - `policy`: what a pod may do, by settings and annotations (pure)
//! - `credentials`: cache and scheduler; tokens; clients of EKS Auth and the API server
//! - `serve`: the sequence of all of these; connections, limits, error responses, the access log
//!
//! # Control
//!
//! What happens in the cluster and on the node becomes what the kernel holds and what operators read.
//!
//! ```text
//!   API server: pods, namespaces ─▶ identity ─┐                        ┌─▶ intercept: maps
//!   cgroup2: created, removed    ─▶ identity ─┴▶ reconcile ─▶ policy ──┤
//!                                                                      └─▶ credentials: evict, prefetch
//!   ring buffer ─▶ intercept ─▶ kernel_events ─▶ log
//! ```
//!
//! - `control`: the loops `reconcile` and `kernel_events`, and `fence`, which keeps the second fence where packets leave the
//!   node: the node's netdevs and the pods' networks -> intercept
//! - `instance_metadata`: the agent's copy of what the node's IMDS says about the instance
//!
//! # Takeover
//!
//! A new agent replaces a running one without a refused connection and without a cold cache.
//!
//! ```text
//!   predecessor: active ─────── credentials (transfer) ───────▶ successor: standby
//!        │ superseded                                                │ become_active
//!        ▼                                                           ▼
//!     standby ◀────── takes back when it is silent for 1 s ─────── active
//! ```
//!
//! - `takeover`: which agent is active, who owns which address, and what a successor inherits
//!
//! # Around the flows
//!
//! - `main`, `cli`: the commands, one file each
//! - `app`: the one composition root. `podgate run`, the pipeline tests and the golden tests all go through
//!   [`app::build`] and differ in their [seams](app::seams) alone
//! - `config`, `preflight`: the settings; what the node must have
//! - `admin`, `whois`: probes, metrics and commands; which identity a process would get, and why
//! - `tasks`, `drain`, `telemetry`: background tasks; graceful shutdown; the log
//!
//! # Low level
//!
//! - `bpf`, `netdev`, `mapdump`: what of bpf(2) the eBPF library lacks; podgate's network interface and its
//!   addresses, and a look at the node's other interfaces; pinned maps in the format of bpftool
//! - `secret`, `error`, `log_limit`, `files`: strings that no log prints; errors for people; limits on log lines; private
//!   directories
//! - `testing`, `undefended`: doubles for tests; defenses that the attack suite switches off

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

// Around the flows.
pub(crate) mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub(crate) mod drain;
pub(crate) mod preflight;
pub(crate) mod tasks;
pub(crate) mod telemetry;
pub(crate) mod whois;

// Low level.
mod bpf;
pub mod error;
mod files;
mod log_limit;
pub mod mapdump;
pub mod netdev;
pub mod secret;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
#[cfg(feature = "undefended")]
mod undefended;
