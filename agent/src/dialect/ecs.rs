//! The ECS credential endpoint, for SDKs older than Pod Identity: a relative URI on 169.254.170.2.
//!
//! Owns its path and its body; what it shares with Pod Identity is `pod_identity`'s.

use core::net::IpAddr;

use agent_common::net::ECS_V4;
use hyper::{StatusCode, http::request::Parts};
use jiff::Timestamp;
use serde::Serialize;

use super::{Refusal, Response, check_framing, check_reads, imds::whole_seconds, pod_identity};
use crate::credentials::{Credentials, token::claims::SentToken};

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Body<'a> {
    role_arn: String,
    access_key_id: &'a str,
    secret_access_key: &'a str,
    token: &'a str,
    expiration: String,
}

/// Parses a request, which is always for credentials: the token that it sent, if any. What follows the path is up to the
/// client.
pub(crate) fn parse(head: &Parts, now: Timestamp) -> Result<Option<SentToken>, Refusal> {
    check_framing(head)?;
    let path = head.uri.path();
    let below = path.strip_prefix(pod_identity::PATH);
    if !below.is_some_and(|below| below.is_empty() || below.starts_with('/')) {
        return Err(Refusal::not_found("credentials are at /v1/credentials"));
    }
    check_reads(&head.method)?;
    pod_identity::check_host(head, &[IpAddr::V4(ECS_V4)])?;
    pod_identity::sent_token(head, now)
}

/// Renders credentials.
pub(crate) fn credentials(credentials: &Credentials) -> Response {
    pod_identity::json(
        StatusCode::OK,
        &Body {
            role_arn: credentials.role.arn(),
            access_key_id: &credentials.access_key_id,
            secret_access_key: credentials.secret_access_key.expose(),
            token: credentials.session_token.expose(),
            expiration: whole_seconds(credentials.expiration),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{dialect::tests::head, testing::credentials as some_credentials};
    use http_body_util::BodyExt as _;

    #[test]
    fn every_uri_below_the_path_is_served() {
        for (path, served) in [
            ("/v1/credentials", true),
            ("/v1/credentials/0c5c", true),
            ("/v1/credentialsx", false),
            ("/v2/credentials", false),
            ("/", false),
        ] {
            let head = head("GET", path, &[("host", "169.254.170.2")]);
            assert_eq!(parse(&head, Timestamp::UNIX_EPOCH).is_ok(), served, "{path}");
        }
        let rebound = head("GET", "/v1/credentials", &[("host", "evil")]);
        assert_eq!(parse(&rebound, Timestamp::UNIX_EPOCH).unwrap_err().status, StatusCode::FORBIDDEN);
    }

    #[tokio::test]
    async fn credentials_name_their_role() {
        let body = credentials(&some_credentials()).into_body().collect().await.unwrap().to_bytes();
        let expected = concat!(
            r#"{"RoleArn":"arn:aws:iam::123456789012:role/web","AccessKeyId":"ASIAEXAMPLE","#,
            r#""SecretAccessKey":"secret","Token":"session","Expiration":"2026-03-17T22:27:34Z"}"#
        );
        assert_eq!(body, expected);
    }
}
