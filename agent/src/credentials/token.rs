//! Service-account tokens, which prove to EKS Auth whose credentials are asked for.
//!
//! Owns their claims, their verification against the cluster's keys, and where podgate gets a pod's token from. Never calls
//! AWS, never caches credentials.

pub mod claims;
#[cfg(test)]
mod fake_cluster;
pub mod jwks;
mod provider;
mod verifier;

#[cfg(any(test, feature = "testing"))]
pub(crate) use self::provider::read_projected;
pub use self::{
    provider::{Error, TokenProvider},
    verifier::{TokenVerifier, Verdict},
};
