//! The HTTP contracts that SDKs speak: the first stage parses a request, the last one renders a response.
//!
//! Owns every byte on the wire; pure functions of a request's head and an outcome. Never does IO, never decides who the
//! caller is or what it may have. The page below lists every difference from the service that podgate replaces.
//!
#![doc = include_str!("../dialects.md")]

use std::borrow::Cow;

use agent_common::{
    defense::{Defense, holds},
    net::Service,
};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, StatusCode, Version,
    header::{ALLOW, CONTENT_TYPE, FORWARDED, HOST, HeaderName, HeaderValue, VIA},
    http::{request::Parts, uri::Authority},
};

pub(crate) mod ecs;
pub(crate) mod imds;
pub mod imds_token;
pub(crate) mod pod_identity;

/// A complete response. The length of its body is known, so it always has a `Content-Length`.
pub(crate) type Response = hyper::Response<Full<Bytes>>;

/// An HTTP contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Dialect {
    /// EKS Pod Identity.
    PodIdentity,
    /// The EC2 instance metadata service.
    Imds,
    /// The ECS credential endpoint.
    Ecs,
}

/// Why a request gets no credentials: what the pod is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// The status: SDKs decide by it.
    pub(crate) status: StatusCode,
    /// A short name for programs.
    pub(crate) code: Cow<'static, str>,
    /// What a person needs to know; never a secret, never the name of another pod.
    pub(crate) message: String,
    /// The methods that are allowed, where the method was wrong.
    pub(crate) allow: Option<&'static str>,
}

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

// === impl Dialect ===

impl Dialect {
    /// The dialect of the original destination. Where that is unknown, as behind a sidecar: of the service that `Host`
    /// names, else of the service at whose address the connection was accepted, else by the path.
    pub(crate) fn pick(
        orig_dst: Option<Service>,
        accepted_at: Option<Service>,
        headers: &HeaderMap,
        path: &str,
    ) -> Self {
        let orig_dst = orig_dst.filter(|_| holds(Defense::DialectByAddress));
        match orig_dst.or_else(|| service_of_host(headers)).or(accepted_at) {
            Some(Service::PodIdentity) => Self::PodIdentity,
            Some(Service::Ecs) => Self::Ecs,
            None if path == pod_identity::PATH => Self::PodIdentity,
            Some(Service::Imds) | None => Self::Imds,
        }
    }

    /// Its name in logs and metrics.
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::PodIdentity => "pod-identity",
            Self::Imds => "imds",
            Self::Ecs => "ecs",
        }
    }

    /// Renders a refusal.
    pub(crate) fn refuse(self, refusal: &Refusal) -> Response {
        let mut response = match self {
            Self::PodIdentity | Self::Ecs => pod_identity::refuse(refusal),
            Self::Imds => imds::refuse(refusal),
        };
        if let Some(allow) = refusal.allow {
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
        }
        response
    }
}

// === impl Refusal ===

impl Refusal {
    /// A refusal with nothing to allow.
    pub(crate) fn new(
        status: StatusCode,
        code: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) -> Self {
        Self { status, code: code.into(), message: message.into(), allow: None }
    }

    fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", message)
    }
}

/// The service in the client's URL.
fn service_of_host(headers: &HeaderMap) -> Option<Service> {
    let authority: Authority = headers.get(HOST)?.to_str().ok()?.parse().ok()?;
    Service::named(authority.host())
}

/// Whether a proxy passed the request on. An attacker may have tricked a server in the pod into fetching this URL (SSRF).
pub(crate) fn is_forwarded(headers: &HeaderMap) -> bool {
    holds(Defense::Forwarding)
        && [FORWARDED_FOR, FORWARDED, VIA].iter().any(|name| headers.contains_key(name))
}

/// Refuses a forwarded request.
pub(crate) fn forwarded() -> Refusal {
    Refusal::new(
        StatusCode::FORBIDDEN,
        "Forwarded",
        "the request has passed a proxy (X-Forwarded-For, Forwarded or Via): credentials are for the pod that asks \
         by itself",
    )
}

/// A request must name exactly one well-formed host: the rules of Go's HTTP server, on which the EKS Pod Identity Agent
/// is built.
fn check_framing(head: &Parts) -> Result<(), Refusal> {
    let mut hosts = head.headers.get_all(HOST).iter();
    let wrong = match (hosts.next(), hosts.next()) {
        (None, _) if head.version == Version::HTTP_11 => "missing required Host header",
        (Some(_), Some(_)) => "too many Host headers",
        (Some(host), None) if !host.as_bytes().iter().all(|byte| is_host_byte(*byte)) => {
            "malformed Host header"
        }
        _ => return Ok(()),
    };
    Err(Refusal::new(StatusCode::BAD_REQUEST, "BadRequest", format!("400 Bad Request: {wrong}")))
}

fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!$%&'()*+,-.:;=[]_~".contains(&byte)
}

/// Every host that a request names, in its line and in its header: a proxy on the way may read either. Without any: "".
fn hosts(head: &Parts) -> impl Iterator<Item = &str> {
    let header = head.headers.get(HOST).map(|host| host.to_str().unwrap_or(""));
    let line = head.uri.authority().map(Authority::as_str);
    let none = (line.is_none() && header.is_none()).then_some("");
    line.into_iter().chain(header).chain(none)
}

/// A host without its port and without the brackets of an IPv6 address; all of it where Go's `SplitHostPort` finds no
/// port.
fn host_name(host: &str) -> &str {
    let split = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').and_then(|(name, port)| Some((name, port.strip_prefix(':')?))),
        None => host.split_once(':'),
    };
    let name = match split {
        Some((name, port)) if !name.contains(['[', ']']) && !port.contains([':', '[', ']']) => name,
        _ => host,
    };
    name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name)
}

/// Allows GET and HEAD only.
fn check_reads(method: &Method) -> Result<(), Refusal> {
    if matches!(*method, Method::GET | Method::HEAD) { Ok(()) } else { Err(wrong_method("GET, HEAD")) }
}

fn wrong_method(allow: &'static str) -> Refusal {
    let message = format!("only {allow} here");
    let refusal = Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message);
    Refusal { allow: Some(allow), ..refusal }
}

fn respond(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Response {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

#[cfg(test)]
mod tests {
    use hyper::Request;

    use super::*;

    /// The head of a request, for the dialects' tests.
    pub(super) fn head(method: &str, uri: &str, headers: &[(&str, &str)]) -> Parts {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    #[test]
    fn a_wrong_method_is_answered_with_the_allowed_ones() {
        let response = Dialect::Imds.refuse(&wrong_method("PUT"));
        assert_eq!(
            (response.status().as_u16(), &response.headers()["allow"]),
            (405, &HeaderValue::from_static("PUT"))
        );
    }

    #[test]
    fn the_original_destination_decides_then_the_host_then_the_path() {
        const POD_IDENTITY: &str = "/v1/credentials";
        const IMDS: &str = "/latest/api/token";
        let own = Some(Service::PodIdentity);
        for (orig_dst, accepted_at, host, path, dialect) in [
            (Some(Service::Imds), None, "169.254.170.23", POD_IDENTITY, Dialect::Imds),
            (Some(Service::PodIdentity), None, "169.254.169.254", IMDS, Dialect::PodIdentity),
            (Some(Service::Ecs), own, "169.254.170.23", POD_IDENTITY, Dialect::Ecs),
            (None, None, "169.254.169.254", IMDS, Dialect::Imds),
            (None, own, "169.254.169.254", IMDS, Dialect::Imds),
            (None, None, "169.254.169.254:80", POD_IDENTITY, Dialect::Imds),
            (None, None, "[fd00:ec2::254]", POD_IDENTITY, Dialect::Imds),
            (None, None, "169.254.170.23", IMDS, Dialect::PodIdentity),
            (None, None, "[fd00:ec2::23]:80", IMDS, Dialect::PodIdentity),
            (None, None, "169.254.170.2", POD_IDENTITY, Dialect::Ecs),
            (None, None, "localhost", POD_IDENTITY, Dialect::PodIdentity),
            (None, None, "", POD_IDENTITY, Dialect::PodIdentity),
            (None, None, "[", IMDS, Dialect::Imds),
            (None, None, "169.254.175.1", IMDS, Dialect::Imds),
            (None, own, "web.example", IMDS, Dialect::PodIdentity),
            (None, own, "", IMDS, Dialect::PodIdentity),
        ] {
            let head = head("GET", path, &[("host", host)]);
            let picked = Dialect::pick(orig_dst, accepted_at, &head.headers, path);
            assert_eq!(picked, dialect, "{orig_dst:?}, {accepted_at:?}, {host}, {path}");
        }
        assert_eq!(Dialect::pick(None, None, &HeaderMap::new(), POD_IDENTITY), Dialect::PodIdentity);
    }
}
