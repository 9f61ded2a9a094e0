//! EKS Pod Identity, as eks-pod-identity-agent 0.1.37 speaks it.
//!
//! Where podgate differs: GET and HEAD only; errors are JSON `{"code", "message"}`, which lets the Go SDK v1 ask
//! once instead of four times and the Java SDK v1 show the message; a caller without a token may be served.

use core::net::IpAddr;

use agent_common::{
    defence::{Defence, holds},
    net::{POD_IDENTITY_V4, POD_IDENTITY_V6},
};
use hyper::{
    StatusCode,
    header::{AUTHORIZATION, HOST, HeaderName, HeaderValue},
    http::{request::Parts, uri::Authority},
};
use jiff::Timestamp;
use serde::Serialize;

use super::{Refusal, Response, must_read, respond};
use crate::{
    credentials::{
        Credentials,
        jwt::{self, Claims},
    },
    secret::Secret,
};

/// The only path.
pub const PATH: &str = "/v1/credentials";

/// A token that a caller sent, read but not verified.
#[derive(Clone, Debug)]
pub struct SentToken {
    /// The token.
    pub token: Secret,
    /// What it says of itself.
    pub claims: Claims,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Body<'a> {
    access_key_id: &'a str,
    secret_access_key: &'a str,
    token: &'a str,
    account_id: &'a str,
    expiration: String,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    code: &'a str,
    message: &'a str,
}

/// What a request asks: always for credentials, with the token it sent, if any.
pub fn ask(head: &Parts, now: Timestamp) -> Result<Option<SentToken>, Refusal> {
    if head.uri.path() != PATH {
        return Err(Refusal::not_found("404 page not found"));
    }
    must_read(&head.method)?;
    check_host(head, &[IpAddr::V4(POD_IDENTITY_V4), IpAddr::V6(POD_IDENTITY_V6)])?;
    sent_token(head, now)
}

/// The token in `Authorization`, which has no scheme before it. `None` where there is none.
pub(super) fn sent_token(head: &Parts, now: Timestamp) -> Result<Option<SentToken>, Refusal> {
    let Some(value) =
        head.headers.get(AUTHORIZATION).filter(|value| !value.as_bytes().trim_ascii().is_empty())
    else {
        return Ok(None);
    };
    // What is not text is no token either: the empty segment says so in the stock agent's words.
    let token = value.to_str().unwrap_or(".").trim_ascii();
    let claims = jwt::read(token, now).map_err(|error| bad_token(&error))?;
    Ok(Some(SentToken { token: Secret::from(token), claims }))
}

/// The refusal of a request without a token that must have one.
pub fn no_token(hint: &str) -> Refusal {
    let mut refusal = bad_token(&jwt::Error::Empty);
    refusal.message.push_str(hint);
    refusal
}

/// Credentials. The SDKs need no more, and get what the stock agent sends, in its order.
pub fn credentials(credentials: &Credentials) -> Response {
    json(
        StatusCode::OK,
        &Body {
            access_key_id: &credentials.access_key_id,
            secret_access_key: credentials.secret_access_key.expose(),
            token: credentials.session_token.expose(),
            account_id: &credentials.role.account_id,
            expiration: credentials.expiration.to_string(),
        },
    )
}

/// A refusal.
pub(super) fn refuse(refusal: &Refusal) -> Response {
    let mut response = json(refusal.status, &ErrorBody { code: &refusal.code, message: &refusal.message });
    response
        .headers_mut()
        .insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
    response
}

#[expect(clippy::expect_used, reason = "a struct of strings always serializes")]
pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Response {
    let body = serde_json::to_vec(body).expect("BUG: strings and a struct always serialize");
    respond(status, "application/json", body)
}

fn bad_token(error: &jwt::Error) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "InvalidToken", error.to_string())
}

/// A page on the web whose name resolves to our address must not reach us with the browser's help. The stock
/// agent compares text: no other spelling of an address is taken.
pub(super) fn check_host(head: &Parts, addresses: &[IpAddr]) -> Result<(), Refusal> {
    // One in the request line and one in the header, or two headers, must both be right: others may read the other.
    let headers = head.headers.get_all(HOST).iter().map(|host| host.to_str().unwrap_or(""));
    let mut hosts = head.uri.authority().map(Authority::as_str).into_iter().chain(headers).peekable();
    if hosts.peek().is_none() {
        return check_name("", addresses);
    }
    hosts.try_for_each(|host| check_name(host, addresses))
}

