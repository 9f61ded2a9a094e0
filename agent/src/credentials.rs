//! Credentials: what they are, where they come from, how they are cached, and when they are fetched.
//!
//! Owns everything between an identified caller and AWS; never sees a request, never decides who may ask. This file holds
//! the types that all parts share. `token` (what proves a pod's service account), `aws` (what exchanges it) and `scheduler`
//! (pure: when to fetch) know nothing of each other; `source` joins the first two behind a trait, and `cache` uses it all.

use std::{fmt, sync::Arc, time::Duration};

use aws_lc_rs::digest::SHA256_OUTPUT_LEN;
use jiff::Timestamp;

pub mod aws;
pub mod cache;
mod freshness;
pub mod kube_identity;
pub mod metrics;
mod scheduler;
pub mod source;
pub mod token;

pub use self::freshness::{Floor, Life};
use crate::{identity::ServiceAccountRef, secret::Secret};

/// The wall clock, which tests replace.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// SHA-256 of a service-account token.
pub(crate) type TokenDigest = [u8; SHA256_OUTPUT_LEN];

/// Temporary credentials of a pod's role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The access key's id; not a secret.
    pub access_key_id: String,
    /// The secret key.
    pub secret_access_key: Secret,
    /// The session token.
    pub session_token: Secret,
    /// When AWS stops accepting them.
    pub expiration: Timestamp,
    /// When they were obtained.
    pub obtained_at: Timestamp,
    /// The role they are for.
    pub role: Role,
}

/// The role that credentials are for, as the ARN of the assumed role names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Role {
    /// The account.
    pub account_id: String,
    /// `aws`, `aws-cn`, `aws-us-gov`, …
    pub partition: String,
    /// The role's name, without its path.
    pub name: String,
}

/// Why there are no credentials. The texts are for whoever runs the pod, and are part of the wire dialects.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// EKS Auth answered with an error.
    #[error("EKS Auth refused: {0}")]
    Service(ServiceError),
    /// EKS Auth could not be reached.
    #[error("EKS Auth cannot be reached: {reason}")]
    Unreachable {
        /// What failed underneath.
        reason: String,
    },
    /// The node has no credentials to call EKS Auth with.
    #[error("the node has no AWS credentials: {reason}")]
    NodeCredentials {
        /// What failed underneath.
        reason: String,
    },
    /// There is no token to call EKS Auth with.
    #[error("no token for the pod's service account: {reason}")]
    Token {
        /// What failed underneath.
        reason: String,
    },
    /// The caller's token was not issued by this cluster for EKS Auth.
    #[error("the token is not good: {reason}")]
    BadToken {
        /// What is wrong with it.
        reason: String,
    },
    /// The answer is not EKS Auth's, or is incomplete.
    #[error("EKS Auth's answer cannot be used: {reason}")]
    BadAnswer {
        /// What is wrong with it.
        reason: String,
    },
    /// The answer is for another service account.
    #[error("EKS Auth's answer cannot be used: it is for {answered}, not {asked}")]
    Mismatch {
        /// The service account of the answer.
        answered: ServiceAccountRef,
        /// The pod's.
        asked: ServiceAccountRef,
    },
    /// It takes too long. The fetch continues, and callers who retry share its result.
    #[error("no token or no answer from EKS Auth after {} ms; try again", .0.as_millis())]
    Slow(Duration),
    /// The caller is anonymous, and there are too many of its kind.
    #[error("too many requests with tokens that nobody has verified yet; try again")]
    Busy,
}

/// An error response of EKS Auth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceError {
    /// HTTP status.
    pub status: u16,
    /// `AccessDeniedException` and so on.
    pub code: String,
    /// Its text.
    pub message: String,
    /// AWS's id of the request.
    pub request_id: String,
    /// How long AWS asks to wait.
    pub retry_after: Option<Duration>,
}

// === impl Credentials ===

