//! What each failure means to the caller: one function per kind of cause.
//!
//! Owns statuses, codes and messages; never logs, never renders a body.

use agent_common::net::{ECS_V4, IMDS_V4, IMDS_V6, POD_IDENTITY_V4, POD_IDENTITY_V6};
use hyper::StatusCode;

use crate::{
    credentials::{Error as CredentialsError, ServiceError},
    dialect::Refusal,
    identity::{Error as IdentityError, Pod},
};

/// Follows the EKS Pod Identity Agent's text where the kernel attests the pod.
pub(super) const TOKENLESS_HINT: &str = "; this pod is not served without one: podgate.dev/tokenless: allow on the \
     pod would change that";

/// The caller has no identity.
pub(super) fn identity(error: &IdentityError) -> Refusal {
    let (status, code) = match error {
        IdentityError::CgroupRemoved { .. }
        | IdentityError::NotAPod { .. }
        | IdentityError::StaticPod { .. } => (StatusCode::FORBIDDEN, "AccessDenied"),
        IdentityError::CgroupPath { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "InternalError"),
        IdentityError::PodUnknown { .. } => (StatusCode::SERVICE_UNAVAILABLE, "PodUnknown"),
        IdentityError::ForeignNetwork => (StatusCode::FORBIDDEN, "ForeignNetwork"),
    };
    Refusal::new(status, code, error.to_string())
}

/// There are no credentials for the caller. Statuses are the EKS Pod Identity Agent's, because SDKs decide by them.
pub(super) fn credentials(error: &CredentialsError, pod: Option<&Pod>) -> Refusal {
    let caller =
        pod.map(|pod| format!(" (pod {}, service account {})", pod.full_name(), pod.service_account));
    let caller = caller.unwrap_or_default();
    match error {
        CredentialsError::Service(error) => Refusal::new(
            service_status(error),
            error.code.clone(),
            format!("{}{}{caller}", service_text(error), advice(&error.code)),
        ),
        CredentialsError::Unreachable { .. }
        | CredentialsError::BadAnswer { .. }
        | CredentialsError::Mismatch { .. } => {
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "Unavailable", format!("[]: {error}{caller}"))
        }
        CredentialsError::NodeCredentials { .. } => {
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "NodeCredentials", format!("{error}{caller}"))
        }
        CredentialsError::Token { .. } => {
            Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "NoToken", format!("{error}{caller}"))
        }
        CredentialsError::BadToken { .. } => Refusal::new(
            StatusCode::BAD_REQUEST,
            "InvalidTokenException",
            format!("[]: (InvalidTokenException): {error}, fault: client{caller}"),
        ),
        CredentialsError::Slow(_) => {
            Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "Slow", format!("{error}{caller}"))
        }
        CredentialsError::Busy => {
            Refusal::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", error.to_string())
        }
    }
}

/// The token and the kernel name different pods.
pub(super) fn mismatched_token() -> Refusal {
    Refusal::new(StatusCode::FORBIDDEN, "AccessDenied", "the token is not bound to the pod that sent it")
}

/// Only a verified token counts, and the cluster's keys cannot be fetched.
pub(super) fn unverified() -> Refusal {
    Refusal::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "Unverified",
        "the keys of the cluster's tokens cannot be fetched, and only a verified token of another pod counts; try again",
    )
}

/// The pod is left to the EKS Pod Identity Agent, and came here all the same.
pub(super) fn pod_identity_is_off() -> Refusal {
    Refusal::new(
        StatusCode::FORBIDDEN,
        "AccessDenied",
        "podgate does not serve EKS Pod Identity to this pod: podgate.dev/pod-identity is off for it",
    )
}

/// What the request waits for did not come in time. A retry finds it, or the reason.
pub(super) fn slow() -> Refusal {
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "Slow", "it takes too long; try again")
}

