//! The node's instance metadata service, as EC2 serves it, versions 1 and 2.
//!
//! Owns session tokens and the node's role, which must never reach a pod: every read of it is counted. Never knows
//! pods.

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE};
use hyper::{Method, StatusCode};
use parking_lot::{Mutex, MutexGuard};

use crate::{
    crypto::random,
    fault_injection::{Faults, Service},
    http::{self, Handler, HopLimit, Refusal, Response, Server},
};

mod metadata_tree;

use metadata_tree::Tree;

/// Longest life of a session token, seconds.
const MAX_TTL: u64 = 21_600;
const TTL_HEADER: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const TOKEN_HEADER: &str = "x-aws-ec2-metadata-token";
/// 40 bytes make the 56 characters of a real token.
const TOKEN_BYTES: usize = 40;
/// `HttpPutResponseHopLimit` of instances that run containers: the answer comes to pods behind the node too.
pub(crate) const HOP_LIMIT: u8 = 2;

/// A set of temporary credentials of the node's role.
#[derive(Clone, PartialEq, Eq)]
pub struct NodeCredentials {
    /// `ASIA…`.
    pub access_key_id: String,
    /// The signing secret.
    pub secret_access_key: String,
    /// The session token of temporary credentials.
    pub session_token: String,
}

/// What the instance is.
#[derive(Clone, Debug)]
pub struct ImdsConfig {
    /// Such as `us-east-1`.
    pub region: String,
    /// Such as `us-east-1a`.
    pub zone: String,
    /// Such as `use1-az1`.
    pub zone_id: String,
    /// Such as `i-0123456789abcdef0`.
    pub instance_id: String,
    /// The node's role, which is also the name of its instance profile.
    pub role_name: String,
    /// The node role's credentials.
    pub credentials: NodeCredentials,
    /// Twelve digits.
    pub account: String,
}

/// A running metadata service. It stops when this is dropped.
#[derive(Debug)]
pub struct Imds {
    server: Server,
    state: Arc<State>,
}

/// A request that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// HTTP method.
    pub method: String,
    /// Path without query.
    pub path: String,
    /// HTTP status of the answer.
    pub status: u16,
    /// Whether it carried a session token, valid or not.
    pub with_token: bool,
}

#[derive(Debug)]
struct State {
    tree: Tree,
    faults: Faults,
    /// Session tokens and when they expire.
    tokens: Mutex<HashMap<String, Instant>>,
    requests: Mutex<Vec<Request>>,
    credential_reads: AtomicU64,
    v2_required: AtomicBool,
    hop_limit: AtomicU8,
}

// === impl ImdsConfig ===

impl ImdsConfig {
    /// An instance like many, whose role has these credentials.
    pub fn new(credentials: NodeCredentials) -> Self {
        Self {
            region: "us-west-2".to_owned(),
            zone: "us-west-2a".to_owned(),
            zone_id: "usw2-az1".to_owned(),
            instance_id: "i-0123456789abcdef0".to_owned(),
            role_name: "node-role".to_owned(),
            credentials,
            account: "111122223333".to_owned(),
        }
    }
}

// === impl NodeCredentials ===

impl fmt::Debug for NodeCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodeCredentials").field("access_key_id", &self.access_key_id).finish_non_exhaustive()
    }
}

// === impl Imds ===

impl Imds {
    /// Serves on listeners that are bound already, on the current runtime.
    pub fn serve(
        listeners: Vec<std::net::TcpListener>,
        config: ImdsConfig,
        faults: Faults,
    ) -> anyhow::Result<Self> {
        let state = Arc::new(State {
            tree: Tree::new(config),
            faults: faults.clone(),
            tokens: Mutex::default(),
            requests: Mutex::default(),
            credential_reads: AtomicU64::new(0),
            v2_required: AtomicBool::new(false),
            hop_limit: AtomicU8::new(HOP_LIMIT),
        });
        Ok(Self { server: Server::spawn(listeners, None, faults, Arc::clone(&state))?, state })
    }

    /// Where the first listener listens.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Whether a request without a session token is refused (`HttpTokens=required`). Off at first.
    pub fn v2_required(&self, required: bool) {
        self.state.v2_required.store(required, Relaxed);
    }

    /// How far the answer to the request for a session token goes (`HttpPutResponseHopLimit`), and nothing but it: with 1
    /// as far as the node, and not to pods behind it.
    pub fn set_hop_limit(&self, hops: u8) {
        self.state.hop_limit.store(hops, Relaxed);
    }

    /// How often credentials of the node were handed out.
    pub fn credential_reads(&self) -> u64 {
        self.state.credential_reads.load(Relaxed)
    }