fn check_name(host: &str, addresses: &[IpAddr]) -> Result<(), Refusal> {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) && !is_bare_ip6(name) => name,
        _ => host,
    };
    let name = name.trim_matches(['[', ']']);
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    if addresses.iter().any(|address| address == name) || !holds(Defence::HostHeader) {
        return Ok(());
    }
    Err(Refusal::new(
        StatusCode::FORBIDDEN,
        "AccessDenied",
        format!(
            "Access Denied. Called agent through invalid address, please use either [{}] address not {name}",
            addresses.join(" ")
        ),
    ))
}

fn is_bare_ip6(name: &str) -> bool {
    name.contains(':') && !name.ends_with(']')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dialect::tests::head, testing::credentials as some_credentials};
    use http_body_util::BodyExt as _;

    fn refusal(head: &Parts) -> (u16, String) {
        let refusal = ask(head, Timestamp::UNIX_EPOCH).unwrap_err();
        (refusal.status.as_u16(), refusal.message)
    }

    #[test]
    fn the_order_of_checks_is_path_method_host_token() {
        let good = ("host", "169.254.170.23");
        let bad_token = ("authorization", "x");
        let cases = [
            (head("POST", "/v1/credentials/", &[bad_token]), 404, "404 page not found"),
            (head("POST", "/v1/credentials", &[bad_token]), 405, "only GET, HEAD here"),
            (head("GET", "/v1/credentials", &[("host", "evil"), bad_token]), 403, "not evil"),
            (head("GET", "/v1/credentials", &[good, bad_token]), 400, "invalid number of segments"),
        ];
        for (head, status, text) in cases {
            let refusal = refusal(&head);
            assert!(refusal.0 == status && refusal.1.ends_with(text), "{refusal:?}");
        }
        assert!(ask(&head("HEAD", "/v1/credentials?x=y", &[good]), Timestamp::UNIX_EPOCH).unwrap().is_none());
    }

    #[test]
    fn the_host_is_one_of_two_addresses_however_written_by_clients() {
        let ask = |host| ask(&head("GET", PATH, &[("host", host)]), Timestamp::UNIX_EPOCH).is_ok();
        for host in
            ["169.254.170.23", "169.254.170.23:80", "fd00:ec2::23", "[fd00:ec2::23]", "[fd00:ec2::23]:80"]
        {
            assert!(ask(host), "{host}");
        }
        for host in
            ["", "169.254.170.23.", "169.254.169.254", "[FD00:EC2::23]", "localhost", "fd00:ec2:0::23"]
        {
            assert!(!ask(host), "{host}");
        }
    }

    #[test]
    fn every_host_that_a_request_names_must_be_right() {
        let (own, evil) = ("169.254.170.23", "evil");
        for (line, hosts, is_right) in [
            (Some(own), &[][..], true),
            (Some(own), &[own], true),
            (Some(own), &[evil], false),
            (Some(evil), &[own], false),
            (None, &[own, own], true),
            (None, &[own, evil], false),
            (None, &[evil, own], false),
            (None, &[], false),
        ] {
            let uri = line.map_or_else(|| PATH.to_owned(), |line| format!("http://{line}{PATH}"));
            let headers: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            let head = head("GET", &uri, &headers);
            assert_eq!(ask(&head, Timestamp::UNIX_EPOCH).is_ok(), is_right, "{line:?} {hosts:?}");
        }
    }

    #[tokio::test]
    async fn credentials_read_as_the_stock_agent_s() {
        let response = credentials(&some_credentials());
        assert_eq!(response.headers()["content-type"], "application/json");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let expected = concat!(
            r#"{"AccessKeyId":"ASIAEXAMPLE","SecretAccessKey":"secret","Token":"session","#,
            r#""AccountId":"123456789012","Expiration":"2026-03-17T22:27:34Z"}"#
        );
        assert_eq!(body, expected);
    }

    #[tokio::test]
    async fn a_refusal_is_json_with_the_reason() {
        let response = refuse(&Refusal::new(StatusCode::FORBIDDEN, "Code", "why \"so\""));
        assert_eq!(response.headers()["x-content-type-options"], "nosniff");
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert_eq!(body, r#"{"code":"Code","message":"why \"so\""}"#);
    }
}
