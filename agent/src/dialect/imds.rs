//! The EC2 instance metadata service, v1 and v2: credentials, and the facts that SDKs need.
//!
//! Owns its requests and responses. Serves the caller's own role and an exact list of facts of the instance: user-data,
//! signatures, addresses and the instance's own identity do not exist here.

use core::net::IpAddr;

use agent_common::defense::{Defense, holds};
use hyper::{
    HeaderMap, Method, StatusCode,
    header::{EXPECT, HeaderName, HeaderValue, ORIGIN, SERVER},
    http::request::Parts,
};
use serde::Serialize;

use super::{
    Refusal, Response, check_framing, check_reads, forwarded, host_name, hosts, is_forwarded, respond,
    wrong_method,
};
use crate::{credentials::Credentials, instance_metadata::Instance};

mod path;

pub(crate) use self::path::{Fact, ReadPath};

const TOKEN_PATH: &str = "/latest/api/token";
const TTL_HEADER: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");
const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
/// Headers that browsers add to the requests of a page.
const PAGE_HEADERS: [HeaderName; 2] =
    [HeaderName::from_static("sec-fetch-site"), HeaderName::from_static("sec-fetch-mode")];
/// The names of the service in EC2's own resolver.
const NAMES: [&str; 2] = ["instance-data", "instance-data.ec2.internal"];
/// Six hours.
const TTL_MAX: u32 = 21_600;
/// An id that IAM never assigns.
const NO_PROFILE_ID: &str = "AIPAAAAAAAAAAAAAAAAAA";

/// A request, parsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request<'a> {
    /// A session token, valid for so many seconds.
    Token {
        /// Seconds, 1 to 21600.
        ttl_secs: u32,
    },
    /// Something to read.
    Read {
        /// The session token; none in IMDSv1.
        session: Option<&'a str>,
        /// What to read.
        path: ReadPath<'a>,
    },
}

/// The fields are in EC2's order.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Role<'a> {
    code: &'static str,
    last_updated: String,
    r#type: &'static str,
    access_key_id: &'a str,
    secret_access_key: &'a str,
    token: &'a str,
    expiration: String,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Info {
    code: &'static str,
    last_updated: String,
    instance_profile_arn: String,
    instance_profile_id: &'static str,
}

/// The fields of EC2's document that SDKs and agents in pods read; the rest is not for pods.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    architecture: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    availability_zone: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance_type: Option<&'a str>,
    region: &'a str,
    version: &'static str,
}

/// Parses a request's head.
pub(crate) fn parse(head: &Parts) -> Result<Request<'_>, Refusal> {
    check_framing(head)?;
    if holds(Defense::WebPages) && is_from_web_page(head) {
        return Err(Refusal::new(
            StatusCode::FORBIDDEN,
            "AccessDenied",
            "requests of web pages, and to other names than an address, instance-data or instance-data.ec2.internal, are \
             not answered: any name may be made to lead here",
        ));
    }
    if head.headers.get(EXPECT).is_some_and(|expect| !expect.is_empty()) {
        return Err(Refusal::new(
            StatusCode::EXPECTATION_FAILED,
            "ExpectationFailed",
            "nothing is expected here: send the request without an Expect header",
        ));
    }
    let path = head.uri.path();
    if path == TOKEN_PATH {
        if head.method != Method::PUT {
            return Err(wrong_method("PUT"));
        }
        if is_forwarded(&head.headers) {
            return Err(forwarded());
        }
        return Ok(Request::Token { ttl_secs: ttl(&head.headers)? });
    }
    check_reads(&head.method)?;
    let session = head.headers.get(TOKEN_HEADER);
    // A header that is not text counts as an invalid token.
    let session = session.map(|token| token.to_str().unwrap_or(""));
    Ok(Request::Read { session, path: ReadPath::parse(path) })
}

/// Whether a browser may have sent the request for a page whose name now resolves to this address (DNS rebinding).
/// Browsers mark every PUT, and send that name as the host. EC2 does not check this; its clients send no such headers,
/// and connect to an address.
fn is_from_web_page(head: &Parts) -> bool {
    let is_marked =
        head.headers.contains_key(ORIGIN) || PAGE_HEADERS.iter().any(|name| head.headers.contains_key(name));
    let is_ours = |host: &str| {
        let name = host_name(host);
        name.is_empty() || name.parse::<IpAddr>().is_ok() || NAMES.contains(&name)
    };
    is_marked || !hosts(head).all(is_ours)
}

