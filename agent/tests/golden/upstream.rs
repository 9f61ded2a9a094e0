//! What is behind the agent of a golden node: the API server as an exchange has it, and EKS Auth as the bytes that an
//! exchange gives it to say, which the agent's own client reads.
#![expect(clippy::expect_used, reason = "test code")]

use agent::{
    credentials::{
        Error,
        aws::eks_auth::{Assumed, EksAuth},
        source::CredentialSource,
        token::{
            Verdict,
            claims::{self, Claims},
        },
    },
    identity::{Pod, PodUid},
    instance_metadata::Instance,
    secret::Secret,
    testing,
};
use aws_config::{BehaviorVersion, Region, SdkConfig, retry::RetryConfig};
use aws_credential_types::{
    Credentials,
    provider::{ProvideCredentials, SharedCredentialsProvider, error::CredentialsError, future},
};
use aws_smithy_runtime_api::{
    client::{
        http::{HttpConnector, HttpConnectorFuture, SharedHttpConnector, http_client_fn},
        orchestrator::{HttpRequest, HttpResponse},
        result::ConnectorError,
    },
    http::StatusCode,
};
use aws_smithy_types::body::SdkBody;
use futures::future::BoxFuture;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::watch;

/// The signature of a token that the cluster has not signed.
const FORGED: &str = ".Zm9yZ2Vk";
/// That of one that cannot be verified.
const UNVERIFIED: &str = ".dW52ZXJpZmllZA";
/// EKS Auth's id of each request.
const REQUEST_ID: &str = "5d2a";
/// The role of every service account, as EKS Auth has assumed it.
const ROLE: &str = "arn:aws:sts::123456789012:assumed-role/web/eks-lab-web-0";
/// What EKS Auth's answers are.
pub(crate) const JSON: &str = "application/json";

/// What an exchange finds behind the agent.
#[derive(Clone, Debug, Default)]
pub(crate) enum Upstream {
    /// Credentials for every pod.
    #[default]
    Fair,
    /// This answer of EKS Auth's.
    Says { status: u16, content_type: String, body: String },
    /// EKS Auth never answers.
    Silent,
    /// The call ends for want of an answer.
    TimesOut,
    /// The node has no credentials to sign with.
    NoCredentials,
    /// Nobody has told the agent its region.
    NoRegion,
    /// The API server gives no tokens.
    NoToken,
}

/// The agent's own way to EKS Auth, but for what is behind it.
pub(crate) struct Source {
    upstream: Upstream,
    eks_auth: EksAuth,
}

/// EKS Auth where it is reached at all.
#[derive(Clone, Debug)]
struct Wire {
    upstream: Upstream,
    /// The service account of each pod.
    accounts: Vec<(PodUid, String)>,
}

/// The node's credentials, where it has any.
#[derive(Debug)]
struct Node(bool);

// === impl Source ===

impl Source {
    pub(crate) fn new(upstream: Upstream, accounts: Vec<(PodUid, String)>) -> Self {
        let region = (!matches!(upstream, Upstream::NoRegion)).then(|| Region::new("us-west-2"));
        let node = Node(!matches!(upstream, Upstream::NoCredentials));
        let wire = Wire { upstream: upstream.clone(), accounts };
        let config = SdkConfig::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(region)
            .credentials_provider(SharedCredentialsProvider::new(node))
            .retry_config(RetryConfig::disabled())
            .http_client(http_client_fn(move |_, _| SharedHttpConnector::new(wire.clone())))
            .build();
        let instance = watch::channel(Instance::default()).1;
        Self { upstream, eks_auth: EksAuth::new(&config, "lab", "n1", instance) }
    }
}

impl CredentialSource for Source {
    fn verify<'a>(&'a self, token: &'a Secret, claims: &'a Claims) -> BoxFuture<'a, Verdict> {
        let verdict = if token.expose().ends_with(UNVERIFIED) {
            Verdict::Unknown
        } else if token.expose().ends_with(FORGED) {
            Verdict::Invalid("its signature is wrong".to_owned())
        } else if claims.pod.is_none() {
            Verdict::Invalid("it is not bound to a pod".to_owned())
        } else {
            Verdict::Valid
        };
        Box::pin(async { verdict })
    }

    fn token<'a>(&'a self, pod: &'a Pod) -> BoxFuture<'a, Result<Secret, Error>> {
        let token = match self.upstream {
            Upstream::NoToken => Err(Error::Token { reason: "the API server said no".to_owned() }),
            _ => Ok(Secret::from(pod.service_account.name.as_str())),
        };
        Box::pin(async { token })
    }

    fn reject_token<'a>(&'a self, _: PodUid, _: &'a Secret) -> BoxFuture<'a, ()> {
        Box::pin(async {})
    }

    fn assume_role<'a>(&'a self, token: &'a Secret) -> BoxFuture<'a, Result<Assumed, Error>> {
        Box::pin(async {
            let mut assumed = self.eks_auth.assume_role(token).await?;
            // The files have one moment.
            assumed.credentials.obtained_at = testing::credentials().obtained_at;
            Ok(assumed)
        })
    }

    fn remove_pod(&self, _: PodUid) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

// === impl Wire ===

impl HttpConnector for Wire {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let (status, content_type, body) = match &self.upstream {
            Upstream::Silent => return HttpConnectorFuture::new(std::future::pending()),
            Upstream::TimesOut => {
                return HttpConnectorFuture::ready(Err(ConnectorError::timeout("no answer".into())));
            }
            Upstream::Says { status, content_type, body } => (*status, content_type.clone(), body.clone()),
            _ => (200, JSON.to_owned(), self.good(&request)),
        };
        let status = StatusCode::try_from(status).expect("a status");
        let mut response = HttpResponse::new(status, SdkBody::from(body));
        response.headers_mut().insert("content-type", content_type);
        response.headers_mut().insert("x-amzn-requestid", REQUEST_ID);
        HttpConnectorFuture::ready(Ok(response))
    }
}

impl Wire {
    /// EKS Auth's answer where all is well. It knows from the token whose that is; the agent's own is a name.
    fn good(&self, request: &HttpRequest) -> String {
        let body: Value = serde_json::from_slice(request.body().bytes().unwrap_or_default()).expect("JSON");
        let token = body["token"].as_str().expect("a token");
        let sent = claims::read(token, Timestamp::now()).ok().and_then(|claims| claims.pod);
        let of_pod = sent.and_then(|uid| self.accounts.iter().find(|(known, _)| *known == uid));
        let account = of_pod.map_or(token, |(_, account)| account);
        let credentials = testing::credentials();
        json!({
            "subject": {"namespace": "app", "serviceAccount": account},
            "audience": "pods.eks.amazonaws.com",
            "podIdentityAssociation": {"associationArn": "arn", "associationId": "a-1"},
            "assumedRoleUser": {"arn": ROLE, "assumeRoleId": "AROA:eks"},
            "credentials": {
                "accessKeyId": credentials.access_key_id,
                "secretAccessKey": credentials.secret_access_key.expose(),
                "sessionToken": credentials.session_token.expose(),
                "expiration": credentials.expiration.as_second(),
            },
        })
        .to_string()
    }
}

// === impl Node ===

impl ProvideCredentials for Node {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        let credentials = Credentials::new("ASIANODE", "secret", None, None, "golden");
        let missing = || CredentialsError::not_loaded("the instance has no role");
        future::ProvideCredentials::ready(self.0.then_some(credentials).ok_or_else(missing))
    }
}
