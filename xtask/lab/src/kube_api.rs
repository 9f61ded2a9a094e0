//! The Kubernetes API server, over TLS, as a node and an agent's pod meet it.
//!
//! Owns the path of a request: authentication, impersonation, authorization, then the answer. What exists is the
//! [`Cluster`]'s. Its answers and refusals, case by case, are those of kube-apiserver 1.36 with the Node authorizer,
//! RBAC, `NodeRestriction` and constrained impersonation.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use hyper::StatusCode;
use jiff::Timestamp;
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Value, json};

use crate::{
    cluster::{
        API_AUDIENCE, Cluster, openid_configuration,
        store::{Kind, Store},
    },
    fault_injection::{Faults, Service},
    http::{self, Handler, Refusal, Response, Server},
};

mod attributes;
mod authenticate;
mod authorize;
mod impersonate;
mod read;
mod status;
mod tls;
mod token_request;
mod user;

use attributes::Attributes;
use authenticate::Authenticator;
use authorize::Rules;
use status::Status;
use tls::Authority;
use user::User;

/// Lifetime of a kubelet's tokens for the API server's own audience, though it asks for an hour.
const POD_TOKEN_LIFETIME: Duration = Duration::from_hours(365 * 24);

/// A running API server. It stops when this is dropped.
#[derive(Debug)]
pub struct KubeApi {
    server: Server,
    api: Arc<Api>,
}

/// The user of a kubeconfig.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KubeUser {
    /// The service account of a pod, by a token bound to that pod.
    Pod {
        /// Namespace of the pod.
        namespace: String,
        /// Name of the pod.
        name: String,
    },
    /// A node, by client certificate.
    Node(String),
    /// A member of `system:masters`, by client certificate.
    Admin,
}

/// A request that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The user's name, `system:anonymous` without credentials, empty where they were refused.
    pub user: String,
    /// The user that was impersonated.
    pub impersonated: Option<String>,
    /// HTTP method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// HTTP status of the answer.
    pub status: u16,
}

#[derive(Debug)]
struct Api {
    cluster: Cluster,
    faults: Faults,
    authority: Authority,
    authenticator: Authenticator,
    rules: Mutex<Rules>,
    requests: Mutex<Vec<Request>>,
}

// === impl KubeApi ===

impl KubeApi {
    /// Serves on a listener that is bound already, on the current runtime. The certificate is valid for the
    /// listener's address, 127.0.0.1, `localhost` and `kubernetes.default.svc`.
    pub fn serve(listener: std::net::TcpListener, cluster: Cluster, faults: Faults) -> anyhow::Result<Self> {
        let authority = Authority::new().context("cannot make the cluster's certificate authority")?;
        let address = listener.local_addr().context("the listener has no address")?;
        let tls = authority.acceptor(address.ip()).context("cannot make the API server's certificate")?;
        let api = Arc::new(Api {
            authenticator: Authenticator::new(cluster.clone()),
            cluster,
            faults: faults.clone(),
            authority,
            rules: Mutex::new(Rules::new()),
            requests: Mutex::default(),
        });
        let server = Server::spawn(vec![listener], Some(tls), faults, Arc::clone(&api))?;
        Ok(Self { server, api })
    }