/// Renders a session token.
pub(crate) fn token(token: String, ttl_secs: u32) -> Response {
    let mut response = text(token);
    response.headers_mut().insert(TTL_HEADER, HeaderValue::from(ttl_secs));
    response
}

/// Renders what a path has for the owner of these credentials. 404 for a role that is not the caller's.
pub(crate) fn credentials(path: ReadPath<'_>, credentials: &Credentials) -> Result<Response, Refusal> {
    let name = &credentials.role.name;
    match path {
        // One name without a newline, which the Rust SDK would take for part of it.
        ReadPath::Roles => Ok(text(name.clone())),
        ReadPath::Role(asked) if asked == name => Ok(role(credentials)),
        ReadPath::Role(_) => Err(Refusal::not_found(format!("the role of this pod is {name}"))),
        ReadPath::Iam => Ok(listing(path::IAM)),
        ReadPath::Info => Ok(info(credentials)),
        ReadPath::Fact(_) | ReadPath::Listing(_) | ReadPath::Other => Err(not_found()),
    }
}

/// A role's credentials, as EC2 prints them.
fn role(credentials: &Credentials) -> Response {
    let body = Role {
        code: "Success",
        last_updated: whole_seconds(credentials.obtained_at),
        r#type: "AWS-HMAC",
        access_key_id: &credentials.access_key_id,
        secret_access_key: credentials.secret_access_key.expose(),
        token: credentials.session_token.expose(),
        expiration: whole_seconds(credentials.expiration),
    };
    text(pretty(&body))
}

/// The instance profile. A pod has none, so one is named after the role, as is usual.
fn info(credentials: &Credentials) -> Response {
    let role = &credentials.role;
    let info = Info {
        code: "Success",
        last_updated: whole_seconds(credentials.obtained_at),
        instance_profile_arn: format!(
            "arn:{}:iam::{}:instance-profile/{}",
            role.partition, role.account_id, role.name
        ),
        instance_profile_id: NO_PROFILE_ID,
    };
    text(pretty(&info))
}

/// Renders the names in a directory.
pub(crate) fn listing(names: &'static str) -> Response {
    text(names.to_owned())
}

/// Renders a fact of the instance. 404 where the agent has no copy of it.
pub(crate) fn fact(fact: Fact, instance: &Instance) -> Result<Response, Refusal> {
    let known = match fact {
        Fact::Region => instance.region.clone(),
        Fact::Zone => instance.zone.clone(),
        Fact::ZoneId => instance.zone_id.clone(),
        Fact::InstanceId => instance.id.clone(),
        Fact::InstanceType => instance.instance_type.clone(),
        Fact::Domain => instance.domain.clone(),
        Fact::Partition => instance.partition.clone(),
        Fact::Document => document(instance),
    };
    match known {
        Some(known) => Ok(text(known)),
        None => Err(Refusal::not_found(
            "podgate does not know this of the instance: the node's IMDS has not told; AWS_REGION on podgate sets the \
             region",
        )),
    }
}

fn document(instance: &Instance) -> Option<String> {
    let document = Document {
        architecture: instance.architecture.as_deref(),
        availability_zone: instance.zone.as_deref(),
        instance_id: instance.id.as_deref(),
        instance_type: instance.instance_type.as_deref(),
        region: instance.region.as_deref()?,
        version: "2017-09-30",
    };
    Some(pretty(&document))
}

/// There is nothing at this path.
pub(crate) fn not_found() -> Refusal {
    Refusal::not_found("podgate serves credentials here, the region, and little else of the node's metadata")
}

/// The session token is not this pod's, or has expired.
pub(crate) fn bad_session() -> Refusal {
    Refusal::new(
        StatusCode::UNAUTHORIZED,
        "Unauthorized",
        "the session token is not valid for this pod, or its time is over: ask for a new one",
    )
}

/// IMDSv1 is off for this pod.
pub(crate) fn v1_is_off() -> Refusal {
    Refusal::new(
        StatusCode::UNAUTHORIZED,
        "Unauthorized",
        format!(
            "IMDSv1 is off for this pod: use IMDSv2, or allow IMDSv1 with the pod annotation {}: allow",
            crate::policy::ANNOTATION_IMDS_V1
        ),
    )
}

