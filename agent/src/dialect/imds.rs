//! The EC2 instance metadata service, v1 and v2, as far as credentials go.
//!
//! Serves the caller's own role and nothing of the node's: user-data, signatures and the instance's identity
//! do not exist here.

use hyper::{
    HeaderMap, Method, StatusCode,
    header::{HeaderName, HeaderValue, SERVER},
    http::request::Parts,
};
use serde::Serialize;

use super::{Refusal, Response, forwarded, is_forwarded, must_read, respond, wrong_method};
use crate::credentials::Credentials;

const TOKEN_PATH: &str = "/latest/api/token";
const TTL_HEADER: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");
const TOKEN_HEADER: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
/// Six hours.
const TTL_MAX: u32 = 21_600;

/// What a request asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask<'a> {
    /// A session token, good for so many seconds.
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

/// What a read is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadPath<'a> {
    /// The list of roles.
    Roles,
    /// A role's credentials.
    Role(&'a str),
    /// Anything else.
    Other,
}

/// EC2 separates key and value by ` : `; the order of fields is its own too.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Body<'a> {
    code: &'static str,
    last_updated: String,
    r#type: &'static str,
    access_key_id: &'a str,
    secret_access_key: &'a str,
    token: &'a str,
    expiration: String,
}

/// Reads a request's head.
pub fn ask(head: &Parts) -> Result<Ask<'_>, Refusal> {
    let path = head.uri.path();
    if path == TOKEN_PATH {
        if head.method != Method::PUT {
            return Err(wrong_method("PUT"));
        }
        if is_forwarded(&head.headers) {
            return Err(forwarded());
        }
        return Ok(Ask::Token { ttl_secs: ttl(&head.headers)? });
    }
    must_read(&head.method)?;
    let session = head.headers.get(TOKEN_HEADER);
    // A header that is not text is a token that is not valid.
    let session = session.map(|token| token.to_str().unwrap_or(""));
    Ok(Ask::Read { session, path: read_path(path) })
}

/// A session token.
pub fn token(token: String, ttl_secs: u32) -> Response {
    let mut response = served("text/plain", token);
    response.headers_mut().insert(TTL_HEADER, HeaderValue::from(ttl_secs));
    response
}

/// The list of roles: the one, and no newline, which the Rust SDK would take for part of the name.
pub fn roles(credentials: &Credentials) -> Response {
    served("text/plain", credentials.role.name.clone())
}

/// A role's credentials, in the very form that EC2 prints. 404 for a role that is not the caller's.
pub fn role(role: &str, credentials: &Credentials) -> Result<Response, Refusal> {
    if role != credentials.role.name {
        return Err(Refusal::not_found(format!("the role of this pod is {}", credentials.role.name)));
    }
    let body = Body {
        code: "Success",
        last_updated: whole_seconds(credentials.obtained_at),
        r#type: "AWS-HMAC",
        access_key_id: &credentials.access_key_id,
        secret_access_key: credentials.secret_access_key.expose(),
        token: credentials.session_token.expose(),
        expiration: whole_seconds(credentials.expiration),
    };
    let body = pretty(&body);
    // EC2 prints a space before each colon; no value has a quote before a colon in it.
    Ok(served("text/plain", body.replace("\": \"", "\" : \"")))
}

/// Nothing is at this path.
pub fn nothing() -> Refusal {
    Refusal::not_found("podgate serves credentials here, and nothing of the node's own metadata")
}

/// The session token is not, or no longer, this pod's.
pub fn bad_session() -> Refusal {
    Refusal::new(
        StatusCode::UNAUTHORIZED,
        "Unauthorized",
        "the session token is not valid for this pod, or its time is over: ask for a new one",
    )
}

/// IMDSv1 is off for this pod.
pub fn v1_is_off() -> Refusal {
    Refusal::new(
        StatusCode::UNAUTHORIZED,
        "Unauthorized",
        format!(
            "IMDSv1 is off for this pod: use IMDSv2, or allow IMDSv1 with the pod annotation {}: allow",
            crate::policy::ANNOTATION_IMDS_V1
        ),
    )
}

/// A refusal, in EC2's XHTML with the reason added. The connection is closed, as EC2 does.
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

#[expect(clippy::expect_used, reason = "a struct of strings always serializes")]
fn pretty(body: &Body<'_>) -> String {
    serde_json::to_string_pretty(body).expect("BUG: strings always serialize")
}

fn served(content_type: &'static str, body: String) -> Response {
    let mut response = respond(StatusCode::OK, content_type, body);
    response.headers_mut().insert(SERVER, HeaderValue::from_static("EC2ws"));
    response
}