    /// Every request answered so far, oldest first.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.state.requests).clone()
    }

    /// Stops listening and closes every connection.
    pub async fn shutdown(mut self) {
        self.server.shutdown().await;
    }
}

// === impl State ===

impl Handler for State {
    const SERVICE: Service = Service::Imds;

    async fn handle(&self, request: http::Request) -> Response {
        let response = self.answer(&request);
        self.log(&request, response)
    }

    fn refuse(&self, request: &http::Request, refusal: &Refusal) -> Response {
        let response = match refusal {
            Refusal::Error { status, .. } => error(*status),
            // EC2 drops packets or answers so when a client asks too often.
            Refusal::Throttle { .. } => error(StatusCode::SERVICE_UNAVAILABLE),
        };
        self.log(request, response)
    }
}

impl State {
    fn answer(&self, request: &http::Request) -> Response {
        if request.headers.contains_key("expect") {
            return error(StatusCode::EXPECTATION_FAILED);
        }
        if request.path == "/latest/api/token" {
            return if request.method == Method::PUT {
                self.new_token(request)
            } else {
                error(StatusCode::METHOD_NOT_ALLOWED)
            };
        }
        if request.method != Method::GET && request.method != Method::HEAD {
            return error(StatusCode::METHOD_NOT_ALLOWED);
        }
        let admitted = match request.header(TOKEN_HEADER) {
            Some(token) => lock(&self.tokens).get(token).is_some_and(|end| Instant::now() < *end),
            None => !self.v2_required.load(Relaxed),
        };
        if !admitted {
            return error(StatusCode::UNAUTHORIZED);
        }
        match self.tree.get(&request.path, self.faults.now(Self::SERVICE)) {
            None => error(StatusCode::NOT_FOUND),
            Some(content) => {
                if content.is_credentials {
                    self.credential_reads.fetch_add(1, Relaxed);
                }
                http::response(StatusCode::OK, "text/plain", content.text)
            }
        }
    }

    fn new_token(&self, request: &http::Request) -> Response {
        if request.headers.contains_key("x-forwarded-for") {
            return error(StatusCode::FORBIDDEN);
        }
        let ttl = request.header(TTL_HEADER).and_then(|ttl| ttl.parse().ok());
        let Some(ttl) = ttl.filter(|ttl| (1..=MAX_TTL).contains(ttl)) else {
            return error(StatusCode::BAD_REQUEST);
        };
        let token = BASE64_URL_SAFE.encode(random::<TOKEN_BYTES>());
        let mut tokens = lock(&self.tokens);
        let now = Instant::now();
        tokens.retain(|_, end| now < *end);
        tokens.insert(token.clone(), now + Duration::from_secs(ttl));
        let mut response = http::response(StatusCode::OK, "text/plain", token);
        http::set_header(&mut response, TTL_HEADER, &ttl.to_string());
        response.extensions_mut().insert(HopLimit(self.hop_limit.load(Relaxed)));
        response
    }

    fn log(&self, request: &http::Request, mut response: Response) -> Response {
        http::set_header(&mut response, "server", "EC2ws");
        lock(&self.requests).push(Request {
            method: request.method.to_string(),
            path: request.path.clone(),
            status: response.status().as_u16(),
            with_token: request.headers.contains_key(TOKEN_HEADER),
        });
        response
    }
}

/// An error page as EC2 prints it; the connection ends with it.
fn error(status: StatusCode) -> Response {
    let title = format!("{} - {}", status.as_u16(), status.canonical_reason().unwrap_or_default());
    let page = format!(
        "<?xml version=\"1.0\" encoding=\"iso-8859-1\"?>\n\
         <!DOCTYPE html PUBLIC \"-//W3C//DTD XHTML 1.0 Transitional//EN\"\n\
         \t\t\"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd\">\n\
         <html xmlns=\"http://www.w3.org/1999/xhtml\" xml:lang=\"en\" lang=\"en\">\n \
         <head>\n  <title>{title}</title>\n </head>\n <body>\n  <h1>{title}</h1>\n </body>\n</html>"
    );
    let mut response = http::response(status, "text/html", page);
    http::set_header(&mut response, "connection", "close");
    response
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock()
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    #[tokio::test]
    async fn the_401_page_has_the_length_of_the_real_one() {
        let body = error(StatusCode::UNAUTHORIZED).into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body.len(), 343);
    }

    #[test]
    fn credentials_do_not_print_their_secrets() {
        let credentials = NodeCredentials {
            access_key_id: "ASIAKEY".into(),
            secret_access_key: "hidden-1".into(),
            session_token: "hidden-2".into(),
        };
        let printed = format!("{credentials:?}");
        assert!(printed.contains("ASIAKEY") && !printed.contains("hidden"), "{printed}");
    }
}
