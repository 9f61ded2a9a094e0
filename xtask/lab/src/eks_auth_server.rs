//! EKS Auth: `AssumeRoleForPodIdentity`, with every check that the real service makes on what it is sent.
//!
//! Owns associations and what was issued. Never trusts a request: it must be signed with the node's credentials,
//! and its token must be the cluster's, unexpired, for EKS Auth, and of a pod that exists.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use hyper::{Method, StatusCode};
use jiff::Timestamp;
use parking_lot::{Mutex, MutexGuard};
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    cluster::{Cluster, POD_IDENTITY_AUDIENCE},
    fault_injection::{Faults, Service},
    http::{self, Handler, Refusal, Response, Server},
    jwt::Claims,
};

mod session_keys;
mod sigv4;
mod token_check;

pub use crate::imds_server::NodeCredentials;

/// Longest name of a role session.
const SESSION_NAME_MAX: usize = 64;

/// What the service knows.
#[derive(Clone, Debug)]
pub struct EksAuthConfig {
    /// Name of the cluster.
    pub cluster_name: String,
    /// Region of the service, which is in every signature.
    pub region: String,
    /// Account of cluster and roles, twelve digits.
    pub account: String,
    /// The credentials whose signature is accepted.
    pub node: NodeCredentials,
    /// Lifetime of the credentials that it issues.
    pub session: Duration,
}

/// A running EKS Auth. It stops when this is dropped.
#[derive(Debug)]
pub struct EksAuth {
    server: Server,
    service: Arc<AuthService>,
}

/// Credentials that were issued: for which role, and to which pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// The role's ARN.
    pub role_arn: String,
    /// The role's name.
    pub role_name: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Service account of the pod.
    pub service_account: String,
    /// UID of the pod.
    pub pod_uid: String,
    /// Name of the pod.
    pub pod_name: String,
    /// When they expire.
    pub expiration: Timestamp,
}

#[derive(Debug)]
struct AuthService {
    config: EksAuthConfig,
    cluster: Cluster,
    faults: Faults,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    session: Duration,
    associations: HashMap<(String, String), Association>,
    issued: HashMap<String, Issued>,
    arrivals: Vec<Instant>,
    accepted: u64,
    refusals: Vec<String>,
}

#[derive(Clone, Debug)]
struct Association {
    id: String,
    role_name: String,
}

/// An error answer of the service.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ServiceError {
    status: StatusCode,
    code: &'static str,
    message: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Call {
    token: String,
}

// === impl EksAuth ===

impl EksAuth {
    /// Serves plain HTTP on a listener that is bound already, on the current runtime. `cluster` has the keys that
    /// tokens are checked against, and the pods that they are bound to.
    pub fn serve(
        listener: std::net::TcpListener,
        config: EksAuthConfig,
        cluster: Cluster,
        faults: Faults,
    ) -> anyhow::Result<Self> {
        let state = Mutex::new(State { session: config.session, ..State::default() });
        let service = Arc::new(AuthService { config, cluster, faults: faults.clone(), state });
        Ok(Self { server: Server::spawn(vec![listener], None, faults, Arc::clone(&service))?, service })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// The URL for `AWS_ENDPOINT_URL_EKS_AUTH`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    /// Gives a service account a role, instead of the one it has.
    pub fn associate(&self, namespace: &str, service_account: &str, role_name: &str) {
        let id = format!("a-{}", session_keys::lower_base36(17));
        let association = Association { id, role_name: role_name.to_owned() };
        let key = (namespace.to_owned(), service_account.to_owned());
        self.service.state().associations.insert(key, association);
    }

    /// Takes a service account's role away. Credentials issued before stay valid, as on AWS.
    pub fn dissociate(&self, namespace: &str, service_account: &str) {
        let key = (namespace.to_owned(), service_account.to_owned());
        self.service.state().associations.remove(&key);
    }

    /// The name of the role that a service account has.
    pub fn role_of(&self, namespace: &str, service_account: &str) -> Option<String> {
        let key = (namespace.to_owned(), service_account.to_owned());
        self.service.state().associations.get(&key).map(|association| association.role_name.clone())
    }

    /// Sets the lifetime of the credentials that are issued from now on.
    pub fn set_session(&self, session: Duration) {
        self.service.state().session = session;
    }

    /// Requests for credentials that arrived, answered or not.
    pub fn calls(&self) -> u64 {
        self.service.state().arrivals.len() as u64
    }

    /// When they arrived, oldest first.
    pub fn arrivals(&self) -> Vec<Instant> {
        self.service.state().arrivals.clone()
    }

    /// Requests that were answered with credentials.
    pub fn accepted_calls(&self) -> u64 {
        self.service.state().accepted
    }

    /// Counts from zero again.
    pub fn reset_calls(&self) {
        let mut state = self.service.state();
        state.arrivals.clear();
        state.accepted = 0;
        state.refusals.clear();
    }

    /// The role and the pod of the credentials with this access key ID.
    pub fn issued(&self, access_key_id: &str) -> Option<Issued> {
        self.service.state().issued.get(access_key_id).cloned()
    }

    /// Every refusal, oldest first: the error's code and its message.
    pub fn refusals(&self) -> Vec<String> {
        self.service.state().refusals.clone()
    }

    /// Stops listening and closes every connection.
    pub async fn shutdown(mut self) {
        self.server.shutdown().await;
    }
}

// === impl AuthService ===

impl Handler for AuthService {
    const SERVICE: Service = Service::EksAuth;