    /// The certificate of the authority that signed the server's, as PEM.
    pub fn ca_pem(&self) -> String {
        self.api.authority.pem()
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// A kubeconfig for this user, credentials included. It is JSON, which every reader of YAML takes.
    ///
    /// # Panics
    /// If the cluster has no such pod.
    pub fn kubeconfig(&self, user: &KubeUser) -> String {
        let encode = |pem: &str| BASE64_STANDARD.encode(pem);
        let credentials = match user {
            KubeUser::Pod { namespace, name } => {
                let cluster = &self.api.cluster;
                json!({"token": cluster.mint_pod_token(namespace, name, &[API_AUDIENCE], POD_TOKEN_LIFETIME)})
            }
            KubeUser::Node(_) | KubeUser::Admin => {
                let user = match user {
                    KubeUser::Node(name) => User::node(name),
                    _ => User::admin(),
                };
                let (certificate, key) = self.api.authority.client_certificate(&user);
                json!({"client-certificate-data": encode(&certificate), "client-key-data": encode(&key)})
            }
        };
        let server = format!("https://{}", self.address());
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": {
                "server": server,
                "certificate-authority-data": encode(&self.ca_pem()),
            }}],
            "users": [{"name": "lab", "user": credentials}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
            "current-context": "lab",
        })
        .to_string()
    }

    /// Every request answered so far, oldest first. A watch is listed when it begins.
    pub fn requests(&self) -> Vec<Request> {
        self.api.requests().clone()
    }

    /// Grants a service account what it needs to act as its own node: list, watch and get pods, get service
    /// accounts, create tokens; and in its own name to read namespaces and create Events. It gets no right of its
    /// own on pods and tokens.
    pub fn allow_impersonation(&self, namespace: &str, service_account: &str) {
        self.api.rules().allow_impersonation(&User::service_account_name(namespace, service_account));
    }

    /// Grants a service account plain RBAC, without any limit to its node: pods, service accounts, tokens; and to
    /// read namespaces and create Events.
    pub fn grant_plain_rbac(&self, namespace: &str, service_account: &str) {
        self.api.rules().grant_plain_rbac(&User::service_account_name(namespace, service_account));
    }

    /// Grants what the cluster roles and bindings of a manifest grant, as `kubectl apply` would; its other objects
    /// are left out.
    pub fn apply_rbac(&self, manifest: &str) -> anyhow::Result<()> {
        self.api.rules().apply(manifest)
    }

    /// Whether service accounts may read the keys that tokens are signed with, as they may from the beginning.
    pub fn allow_issuer_discovery(&self, allow: bool) {
        self.api.rules().allow_issuer_discovery(allow);
    }

    /// Whether nodes may ask for tokens with the audience of EKS Auth for pods without such a volume. On by
    /// default.
    pub fn allow_node_audience(&self, allow: bool) {
        self.api.rules().allow_node_audience(allow);
    }

    /// Stops listening and closes every connection.
    pub async fn shutdown(mut self) {
        self.server.shutdown().await;
    }
}

// === impl Api ===

impl Handler for Api {
    const SERVICE: Service = Service::KubeApi;

    async fn handle(&self, request: http::Request) -> Response {
        let mut entry = entry(&request);
        let response = match self.answer(&request, &mut entry) {
            Ok(response) => response,
            Err(status) => status.response(),
        };
        self.log(entry, &response);
        response
    }

    fn refuse(&self, request: &http::Request, refusal: &Refusal) -> Response {
        let response = match refusal {
            Refusal::Error { status, code, message } => {
                Status::new(*status, code, message.clone()).response()
            }
            Refusal::Throttle { retry_after } => Status::too_many_requests(*retry_after).response(),
        };
        self.log(entry(request), &response);
        response
    }
}

impl Api {
    fn answer(&self, request: &http::Request, entry: &mut Request) -> Result<Response, Status> {
        let requestor = self.identify(request)?;
        entry.user.clone_from(&requestor.name);
        let attributes = Attributes::new(&request.method, &request.path, &request.query);
        let user = match impersonate::wanted(&request.headers)? {
            None => requestor,
            Some(wanted) => {
                let user =
                    impersonate::check(&self.rules(), &self.cluster, &requestor, &wanted, &attributes)?;
                entry.impersonated = Some(user.name.clone());
                user
            }
        };
        self.rules().check(&self.cluster, &user, &attributes)?;
        if attributes.group.is_empty() && attributes.version.is_empty() {
            return Ok(self.answer_path(&attributes.path));
        }
        self.answer_resource(&user, &attributes, request)
    }

    fn identify(&self, request: &http::Request) -> Result<User, Status> {
        if let Some(user) = request.client_certificate.as_ref().and_then(|der| self.authority.user(der)) {
            return Ok(user);
        }
        let Some(authorization) = request.header("authorization") else { return Ok(User::anonymous()) };
        let Some(token) = authorization.strip_prefix("Bearer ") else { return Ok(User::anonymous()) };
        let audiences = [API_AUDIENCE.to_owned()];
        let authenticated = self.authenticator.token(token.trim(), &audiences, self.now(), Instant::now());
        authenticated.map(|(user, _)| user).map_err(|_| Status::unauthorized())
    }

