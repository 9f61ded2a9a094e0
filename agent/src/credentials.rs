//! Credentials: what they are, where they come from, and how they are kept.
//!
//! Owns everything between an identified caller and AWS; never sees a request, never decides who may ask.

use std::{fmt, time::Duration};

use jiff::Timestamp;

pub mod aws;
pub mod cache;
pub mod kube_identity;
pub mod metrics;
mod scheduler;
pub mod source;
pub mod token;

pub use self::scheduler::{Budget, freshness::Floor};
use self::scheduler::{
    Outcome,
    freshness::{Failure, Life},
};
use crate::{identity::ServiceAccountRef, secret::Secret};

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

/// Why there are no credentials. The text is for whoever runs the pod.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// EKS Auth said no, or that it cannot.
    #[error("EKS Auth refused: {0}")]
    Service(ServiceError),
    /// EKS Auth could not be asked.
    #[error("EKS Auth cannot be reached: {reason}")]
    Unreachable {
        /// What failed underneath.
        reason: String,
    },
    /// The node has no credentials to ask with.
    #[error("the node has no AWS credentials: {reason}")]
    NodeCredentials {
        /// What failed underneath.
        reason: String,
    },
    /// There is no token to ask with.
    #[error("no token for the pod's service account: {reason}")]
    Token {
        /// What failed underneath.
        reason: String,
    },
    /// The caller's token is not one of this cluster's for EKS Auth.
    #[error("the token is not good: {reason}")]
    BadToken {
        /// What is wrong with it.
        reason: String,
    },
    /// The answer is not one, or not EKS Auth's.
    #[error("EKS Auth's answer cannot be used: {reason}")]
    BadAnswer {
        /// What is wrong with it.
        reason: String,
    },
    /// The answer is for somebody else.
    #[error("EKS Auth's answer cannot be used: it is for {answered}, not {asked}")]
    Mismatch {
        /// The service account that it is for.
        answered: ServiceAccountRef,
        /// The pod's.
        asked: ServiceAccountRef,
    },
    /// It takes too long. The call goes on, and whoever asks again shares its result.
    #[error("no token or no answer from EKS Auth after {} ms; try again", .0.as_millis())]
    Slow(Duration),
    /// Nobody vouches for the caller, and there are too many like it.
    #[error("too many requests with tokens that nobody has verified yet; try again")]
    Busy,
}

/// An error as EKS Auth gives it.
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
    /// When they begin and end.
    pub fn life(&self) -> Life {
        Life { obtained_at: self.obtained_at, expiration: self.expiration }
    }
}

// === impl Error ===

impl Error {
    /// What it means for the next attempt.
    fn outcome(&self) -> Outcome {
        let failure = match self {
            Self::Service(error) if error.is_throttling() => return Outcome::Throttled(error.retry_after),
            Self::Service(error) if error.is_refusal() => Failure::Refused,
            Self::Mismatch { .. } => Failure::Refused,
            Self::Token { .. } | Self::BadToken { .. } | Self::Busy => Failure::NoToken,
            Self::Service(_)
            | Self::BadAnswer { .. }
            | Self::Unreachable { .. }
            | Self::NodeCredentials { .. }
            | Self::Slow(_) => Failure::Outage,
        };
        Outcome::Failed(failure)
    }

    /// The same, for those whose request it was not.
    fn for_others(&self) -> Self {
        match self {
            Self::Service(error) => {
                Self::Service(ServiceError { request_id: String::new(), ..error.clone() })
            }
            _ => self.clone(),
        }
    }

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

    /// The role's ARN, but for a path, which the assumed role's does not show.
    pub fn arn(&self) -> String {
        format!("arn:{}:iam::{}:role/{}", self.partition, self.account_id, self.name)
    }
}

// === impl ServiceError ===

impl ServiceError {
    /// Whether it asks for fewer calls: by status or code, or by saying when to come back.
    fn is_throttling(&self) -> bool {
        let asks_to_wait = self.status == 503 && self.retry_after.is_some();
        self.status == 429 || self.code == "ThrottlingException" || asks_to_wait
    }

    /// LimitKey fault it is by the service's model: `client` or `server`, and `unknown` for a code that the model has not.
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

    /// Whether it is a no that EKS Auth means, of those that do not ask for fewer calls. A code that it does not use is
    /// somebody else's: a proxy's, say.
    fn is_refusal(&self) -> bool {
        let is_no = self.fault() == "client" || self.code == "ValidationException";
        is_no && !self.is_throttling() && self.status < 500
    }

    /// Whether it is the token that EKS Auth does not take.
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
    fn only_what_eks_auth_itself_refuses_is_a_refusal() {
        let wait = Some(Duration::from_secs(3));
        for (status, code, retry_after, outcome) in [
            (400, "AccessDeniedException", None, Outcome::Failed(Failure::Refused)),
            (404, "ResourceNotFoundException", wait, Outcome::Failed(Failure::Refused)),
            (403, "UnknownError", None, Outcome::Failed(Failure::Outage)),
            (407, "proxy_authentication_required", None, Outcome::Failed(Failure::Outage)),
            (500, "InternalServerException", None, Outcome::Failed(Failure::Outage)),
            (502, "AccessDeniedException", None, Outcome::Failed(Failure::Outage)),
            (503, "ServiceUnavailableException", None, Outcome::Failed(Failure::Outage)),
            (503, "ServiceUnavailableException", wait, Outcome::Throttled(wait)),
            (400, "ThrottlingException", None, Outcome::Throttled(None)),
            (429, "UnknownError", wait, Outcome::Throttled(wait)),
        ] {
            let error = ServiceError {
                status,
                code: code.into(),
                message: String::new(),
                request_id: "r".into(),
                retry_after,
            };
            assert_eq!(Error::Service(error).outcome(), outcome, "{status} {code}");
        }
        let garbage = Error::BadAnswer { reason: "it is HTML".into() };
        assert_eq!(garbage.outcome(), Outcome::Failed(Failure::Outage));
        let [web, db] =
            ["web", "db"].map(|name| ServiceAccountRef { namespace: "app".into(), name: name.into() });
        let mismatch = Error::Mismatch { answered: web, asked: db };
        assert_eq!(mismatch.outcome(), Outcome::Failed(Failure::Refused));
    }

    #[test]
    fn a_role_is_read_from_the_assumed_role_s_arn() {
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