/// Renders a refusal: EC2's XHTML with the reason added. The connection is closed, as EC2 does.
pub(super) fn refuse(refusal: &Refusal) -> Response {
    let status = refusal.status;
    let title = format!("{} - {}", status.as_u16(), status.canonical_reason().unwrap_or("Error"));
    let reason = escape(&refusal.message);
    let body = format!(
        r#"<?xml version="1.0" encoding="iso-8859-1"?>
<!DOCTYPE html PUBLIC "-//W3C//DTD XHTML 1.0 Transitional//EN"
		"http://www.w3.org/TR/xhtml1/DTD/xhtml1-transitional.dtd">
<html xmlns="http://www.w3.org/1999/xhtml" xml:lang="en" lang="en">
 <head>
  <title>{title}</title>
 </head>
 <body>
  <h1>{title}</h1>
  <p>{reason}</p>
 </body>
</html>"#
    );
    let mut response = respond(status, "text/html", body);
    response.headers_mut().insert(SERVER, HeaderValue::from_static("EC2ws"));
    response.headers_mut().insert(hyper::header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// JSON as EC2 prints it, with a space before each colon. No value contains a quote before a colon.
#[expect(clippy::expect_used, reason = "a struct of strings always serializes")]
fn pretty(body: &impl Serialize) -> String {
    let body = serde_json::to_string_pretty(body).expect("BUG: strings always serialize");
    body.replace("\": \"", "\" : \"")
}

fn text(body: String) -> Response {
    let mut response = respond(StatusCode::OK, "text/plain", body);
    response.headers_mut().insert(SERVER, HeaderValue::from_static("EC2ws"));
    response
}

fn ttl(headers: &HeaderMap) -> Result<u32, Refusal> {
    let ttl = headers.get(TTL_HEADER).and_then(|ttl| ttl.to_str().ok());
    let ttl =
        ttl.filter(|ttl| ttl.bytes().all(|byte| byte.is_ascii_digit())).and_then(|ttl| ttl.parse().ok());
    ttl.filter(|ttl| (1..=TTL_MAX).contains(ttl)).ok_or_else(|| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            "BadRequest",
            format!("{TTL_HEADER} must be there and be 1 to {TTL_MAX}"),
        )
    })
}

