//! The call `AssumeRoleForPodIdentity` of EKS Auth.
//!
//! Owns the call and the meaning of its failures; never caches, never retries.

use std::time::Duration;

use aws_config::{Region, SdkConfig};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_eksauth::{
    Client, config,
    error::{ErrorMetadata, SdkError},
    operation::{
        RequestId as _,
        assume_role_for_pod_identity::{AssumeRoleForPodIdentityError, AssumeRoleForPodIdentityOutput},
    },
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_types::body::SdkBody;
use http::{Method, Uri, header::CONTENT_LENGTH};
use jiff::Timestamp;
use tokio::{sync::watch, time::sleep};
use tracing::debug;

use super::Connections;
use crate::{
    credentials::{Credentials, Error, Role, ServiceError},
    error::chain,
    identity::ServiceAccountRef,
    instance_metadata::Instance,
    secret::Secret,
};

/// A longer `Retry-After` is cut to this.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);
/// Least time between two connections that are opened ahead of time.
pub const WARM_INTERVAL: Duration = Duration::from_secs(20);

/// Exchanges tokens for credentials.
#[derive(Clone, Debug)]
pub struct EksAuth {
    client: Client,
    cluster_name: String,
    node_name: String,
    instance: watch::Receiver<Instance>,
}

/// What EKS Auth answered: whose token it was, and the credentials.
#[derive(Clone, Debug)]
pub struct Assumed {
    /// The service account that EKS Auth saw in the token.
    pub service_account: ServiceAccountRef,
    /// The credentials of its role.
    pub credentials: Credentials,
}

// === impl EksAuth ===

impl EksAuth {
    /// Calls for this node of this cluster, on this instance.
    pub fn new(
        config: &SdkConfig,
        cluster_name: &str,
        node_name: &str,
        instance: watch::Receiver<Instance>,
    ) -> Self {
        Self {
            client: Client::new(config),
            cluster_name: cluster_name.to_owned(),
            node_name: node_name.to_owned(),
            instance,
        }
    }

    /// Keeps a connection open for the next pod that asks: opens one now, and another whenever the last one was closed,
    /// until shutdown.
    pub async fn keep_warm(self, mut connections: Connections, every: Duration) {
        while connections.wait_for(|open| *open == 0).await.is_ok() {
            self.open_connection().await;
            sleep(every).await;
        }
    }

    /// Opens a connection. The SDK does so only for a request, so this sends one that has no effect.
    async fn open_connection(&self) {
        let call = self.client.assume_role_for_pod_identity().cluster_name(&self.cluster_name).token("");
        let call = call.customize().config_override(self.region()).mutate_request(make_head_request);
        let answer = call.send().await;
        // EKS Auth refuses it, as expected.
        if let Err(error) = answer
            && error.raw_response().is_none()
        {
            debug!(error = chain(&error), "cannot open a connection to EKS Auth ahead of time");
        }
    }

    /// Exchanges a token for credentials.
    pub async fn assume_role(&self, token: &Secret) -> Result<Assumed, Error> {
        let Instance { id, zone_id, .. } = self.instance.borrow().clone();
        let call = self.client.assume_role_for_pod_identity().set_instance_id(id).set_zone(zone_id);
        let call = call.cluster_name(&self.cluster_name).token(token.expose()).eks_node_name(&self.node_name);
        let answer = call.customize().config_override(self.region()).send().await;
        let answer = answer.map_err(|error| failure(&error))?;
        assumed(&answer, Timestamp::now()).map_err(|reason| Error::BadAnswer { reason: reason.to_owned() })
    }

    /// The configured region, or else the instance's, which may become known only after the start.
    fn region(&self) -> config::Builder {
        let set = self.client.config().region();
        let region = set.cloned().or_else(|| self.instance.borrow().region.clone().map(Region::new));
        config::Config::builder().region(region)
    }
}

/// Turns a call into `HEAD /`, which is no operation of EKS Auth.
fn make_head_request(request: &mut HttpRequest) {
    let uri: Option<Uri> = request.uri().parse().ok();
    let Some((scheme, authority)) = uri.as_ref().and_then(|uri| uri.scheme_str().zip(uri.authority())) else {
        return;
    };
    // It is made of the parts of a valid URI.
    let _ = request.set_uri(format!("{scheme}://{authority}/"));
    let _ = request.set_method(Method::HEAD.as_str());
    request.headers_mut().remove(CONTENT_LENGTH.as_str());
    *request.body_mut() = SdkBody::empty();
}

fn assumed(answer: &AssumeRoleForPodIdentityOutput, now: Timestamp) -> Result<Assumed, &'static str> {
    // The SDK fills in empty strings for missing fields.
    let credentials = answer
        .credentials()
        .filter(|sent| all_present(&[sent.access_key_id(), sent.secret_access_key(), sent.session_token()]));
    let credentials = credentials.ok_or("it has no credentials")?;
    let subject = answer.subject().filter(|sent| all_present(&[sent.namespace(), sent.service_account()]));
    let subject = subject.ok_or("it has no subject")?;
    let user = answer.assumed_role_user().filter(|sent| all_present(&[sent.arn()]));
    let arn = user.ok_or("it has no assumed role")?.arn();
    let expiration = Timestamp::from_second(credentials.expiration().secs());
    Ok(Assumed {
        service_account: ServiceAccountRef {
            namespace: subject.namespace().to_owned(),
            name: subject.service_account().to_owned(),
        },
        credentials: Credentials {
            access_key_id: credentials.access_key_id().to_owned(),
            secret_access_key: Secret::from(credentials.secret_access_key()),
            session_token: Secret::from(credentials.session_token()),
            expiration: expiration.map_err(|_| "its expiration is out of range")?,
            obtained_at: now,
            role: Role::from_assumed_role_arn(arn).ok_or("its ARN is not an assumed role's")?,
        },
    })
}