/// The caller is anonymous.
pub(super) fn anonymous() -> Refusal {
    Refusal::new(
        StatusCode::FORBIDDEN,
        "AccessDenied",
        "podgate does not know which pod this connection is from: it answers connections that pods of this node \
         dial themselves",
    )
}

/// The caller connected through a network that is not its own.
pub(super) fn foreign_network(error: &IdentityError) -> Refusal {
    let refusal = identity(error);
    let message = format!(
        "{}: podgate serves neither; exclude {IMDS_V4}/32, {IMDS_V6}/128, {POD_IDENTITY_V4}/32, {POD_IDENTITY_V6}/128 \
         and {ECS_V4}/32 from the mesh, or send the pod's token",
        refusal.message
    );
    Refusal { message, ..refusal }
}

/// The pod's namespace is unknown, and its annotations may ask for anything.
pub(super) fn namespace_unknown(pod: &Pod) -> Refusal {
    let message = format!("namespace {} is not known yet; try again", pod.service_account.namespace);
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "NamespaceUnknown", message)
}

/// The pod's policy is `deny`.
pub(super) fn denied() -> Refusal {
    Refusal::new(
        StatusCode::FORBIDDEN,
        "AccessDenied",
        "the instance metadata service is denied to this pod by podgate's policy",
    )
}

/// The pod connected before its policy was known, and is not intercepted.
pub(super) fn not_intercepted() -> Refusal {
    Refusal::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "NotIntercepted",
        "this pod uses the instance's own metadata service: dial again",
    )
}

fn service_status(error: &ServiceError) -> StatusCode {
    let status = StatusCode::from_u16(error.status).ok();
    let status = status.filter(|status| status.is_client_error() || status.is_server_error());
    status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// The EKS Pod Identity Agent's text: `[request id]: (Code): message, fault: client`.
fn service_text(error: &ServiceError) -> String {
    format!("[{}]: ({}): {}, fault: {}", error.request_id, error.code, error.message, error.fault())
}

fn advice(code: &str) -> &'static str {
    match code {
        "ResourceNotFoundException" => {
            "; the service account has no pod identity association in this cluster: make one with `aws eks \
             create-pod-identity-association`"
        }
        "AccessDeniedException" => {
            "; the role's trust policy must allow pods.eks.amazonaws.com sts:AssumeRole and sts:TagSession, and the \
             node's role eks-auth:AssumeRoleForPodIdentity"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::pod;

    fn service(status: u16, code: &str) -> CredentialsError {
        CredentialsError::Service(ServiceError {
            status,
            code: code.into(),
            message: "m".into(),
            request_id: "r1".into(),
            retry_after: None,
        })
    }

    #[test]
    fn a_pod_without_an_association_learns_its_service_account() {
        let refusal = credentials(&service(404, "ResourceNotFoundException"), Some(&pod("app", "web")));
        assert_eq!(refusal.status, StatusCode::NOT_FOUND);
        assert!(refusal.message.starts_with("[r1]: (ResourceNotFoundException): m, fault: client"));
        assert!(refusal.message.contains("service account app/web"), "{}", refusal.message);
    }

    #[test]
    fn an_error_status_of_eks_auth_is_passed_on() {
        for (upstream, status) in [(400, 400), (404, 404), (429, 429), (503, 503), (302, 500), (7, 500)] {
            assert_eq!(credentials(&service(upstream, "X"), None).status.as_u16(), status, "{upstream}");
        }
    }

    #[test]
    fn a_failure_that_may_pass_is_a_server_error() {
        let errors = [
            CredentialsError::Slow(std::time::Duration::from_millis(800)),
            CredentialsError::Unreachable { reason: "x".into() },
            CredentialsError::NodeCredentials { reason: "x".into() },
        ];
        for error in errors {
            assert!(credentials(&error, None).status.is_server_error(), "{error}");
        }
        let unknown = IdentityError::PodUnknown { uid: crate::testing::pod_uid() };
        assert_eq!(identity(&unknown).status, StatusCode::SERVICE_UNAVAILABLE);
    }
}