impl Credentials {
    /// When they were obtained, and when they expire.
    pub fn life(&self) -> Life {
        Life { obtained_at: self.obtained_at, expiration: self.expiration }
    }
}

// === impl Error ===

impl Error {
    /// Its name in metrics.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Service(error) if error.is_throttling() => "throttled",
            Self::Service(error) if error.is_refusal() => "refused",
            Self::Service(_) => "service_error",
            Self::Unreachable { .. } => "unreachable",
            Self::NodeCredentials { .. } => "node_credentials",
            Self::Token { .. } => "no_token",
            Self::BadToken { .. } => "bad_token",
            Self::BadAnswer { .. } | Self::Mismatch { .. } => "bad_answer",
            Self::Slow(_) => "slow",
            Self::Busy => "busy",
        }
    }
}

// === impl Role ===

impl Role {
    /// Reads `arn:<partition>:sts::<account>:assumed-role/<role>/<session>`.
    pub fn from_assumed_role_arn(arn: &str) -> Option<Self> {
        let mut fields = arn.splitn(6, ':');
        let ("arn", partition, "sts", "", account_id, resource) =
            (fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?, fields.next()?)
        else {
            return None;
        };
        let (name, session) = resource.strip_prefix("assumed-role/")?.split_once('/')?;
        let present = ![partition, account_id, name, session].contains(&"");
        present.then(|| Self {
            account_id: account_id.to_owned(),
            partition: partition.to_owned(),
            name: name.to_owned(),
        })
    }

    /// The role's ARN, without a path, which the assumed role's ARN does not show.
    pub fn arn(&self) -> String {
        format!("arn:{}:iam::{}:role/{}", self.partition, self.account_id, self.name)
    }
}

// === impl ServiceError ===

impl ServiceError {
    /// Whether it asks for fewer calls: by status, by code, or with `Retry-After`.
    fn is_throttling(&self) -> bool {
        let asks_to_wait = self.status == 503 && self.retry_after.is_some();
        self.status == 429 || self.code == "ThrottlingException" || asks_to_wait
    }

    /// Whose fault it is by the service's model: `client` or `server`, or `unknown` for a code that the model does not
    /// have.
    pub(crate) fn fault(&self) -> &'static str {
        match self.code.as_str() {
            "AccessDeniedException"
            | "ExpiredTokenException"
            | "InvalidParameterException"
            | "InvalidRequestException"
            | "InvalidTokenException"
            | "ResourceNotFoundException"
            | "ThrottlingException" => "client",
            "InternalServerException" | "ServiceUnavailableException" => "server",
            _ => "unknown",
        }
    }

    /// Whether EKS Auth has refused for good. A code that it does not use comes from elsewhere, such as a proxy.
    fn is_refusal(&self) -> bool {
        let is_no = self.fault() == "client" || self.code == "ValidationException";
        is_no && !self.is_throttling() && self.status < 500
    }

    /// Whether EKS Auth refused the token itself.
    fn is_about_the_token(&self) -> bool {
        matches!(self.code.as_str(), "ExpiredTokenException" | "InvalidTokenException")
    }
}

impl fmt::Display for ServiceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_role_is_parsed_from_an_assumed_role_arn() {
        let role =
            Role::from_assumed_role_arn("arn:aws-cn:sts::123456789012:assumed-role/web/eks-c1-web-0-5f");
        let role = role.unwrap();
        assert_eq!((role.account_id.as_str(), role.name.as_str()), ("123456789012", "web"));
        assert_eq!(role.arn(), "arn:aws-cn:iam::123456789012:role/web");
        for bad in [
            "",
            "arn:aws:iam::123456789012:role/web",
            "arn:aws:sts::123456789012:assumed-role/web",
            "arn:aws:sts::123456789012:assumed-role//s",
            "arn:aws:sts:::assumed-role/web/s",
        ] {
            assert_eq!(Role::from_assumed_role_arn(bad), None, "{bad:?}");
        }
    }
}