    fn arrived(&self, request: &http::Request) {
        if !is_warm_up(request) {
            self.state().arrivals.push(Instant::now());
        }
    }

    async fn handle(&self, request: http::Request) -> Response {
        if is_warm_up(&request) {
            let refusal = json!({"__type": "UnknownOperationException"});
            return with_request_id(http::json(StatusCode::NOT_FOUND, &refusal));
        }
        match self.answer(&request, self.faults.now(Self::SERVICE)) {
            Ok(value) => with_request_id(http::json(StatusCode::OK, &value)),
            Err(error) => self.error(error.status, error.code, &error.message),
        }
    }

    fn refuse(&self, _request: &http::Request, refusal: &Refusal) -> Response {
        match refusal {
            Refusal::Error { status, code, message } => self.error(*status, code, message),
            Refusal::Throttle { retry_after } => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                let mut response = self.error(status, "ThrottlingException", "Rate exceeded");
                if let Some(after) = retry_after {
                    http::set_header(&mut response, "retry-after", &after.as_secs().to_string());
                }
                response
            }
        }
    }
}

impl AuthService {
    fn answer(&self, request: &http::Request, now: Timestamp) -> Result<Value, ServiceError> {
        let cluster_name = operation(request).ok_or_else(|| {
            ServiceError::new(StatusCode::NOT_FOUND, "UnknownOperationException", "Unknown operation")
        })?;
        sigv4::verify(request, &self.config.node, &self.config.region, now)?;
        if cluster_name != self.config.cluster_name {
            return Err(ServiceError::not_found(format!("No cluster found for name: {cluster_name}.")));
        }
        let call: Call = serde_json::from_slice(&request.body)
            .map_err(|_| ServiceError::bad_request("InvalidParameterException", "token: must not be null"))?;
        let claims = token_check::check(&self.cluster, &call.token, now)?;
        self.issue(&claims, now)
    }

    fn issue(&self, claims: &Claims, now: Timestamp) -> Result<Value, ServiceError> {
        let EksAuthConfig { cluster_name, region, account, .. } = &self.config;
        let (namespace, service_account) =
            (&claims.kubernetes.namespace, &claims.kubernetes.serviceaccount.name);
        let mut state = self.state();
        let key = (namespace.clone(), service_account.clone());
        let Some(association) = state.associations.get(&key).cloned() else {
            let message = format!(
                "No association exists for service account {service_account} in namespace {namespace} of cluster \
                 {cluster_name}."
            );
            return Err(ServiceError::not_found(message));
        };
        let pod = claims.kubernetes.pod.clone().ok_or_else(token_check::unbound)?;
        let expiration = now + state.session;
        let Association { id, role_name } = association;
        let session = session_name(cluster_name, &pod.name);
        let access_key_id = session_keys::access_key_id();
        let issued = Issued {
            role_arn: format!("arn:aws:iam::{account}:role/{role_name}"),
            role_name: role_name.clone(),
            namespace: namespace.clone(),
            service_account: service_account.clone(),
            pod_uid: pod.uid,
            pod_name: pod.name,
            expiration,
        };
        state.issued.insert(access_key_id.clone(), issued);
        state.accepted += 1;
        drop(state);
        let association_arn =
            format!("arn:aws:eks:{region}:{account}:podidentityassociation/{cluster_name}/{id}");
        Ok(json!({
            "subject": {"namespace": namespace, "serviceAccount": service_account},
            "audience": POD_IDENTITY_AUDIENCE,
            "podIdentityAssociation": {"associationArn": association_arn, "associationId": id},
            "assumedRoleUser": {
                "arn": format!("arn:aws:sts::{account}:assumed-role/{role_name}/{session}"),
                "assumeRoleId": format!("AROA0000000000000000:{session}"),
            },
            "credentials": {
                "accessKeyId": access_key_id,
                "secretAccessKey": session_keys::secret_access_key(),
                "sessionToken": session_keys::session_token(),
                "expiration": expiration.as_second(),
            },
        }))
    }

    fn error(&self, status: StatusCode, code: &str, message: &str) -> Response {
        self.state().refusals.push(format!("{code}: {message}"));
        let mut response = http::json(status, &json!({"__type": code, "message": message}));
        http::set_header(&mut response, "x-amzn-errortype", code);
        with_request_id(response)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

// === impl ServiceError ===

impl ServiceError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }

    fn bad_request(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    fn forbidden(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, code, message)
    }

    fn not_found(message: String) -> Self {
        Self::new(StatusCode::NOT_FOUND, "ResourceNotFoundException", message)
    }
}

/// The cluster's name in the path of the only operation.
fn operation(request: &http::Request) -> Option<&str> {
    let rest = request.path.strip_prefix("/clusters/")?;
    let name = rest.strip_suffix("/assume-role-for-pod-identity")?;
    (request.method == Method::POST && !name.is_empty() && !name.contains('/')).then_some(name)
}

/// Whether it is sent only to open a connection.
fn is_warm_up(request: &http::Request) -> bool {
    request.method == Method::HEAD && request.path == "/"
}

/// `eks-CLUSTER-POD-UUID`, shortened before the UUID.
fn session_name(cluster: &str, pod: &str) -> String {
    let id = Uuid::new_v4().to_string();
    let head: String = format!("eks-{cluster}-{pod}").chars().take(SESSION_NAME_MAX - 1 - id.len()).collect();
    format!("{head}-{id}")
}

fn with_request_id(mut response: Response) -> Response {
    http::set_header(&mut response, "x-amzn-requestid", &Uuid::new_v4().to_string());
    response
}
