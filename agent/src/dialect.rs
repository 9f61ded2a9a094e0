//! The HTTP contracts that SDKs speak: what a request asks for, and how an answer reads.
//!
//! Owns everything that is seen on the wire; pure functions of a request's head and an outcome. Never does IO,
//! never decides who the caller is or what it may have. The page below has every difference from what podgate stands in
//! for.
//!
#![doc = include_str!("../dialects.md")]

use std::borrow::Cow;

use agent_common::{
    defence::{Defence, holds},
    net::Service,
};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    HeaderMap, Method, StatusCode,
    header::{ALLOW, CONTENT_TYPE, FORWARDED, HOST, HeaderName, HeaderValue, VIA},
    http::uri::Authority,
};

pub mod ecs;
pub mod imds;
pub mod imds_token;
pub mod pod_identity;

/// A whole answer. Its body's length is known, so that each has a `Content-Length`.
pub type Response = hyper::Response<Full<Bytes>>;

/// A contract.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// EKS Pod Identity.
    PodIdentity,
    /// The EC2 instance metadata service.
    Imds,
    /// The ECS credential endpoint.
    Ecs,
}

/// Why a request gets no credentials: what the pod is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The status, which SDKs decide by.
    pub status: StatusCode,
    /// A short name for machines.
    pub code: Cow<'static, str>,
    /// What a person needs to know; never a secret, never another pod.
    pub message: String,
    /// The methods that would be right, where the method was wrong.
    pub allow: Option<&'static str>,
}

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

// === impl Dialect ===

impl Dialect {
    /// The dialect of the service that was dialled; where that is not known, as from behind a sidecar, that of the
    /// service that the request is meant for, by its `Host`, else by its path.
    pub fn pick(dialled: Option<Service>, headers: &HeaderMap, path: &str) -> Self {
        match dialled.or_else(|| meant(headers)) {
            Some(Service::PodIdentity) => Self::PodIdentity,
            Some(Service::Ecs) => Self::Ecs,
            None if path == pod_identity::PATH => Self::PodIdentity,
            Some(Service::Imds) | None => Self::Imds,
        }
    }

    /// Its name in logs and metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::PodIdentity => "pod-identity",
            Self::Imds => "imds",
            Self::Ecs => "ecs",
        }
    }

    /// How it says no.
    pub fn refuse(self, refusal: &Refusal) -> Response {
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
    /// A refusal.
    pub fn new(status: StatusCode, code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { status, code: code.into(), message: message.into(), allow: None }
    }

    fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", message)
    }
}

/// The service that the client has in its URL.
fn meant(headers: &HeaderMap) -> Option<Service> {
    let authority: Authority = headers.get(HOST)?.to_str().ok()?.parse().ok()?;
    Service::named(authority.host())
}

/// Whether a proxy passed the request on. Such a request may be somebody else's, whom a server in the pod was
/// tricked into fetching a URL for.
pub fn is_forwarded(headers: &HeaderMap) -> bool {
    holds(Defence::Forwarding)
        && [FORWARDED_FOR, FORWARDED, VIA].iter().any(|name| headers.contains_key(name))
}

/// The refusal of a request that was forwarded.
pub fn forwarded() -> Refusal {
    Refusal::new(
        StatusCode::FORBIDDEN,
        "Forwarded",
        "the request has passed a proxy (X-Forwarded-For, Forwarded or Via): credentials are for the pod that asks \
         by itself",
    )
}

/// Only GET and HEAD read.
fn must_read(method: &Method) -> Result<(), Refusal> {
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
    use hyper::{Request, http::request::Parts};

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
    fn a_wrong_method_is_told_the_right_ones() {
        let response = Dialect::Imds.refuse(&wrong_method("PUT"));
        assert_eq!(
            (response.status().as_u16(), &response.headers()["allow"]),
            (405, &HeaderValue::from_static("PUT"))
        );
    }

    #[test]
    fn the_address_decides_and_where_it_is_podgate_s_own_the_host_and_the_path() {
        const POD_IDENTITY: &str = "/v1/credentials";
        const IMDS: &str = "/latest/api/token";
        for (dialled, host, path, dialect) in [
            (Some(Service::Imds), "169.254.170.23", POD_IDENTITY, Dialect::Imds),
            (Some(Service::PodIdentity), "169.254.169.254", IMDS, Dialect::PodIdentity),
            (Some(Service::Ecs), "169.254.170.23", POD_IDENTITY, Dialect::Ecs),
            (None, "169.254.169.254", IMDS, Dialect::Imds),
            (None, "169.254.169.254:80", POD_IDENTITY, Dialect::Imds),
            (None, "[fd00:ec2::254]", POD_IDENTITY, Dialect::Imds),
            (None, "169.254.170.23", IMDS, Dialect::PodIdentity),
            (None, "[fd00:ec2::23]:80", IMDS, Dialect::PodIdentity),
            (None, "169.254.170.2", POD_IDENTITY, Dialect::Ecs),
            (None, "localhost", POD_IDENTITY, Dialect::PodIdentity),
            (None, "", POD_IDENTITY, Dialect::PodIdentity),
            (None, "[", IMDS, Dialect::Imds),
            (None, "169.254.175.1", IMDS, Dialect::Imds),
        ] {
            let head = head("GET", path, &[("host", host)]);
            assert_eq!(Dialect::pick(dialled, &head.headers, path), dialect, "{dialled:?}, {host}, {path}");
        }
        assert_eq!(Dialect::pick(None, &HeaderMap::new(), POD_IDENTITY), Dialect::PodIdentity);
    }
}