    fn answer_path(&self, path: &str) -> Response {
        let value = match path {
            "/version" => json!({
                "major": "1", "minor": "36", "gitVersion": "v1.36.3", "gitCommit": "", "gitTreeState": "archive",
                "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "gc", "platform": "linux/amd64",
            }),
            "/openid/v1/jwks" => {
                let keys = self.cluster.jwks().to_string();
                return http::response(StatusCode::OK, "application/jwk-set+json", keys);
            }
            "/.well-known/openid-configuration" => openid_configuration(&self.cluster),
            "/healthz" | "/livez" | "/readyz" => {
                return http::response(StatusCode::OK, "text/plain", "ok");
            }
            _ => return http::response(StatusCode::NOT_FOUND, "text/plain", "404 page not found\n"),
        };
        http::json(StatusCode::OK, &value)
    }

    fn answer_resource(
        &self,
        user: &User,
        attributes: &Attributes,
        request: &http::Request,
    ) -> Result<Response, Status> {
        let body = || -> Result<Value, Status> {
            serde_json::from_slice(&request.body)
                .map_err(|error| Status::bad_request(format!("the object provided is unrecognized: {error}")))
        };
        let created = |object: &Value| http::json(StatusCode::CREATED, object);
        let resource = attributes.full_resource();
        match (attributes.group.as_str(), resource.as_str(), attributes.verb.as_str()) {
            ("", "serviceaccounts/token", "create") => {
                let request = body()?;
                token_request::create(&self.cluster, &self.rules(), user, attributes, request, self.now())
                    .map(|token| created(&token))
            }
            ("authentication.k8s.io", "tokenreviews", "create") => {
                token_request::review(&self.authenticator, body()?, self.now()).map(|review| created(&review))
            }
            ("authentication.k8s.io", "selfsubjectreviews", "create") => Ok(created(&user.self_review())),
            ("", "events", "create") => self.create_event(attributes, body()?).map(|event| created(&event)),
            ("", resource, "get" | "list" | "watch") => match Kind::of_resource(resource) {
                Some(kind) => read::answer(&self.cluster, &self.faults, kind, attributes),
                None => Err(Status::no_such_resource()),
            },
            ("", resource, _) if Kind::of_resource(resource).is_some() => Err(Status::method_not_allowed()),
            _ => Err(Status::no_such_resource()),
        }
    }

    fn create_event(&self, attributes: &Attributes, mut event: Value) -> Result<Value, Status> {
        let metadata = &mut event["metadata"];
        if metadata["name"].is_null() {
            let Some(prefix) = metadata["generateName"].as_str() else {
                return Err(Status::bad_request("name or generateName is required".to_owned()));
            };
            metadata["name"] = json!(format!("{prefix}{:x}", self.cluster.read(Store::revision)));
        }
        let name = metadata["name"].as_str().unwrap_or_default().to_owned();
        metadata["namespace"] = json!(attributes.namespace);
        self.cluster.add(Kind::Event, &attributes.namespace, &name, event);
        Ok(self.cluster.get(Kind::Event, &attributes.namespace, &name).unwrap_or_default())
    }

    fn log(&self, mut entry: Request, response: &Response) {
        entry.status = response.status().as_u16();
        self.requests().push(entry);
    }

    fn requests(&self) -> MutexGuard<'_, Vec<Request>> {
        self.requests.lock()
    }

    fn now(&self) -> Timestamp {
        self.faults.now(Self::SERVICE)
    }

    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock()
    }
}

fn entry(request: &http::Request) -> Request {
    let separator = if request.query.is_empty() { "" } else { "?" };
    Request {
        user: String::new(),
        impersonated: None,
        method: request.method.to_string(),
        path: format!("{}{separator}{}", request.path, request.query),
        status: 0,
    }
}
