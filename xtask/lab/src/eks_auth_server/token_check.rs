//! Validation of a pod's token.
//!
//! Owns the checks in the service's order: signature, audience, time, pod. The wording of `ExpiredTokenException` is
//! the real service's; the others say what is wrong.

use jiff::Timestamp;

use super::ServiceError;
use crate::{
    cluster::{Cluster, POD_IDENTITY_AUDIENCE, store::Kind},
    jwt::{Claims, Error},
};

/// The claims of a valid token.
pub(super) fn check(cluster: &Cluster, token: &str, now: Timestamp) -> Result<Claims, ServiceError> {
    let claims = cluster.verify(token).map_err(|error| match error {
        Error::Malformed => invalid("it is not a JSON web token of a service account"),
        Error::UnknownKey => invalid("its signing key is not one of the cluster's"),
        Error::BadSignature => invalid("its signature is wrong"),
    })?;
    if claims.iss != cluster.issuer() {
        return Err(invalid("its issuer is not the cluster"));
    }
    if !claims.aud.iter().any(|audience| audience == POD_IDENTITY_AUDIENCE) {
        return Err(invalid("its audience is not pods.eks.amazonaws.com"));
    }
    if claims.exp <= now.as_second() {
        let expiration = Timestamp::from_second(claims.exp).unwrap_or(Timestamp::MIN);
        let message = format!(
            "The token included in the request is expired: current date/time {now} must be before the expiration \
             date/time {expiration}."
        );
        return Err(ServiceError::bad_request("ExpiredTokenException", message));
    }
    if claims.nbf > now.as_second() {
        return Err(invalid("it is not valid yet"));
    }
    let pod = claims.kubernetes.pod.as_ref().ok_or_else(unbound)?;
    let found = cluster.get(Kind::Pod, &claims.kubernetes.namespace, &pod.name);
    if found.is_none_or(|found| found["metadata"]["uid"] != pod.uid) {
        return Err(invalid("the pod it is bound to does not exist"));
    }
    Ok(claims)
}

/// A token that is bound to no pod.
pub(super) fn unbound() -> ServiceError {
    invalid("it is not bound to a pod")
}

fn invalid(why: &str) -> ServiceError {
    let message = format!("The token included in the request is invalid: {why}.");
    ServiceError::bad_request("InvalidTokenException", message)
}
