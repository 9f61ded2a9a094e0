//! What an error of a fetch means for the next attempt, and for other callers.

use crate::credentials::{
    Error, ServiceError,
    scheduler::{Failure, Outcome},
};

/// What the scheduler makes of an error.
pub(super) fn outcome(error: &Error) -> Outcome {
    let failure = match error {
        Error::Service(error) if error.is_throttling() => return Outcome::Throttled(error.retry_after),
        Error::Service(error) if error.is_refusal() => Failure::Refused,
        Error::Mismatch { .. } => Failure::Refused,
        Error::Token { .. } | Error::BadToken { .. } | Error::Busy => Failure::NoToken,
        Error::Service(_)
        | Error::BadAnswer { .. }
        | Error::Unreachable { .. }
        | Error::NodeCredentials { .. }
        | Error::Slow(_) => Failure::Outage,
    };
    Outcome::Failed(failure)
}

/// The error as told to callers whose request did not cause it: without the request's id.
pub(super) fn without_request_id(error: &Error) -> Error {
    match error {
        Error::Service(error) => Error::Service(ServiceError { request_id: String::new(), ..error.clone() }),
        _ => error.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::identity::ServiceAccountRef;

    #[test]
    fn only_refusals_of_eks_auth_itself_are_refusals() {
        let wait = Some(Duration::from_secs(3));
        for (status, code, retry_after, expected) in [
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
            assert_eq!(outcome(&Error::Service(error)), expected, "{status} {code}");
        }
        let garbage = Error::BadAnswer { reason: "it is HTML".into() };
        assert_eq!(outcome(&garbage), Outcome::Failed(Failure::Outage));
        let [web, db] =
            ["web", "db"].map(|name| ServiceAccountRef { namespace: "app".into(), name: name.into() });
        let mismatch = Error::Mismatch { answered: web, asked: db };
        assert_eq!(outcome(&mismatch), Outcome::Failed(Failure::Refused));
    }
}
