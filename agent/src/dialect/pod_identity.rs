//! EKS Pod Identity, as eks-pod-identity-agent 0.1.37 speaks it; `dialects.md` lists every difference and its reason.
//!
//! Owns the order of checks and the texts of refusals; never decides whether a token is genuine.

use core::net::IpAddr;

use agent_common::{
    defense::{Defense, holds},
    net::{POD_IDENTITY_V4, POD_IDENTITY_V6},
};
use hyper::{
    StatusCode,
    header::{AUTHORIZATION, HeaderName, HeaderValue},
    http::request::Parts,
};
use jiff::Timestamp;
use serde::Serialize;

use super::{Refusal, Response, check_framing, check_reads, host_name, hosts, respond};
use crate::{
    credentials::{
        Credentials,
        token::claims::{self, SentToken},
    },
    secret::Secret,
};

/// The only path.
pub(crate) const PATH: &str = "/v1/credentials";
/// How much of a wrong host is quoted: the longest DNS name.
const HOST_QUOTED_MAX: usize = 255;

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

/// Parses a request, which is always for credentials: the token that it sent, if any.
pub(crate) fn parse(head: &Parts, now: Timestamp) -> Result<Option<SentToken>, Refusal> {
    check_framing(head)?;
    if head.uri.path() != PATH {
        return Err(Refusal::not_found("404 page not found"));
    }
    check_reads(&head.method)?;
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
    // Bytes that are not text make no token; the reader says where they begin.
    let token = String::from_utf8_lossy(value.as_bytes().trim_ascii());
    let claims = claims::read(&token, now).map_err(|error| bad_token(&error))?;
    Ok(Some(SentToken { token: Secret::from(&*token), claims }))
}

/// Refuses a request that must have a token and has none.
pub(crate) fn no_token(hint: &str) -> Refusal {
    let mut refusal = bad_token(&claims::Error::Empty);
    refusal.message.push_str(hint);
    refusal
}

/// Renders credentials: the fields of the EKS Pod Identity Agent, in its order.
pub(crate) fn credentials(credentials: &Credentials) -> Response {
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

/// Renders a refusal.
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

fn bad_token(error: &claims::Error) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "InvalidToken", error.to_string())
}

/// A web page whose name resolves to podgate's address must not reach it through a browser (DNS rebinding). As with the
/// EKS Pod Identity Agent, the text of the address is compared: no other spelling of it is accepted.
pub(super) fn check_host(head: &Parts, addresses: &[IpAddr]) -> Result<(), Refusal> {
    hosts(head).try_for_each(|host| check_name(host, addresses))
}

fn check_name(host: &str, addresses: &[IpAddr]) -> Result<(), Refusal> {
    let name = host_name(host);
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    if addresses.iter().any(|address| address == name) || !holds(Defense::HostHeader) {
        return Ok(());
    }
    Err(Refusal::new(
        StatusCode::FORBIDDEN,
        "AccessDenied",
        format!(
            "Access Denied. Called agent through invalid address, please use either [{}] address not {}",
            addresses.join(" "),
            name.get(..HOST_QUOTED_MAX).unwrap_or(name)
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dialect::tests::head, testing::credentials as some_credentials};
    use http_body_util::BodyExt as _;

    fn refusal(head: &Parts) -> (u16, String) {
        let refusal = parse(head, Timestamp::UNIX_EPOCH).unwrap_err();
        (refusal.status.as_u16(), refusal.message)
    }

    #[test]
    fn the_order_of_checks_is_hosts_path_method_host_token() {
        let (good, evil) = (("host", "169.254.170.23"), ("host", "evil"));
        let bad_token = ("authorization", "x");
        let cases = [
            (head("POST", "/v1/credentials/", &[bad_token]), 400, "missing required Host header"),
            (head("POST", "/v1/credentials/", &[evil, bad_token]), 404, "404 page not found"),
            (head("POST", "/v1/credentials", &[evil, bad_token]), 405, "only GET, HEAD here"),
            (head("GET", "/v1/credentials", &[evil, bad_token]), 403, "not evil"),
            (head("GET", "/v1/credentials", &[good, bad_token]), 400, "invalid number of segments"),
        ];
        for (head, status, text) in cases {
            let refusal = refusal(&head);
            assert!(refusal.0 == status && refusal.1.ends_with(text), "{refusal:?}");
        }
        assert!(
            parse(&head("HEAD", "/v1/credentials?x=y", &[good]), Timestamp::UNIX_EPOCH).unwrap().is_none()
        );
    }

    #[test]
    fn the_host_is_one_of_two_addresses_as_for_the_eks_agent() {
        let status = |host| match parse(&head("GET", PATH, &[("host", host)]), Timestamp::UNIX_EPOCH) {
            Ok(_) => 200,
            Err(refusal) => refusal.status.as_u16(),
        };
        for host in [
            "169.254.170.23",
            "169.254.170.23:80",
            "169.254.170.23:",
            "169.254.170.23:http",
            "[169.254.170.23]",
            "fd00:ec2::23",
            "[fd00:ec2::23]",
            "[fd00:ec2::23]:80",
        ] {
            assert_eq!(status(host), 200, "{host}");
        }
        for host in [
            "",
            "169.254.170.23.",
            "169.254.169.254",
            "169.254.170.23:80:80",
            "[169.254.170.23",
            "169.254.170.23]:80",
            "[169.254.170.23]]:80",
            "[FD00:EC2::23]",
            "fd00:ec2:0::23",
            "fd00:ec2::23:80",
            "localhost",
        ] {
            assert_eq!(status(host), 403, "{host}");
        }
        for host in ["169.254.170.23 ,evil", "169.254.170.23/", "\u{e9}"] {
            assert_eq!(status(host), 400, "{host}");
        }
    }

    #[test]
    fn every_host_that_a_request_names_must_be_right() {
        let (own, evil) = ("169.254.170.23", "evil");
        for (line, hosts, status) in [
            (Some(own), &[own][..], 200),
            (Some(own), &[evil], 403),
            (Some(evil), &[own], 403),
            (Some(own), &[], 400),
            (None, &[own, own], 400),
            (None, &[own, evil], 400),
            (None, &[], 400),
        ] {
            let uri = line.map_or_else(|| PATH.to_owned(), |line| format!("http://{line}{PATH}"));
            let headers: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            let mut head = head("GET", &uri, &headers);
            let answer = |head: &Parts| match parse(head, Timestamp::UNIX_EPOCH) {
                Ok(_) => 200,
                Err(refusal) => refusal.status.as_u16(),
            };
            assert_eq!(answer(&head), status, "{line:?} {hosts:?}");
            // HTTP/1.0 need not name one, and is refused for it later.
            head.version = http::Version::HTTP_10;
            let status = match (line, hosts) {
                (Some(_), []) => 200,
                (None, []) => 403,
                _ => status,
            };
            assert_eq!(answer(&head), status, "HTTP/1.0 {line:?} {hosts:?}");
        }
    }

    #[test]
    fn a_token_that_is_not_text_is_refused_with_the_position() {
        let mut head = head("GET", PATH, &[("host", "169.254.170.23")]);
        head.headers.insert(AUTHORIZATION, HeaderValue::from_bytes(b"e30\xff.e30.").unwrap());
        assert!(refusal(&head).1.ends_with("illegal base64 data at input byte 3"), "{:?}", refusal(&head));
    }

    #[tokio::test]
    async fn credentials_read_as_those_of_the_eks_agent() {
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