/// boto 2 and botocore's `strptime` accept no fraction.
pub(super) fn whole_seconds(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dialect::tests::head as any_head, testing::credentials as some_credentials};
    use http_body_util::BodyExt as _;

    fn head(method: &str, path: &str, headers: &[(&str, &str)]) -> Parts {
        any_head(method, path, &[&[("host", "169.254.169.254")], headers].concat())
    }

    async fn body(response: Response) -> String {
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[test]
    fn a_session_token_needs_a_valid_ttl_and_no_proxy() {
        let put = |headers: &[(&str, &str)]| {
            let head = head("PUT", "/latest/api/token", headers);
            parse(&head)
                .map(|request| request == Request::Token { ttl_secs: 60 })
                .map_err(|refusal| refusal.status.as_u16())
        };
        let ttl = "x-aws-ec2-metadata-token-ttl-seconds";
        assert_eq!(put(&[(ttl, "60")]), Ok(true));
        for bad in ["0", "21601", "-1", "x", "", "6 0", "99999999999"] {
            assert_eq!(put(&[(ttl, bad)]), Err(400), "{bad:?}");
        }
        assert_eq!(put(&[]), Err(400));
        for proxy in ["x-forwarded-for", "forwarded", "via"] {
            assert_eq!(put(&[(ttl, "60"), (proxy, "10.0.0.1")]), Err(403), "{proxy}");
        }
        assert_eq!(parse(&head("GET", "/latest/api/token", &[])).unwrap_err().status.as_u16(), 405);
        assert_eq!(parse(&head("POST", "/latest/meta-data/", &[])).unwrap_err().status.as_u16(), 405);
    }

    #[test]
    fn a_web_page_whose_name_resolves_here_gets_nothing() {
        let status = |headers: &[(&str, &str)]| {
            parse(&any_head("GET", "/latest/meta-data/", headers))
                .map_or_else(|no| no.status.as_u16(), |_| 200)
        };
        for host in
            ["169.254.169.254", "169.254.169.254:80", "[fd00:ec2::254]:80", "instance-data", "10.0.0.1"]
        {
            assert_eq!(status(&[("host", host)]), 200, "{host}");
            for header in ["origin", "sec-fetch-site", "sec-fetch-mode"] {
                assert_eq!(status(&[("host", host), (header, "same-origin")]), 403, "{host}: {header}");
            }
        }
        for host in
            ["evil.example", "169.254.169.254.evil.example", "localhost:80", "instance-data.evil.example"]
        {
            assert_eq!(status(&[("host", host)]), 403, "{host}");
        }
        assert_eq!(status(&[]), 400);
        assert_eq!(status(&[("host", "169.254.169.254"), ("host", "169.254.169.254")]), 400);
    }

    #[test]
    fn a_read_has_a_session_or_is_imds_v1() {
        let session = |headers: &[(&str, &str)]| {
            let head = head("GET", "/latest/meta-data/iam/security-credentials/", headers);
            let Request::Read { session, path: ReadPath::Roles } = parse(&head).unwrap() else { panic!() };
            session.map(str::to_owned)
        };
        assert_eq!(session(&[]), None);
        assert_eq!(session(&[("X-aws-ec2-metadata-token", "abc")]), Some("abc".into()));
        assert_eq!(session(&[("X-aws-ec2-metadata-token", "")]), Some(String::new()));
    }

    #[tokio::test]
    async fn credentials_read_as_ec2_prints_them() {
        let response = credentials(ReadPath::Role("web"), &some_credentials()).unwrap();
        assert_eq!(response.headers()["content-type"], "text/plain");
        assert_eq!(response.headers()["server"], "EC2ws");
        let expected = r#"{
  "Code" : "Success",
  "LastUpdated" : "2026-03-17T16:27:34Z",
  "Type" : "AWS-HMAC",
  "AccessKeyId" : "ASIAEXAMPLE",
  "SecretAccessKey" : "secret",
  "Token" : "session",
  "Expiration" : "2026-03-17T22:27:34Z"
}"#;
        assert_eq!(body(response).await, expected);
    }

    #[tokio::test]
    async fn the_role_is_named_and_there_is_no_other() {
        let own = |path| credentials(path, &some_credentials());
        assert_eq!(body(own(ReadPath::Roles).unwrap()).await, "web");
        assert_eq!(body(own(ReadPath::Iam).unwrap()).await, "info\nsecurity-credentials/");
        let info = r#"{
  "Code" : "Success",
  "LastUpdated" : "2026-03-17T16:27:34Z",
  "InstanceProfileArn" : "arn:aws:iam::123456789012:instance-profile/web",
  "InstanceProfileId" : "AIPAAAAAAAAAAAAAAAAAA"
}"#;
        assert_eq!(body(own(ReadPath::Info).unwrap()).await, info);
        for role in ["other", "Web", "web/", ""] {
            assert_eq!(own(ReadPath::Role(role)).unwrap_err().status, StatusCode::NOT_FOUND, "{role:?}");
        }
    }

    #[tokio::test]
    async fn only_known_facts_of_the_instance_are_served() {
        let mut instance = Instance::in_region(Some("us-west-2".into()));
        let read =
            |path, instance: &Instance| fact(path, instance).map_err(|refusal| refusal.status.as_u16());
        assert_eq!(body(read(Fact::Region, &instance).unwrap()).await, "us-west-2");
        assert_eq!(read(Fact::Zone, &instance).unwrap_err(), 404);
        let document = body(read(Fact::Document, &instance).unwrap()).await;
        assert_eq!(document, "{\n  \"region\" : \"us-west-2\",\n  \"version\" : \"2017-09-30\"\n}");

        instance.zone = Some("us-west-2a".into());
        instance.id = Some("i-0".into());
        assert_eq!(body(read(Fact::Zone, &instance).unwrap()).await, "us-west-2a");
        let document = body(read(Fact::Document, &instance).unwrap()).await;
        assert!(
            document.contains("\"availabilityZone\" : \"us-west-2a\",\n  \"instanceId\" : \"i-0\""),
            "{document}"
        );
        assert_eq!(read(Fact::Document, &Instance::default()).unwrap_err(), 404);
    }

    #[tokio::test]
    async fn a_session_token_comes_with_its_ttl() {
        let response = token("abc".into(), 60);
        assert_eq!(response.headers()["x-aws-ec2-metadata-token-ttl-seconds"], "60");
        assert_eq!(body(response).await, "abc");
    }

    #[tokio::test]
    async fn a_refusal_is_a_page_with_the_reason_escaped() {
        let response = refuse(&Refusal::new(StatusCode::NOT_FOUND, "NotFound", "<b>&"));
        assert_eq!(response.headers()["connection"], "close");
        let page = body(response).await;
        assert!(page.contains("<title>404 - Not Found</title>") && page.contains("<p>&lt;b&gt;&amp;</p>"));
    }
}