fn ttl(headers: &HeaderMap) -> Result<u32, Refusal> {
    let ttl = headers.get(TTL_HEADER).and_then(|ttl| ttl.to_str().ok()).and_then(|ttl| ttl.parse().ok());
    ttl.filter(|ttl| (1..=TTL_MAX).contains(ttl)).ok_or_else(|| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            "BadRequest",
            format!("{TTL_HEADER} must be there and be 1 to {TTL_MAX}"),
        )
    })
}

fn read_path(path: &str) -> ReadPath<'_> {
    let Some((version, path)) = path.strip_prefix('/').and_then(|path| path.split_once('/')) else {
        return ReadPath::Other;
    };
    if !is_version(version) {
        return ReadPath::Other;
    }
    match path.strip_prefix("meta-data/iam/security-credentials") {
        Some("" | "/") => ReadPath::Roles,
        Some(role) => role.strip_prefix('/').map_or(ReadPath::Other, ReadPath::Role),
        None => ReadPath::Other,
    }
}

/// `latest`, `1.0` or a date.
fn is_version(version: &str) -> bool {
    let date = |version: &str| {
        version.len() == 10
            && version.bytes().enumerate().all(|(place, byte)| match place {
                4 | 7 => byte == b'-',
                _ => byte.is_ascii_digit(),
            })
    };
    matches!(version, "latest" | "1.0") || date(version)
}

/// boto 2 and botocore's strptime take no fraction.
fn whole_seconds(at: jiff::Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dialect::tests::head, testing::credentials as some_credentials};
    use http_body_util::BodyExt as _;

    async fn text(response: Response) -> String {
        let body = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(body.to_vec()).unwrap()
    }

    #[test]
    fn a_session_token_needs_a_sane_life_and_no_proxy() {
        let put = |headers: &[(&str, &str)]| {
            let head = head("PUT", "/latest/api/token", headers);
            ask(&head)
                .map(|ask| ask == Ask::Token { ttl_secs: 60 })
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
        assert_eq!(ask(&head("GET", "/latest/api/token", &[])).unwrap_err().status.as_u16(), 405);
        assert_eq!(ask(&head("POST", "/latest/meta-data/", &[])).unwrap_err().status.as_u16(), 405);
    }

    #[test]
    fn a_read_has_a_session_or_is_imds_v1() {
        let session = |headers: &[(&str, &str)]| {
            let head = head("GET", "/latest/meta-data/iam/security-credentials/", headers);
            let Ask::Read { session, path: ReadPath::Roles } = ask(&head).unwrap() else { panic!() };
            session.map(str::to_owned)
        };
        assert_eq!(session(&[]), None);
        assert_eq!(session(&[("X-aws-ec2-metadata-token", "abc")]), Some("abc".into()));
        assert_eq!(session(&[("X-aws-ec2-metadata-token", "")]), Some(String::new()));
    }

    #[test]
    fn every_spelling_of_the_credential_paths_is_known_and_nothing_else() {
        let cases = [
            ("/latest/meta-data/iam/security-credentials", ReadPath::Roles),
            ("/latest/meta-data/iam/security-credentials/", ReadPath::Roles),
            ("/2024-04-11/meta-data/iam/security-credentials/", ReadPath::Roles),
            ("/1.0/meta-data/iam/security-credentials/web", ReadPath::Role("web")),
            ("/latest/meta-data/iam/security-credentials/a/b", ReadPath::Role("a/b")),
            ("/latest/meta-data/iam/security-credentialsx", ReadPath::Other),
            ("/next/meta-data/iam/security-credentials/", ReadPath::Other),
            ("//latest/meta-data/iam/security-credentials/", ReadPath::Other),
            ("/latest/user-data", ReadPath::Other),
            ("/latest/meta-data/identity-credentials/ec2/security-credentials/ec2-instance", ReadPath::Other),
            ("/", ReadPath::Other),
        ];
        for (path, expected) in cases {
            assert_eq!(read_path(path), expected, "{path}");
        }
    }

    #[tokio::test]
    async fn credentials_read_as_ec2_prints_them() {
        let response = role("web", &some_credentials()).unwrap();
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
        assert_eq!(text(response).await, expected);
        assert_eq!(text(roles(&some_credentials())).await, "web");
        assert_eq!(role("other", &some_credentials()).unwrap_err().status, StatusCode::NOT_FOUND);
    }

    #[tokio::test]
    async fn a_session_token_comes_with_its_life() {
        let response = token("abc".into(), 60);
        assert_eq!(response.headers()["x-aws-ec2-metadata-token-ttl-seconds"], "60");
        assert_eq!(text(response).await, "abc");
    }

    #[tokio::test]
    async fn a_refusal_is_a_page_with_the_reason_and_no_markup_of_others() {
        let response = refuse(&Refusal::new(StatusCode::NOT_FOUND, "NotFound", "<b>&"));
        assert_eq!(response.headers()["connection"], "close");
        let page = text(response).await;
        assert!(page.contains("<title>404 - Not Found</title>") && page.contains("<p>&lt;b&gt;&amp;</p>"));
    }
}