fn all_present(fields: &[&str]) -> bool {
    !fields.contains(&"")
}

/// Missing node credentials show only as a cause of a construction or dispatch failure; invalid ones, as one of AWS's
/// common errors.
fn failure(error: &SdkError<AssumeRoleForPodIdentityError, HttpResponse>) -> Error {
    match error {
        SdkError::ServiceError(answer) => service_failure(answer.err().meta(), answer.raw()),
        SdkError::ResponseError(answer) => Error::BadAnswer { reason: describe_foreign(answer.raw()) },
        SdkError::TimeoutError(_) => Error::Unreachable { reason: "no answer in time".to_owned() },
        _ if is_about_credentials(error) => Error::NodeCredentials { reason: chain(error) },
        _ => Error::Unreachable { reason: chain(error) },
    }
}

/// An error with a successful status is an answer that could not be parsed; one without a code is not EKS Auth's.
fn service_failure(error: &ErrorMetadata, answer: &HttpResponse) -> Error {
    let status = answer.status();
    let (code, message) = match error.code() {
        Some(code) if !status.is_success() => (code, error.message().unwrap_or_default().to_owned()),
        // Not EKS Auth itself, but it asks for fewer calls.
        _ if status.as_u16() == 429 || status.is_server_error() => ("UnknownError", describe_foreign(answer)),
        _ => return Error::BadAnswer { reason: describe_foreign(answer) },
    };
    let error = ServiceError {
        status: status.as_u16(),
        code: code.to_owned(),
        message,
        request_id: error.request_id().unwrap_or_default().to_owned(),
        retry_after: retry_after(answer),
    };
    if is_about_signature(&error) {
        return Error::NodeCredentials { reason: format!("EKS Auth does not take them: {error}") };
    }
    Error::Service(error)
}

/// Describes an answer that is not EKS Auth's.
fn describe_foreign(answer: &HttpResponse) -> String {
    let status = answer.status().as_u16();
    let kind = answer.headers().get("content-type").unwrap_or("no content type");
    format!("EKS Auth answered {status} with {kind}, and not as EKS Auth does (a proxy between?)")
}

/// In whole seconds. A date is ignored, since the clock may be wrong.
fn retry_after(answer: &HttpResponse) -> Option<Duration> {
    let seconds = answer.headers().get("retry-after")?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}

/// Whether AWS rejects the node's signature. With status 400, like EKS Auth's own errors, `ExpiredTokenException` is about
/// the pod's token.
fn is_about_signature(error: &ServiceError) -> bool {
    match error.code.as_str() {
        "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "InvalidSignatureException"
        | "IncompleteSignatureException"
        | "MissingAuthenticationTokenException" => true,
        "ExpiredTokenException" | "ExpiredToken" | "RequestExpired" => error.status == 403,
        _ => false,
    }
}

fn is_about_credentials(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    std::iter::from_fn(|| {
        let this = cause?;
        cause = this.source();
        Some(this)
    })
    .any(<dyn std::error::Error>::is::<CredentialsError>)
}

#[cfg(test)]
mod tests {
    use aws_sdk_eksauth::types;

    use super::*;

    fn answer(arn: &str) -> AssumeRoleForPodIdentityOutput {
        let subject = types::Subject::builder().namespace("app").service_account("web").build().unwrap();
        let credentials = types::Credentials::builder()
            .access_key_id("ASIAEXAMPLE")
            .secret_access_key("secret")
            .session_token("session")
            .expiration(aws_smithy_types::DateTime::from_secs(1_000_000))
            .build();
        let user = types::AssumedRoleUser::builder().arn(arn).assume_role_id("AROA:x").build();
        let association =
            types::PodIdentityAssociation::builder().association_arn("a").association_id("b").build();
        AssumeRoleForPodIdentityOutput::builder()
            .subject(subject)
            .audience("pods.eks.amazonaws.com")
            .pod_identity_association(association.unwrap())
            .assumed_role_user(user.unwrap())
            .credentials(credentials.unwrap())
            .build()
            .unwrap()
    }

    #[test]
    fn an_answer_is_converted_completely() {
        let answer = answer("arn:aws:sts::123456789012:assumed-role/web/eks-c1-web-0-x");
        let assumed = assumed(&answer, Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(assumed.service_account.to_string(), "app/web");
        assert_eq!(assumed.credentials.role.name, "web");
        assert_eq!(assumed.credentials.expiration, Timestamp::from_second(1_000_000).unwrap());
        assert!(!format!("{assumed:?}").contains("secret\""), "secrets do not print");
    }

    #[test]
    fn a_rejected_node_signature_is_no_fault_of_the_pod() {
        for (status, code, of_node) in [
            (403, "UnrecognizedClientException", true),
            (403, "InvalidSignatureException", true),
            (403, "ExpiredTokenException", true),
            (400, "ExpiredTokenException", false),
            (400, "AccessDeniedException", false),
            (404, "ResourceNotFoundException", false),
        ] {
            let error = ServiceError {
                status,
                code: code.into(),
                message: String::new(),
                request_id: String::new(),
                retry_after: None,
            };
            assert_eq!(is_about_signature(&error), of_node, "{status} {code}");
        }
    }

    #[test]
    fn an_answer_without_a_role_is_an_error() {
        assert!(assumed(&answer("arn:aws:iam::1:user/x"), Timestamp::UNIX_EPOCH).is_err());
    }
}
