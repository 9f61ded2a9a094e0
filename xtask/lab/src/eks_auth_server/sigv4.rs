//! AWS Signature Version 4, the verifying side.
//!
//! Owns the canonical request and the refusals about signatures, worded as AWS words them. Never looks at what is
//! asked. <https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html>

use std::time::Duration;

use aws_lc_rs::{
    digest::{SHA256, digest},
    hmac::{self, HMAC_SHA256, Key},
};
use jiff::{Timestamp, civil::DateTime, tz::TimeZone};

use super::{NodeCredentials, ServiceError};
use crate::{crypto::hex, http::Request};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const SERVICE: &str = "eks-auth";
/// How far the signature's date may be off.
const SKEW: Duration = Duration::from_mins(5);
const DATE_FORMAT: &str = "%Y%m%dT%H%M%SZ";

/// The `Authorization` header, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Authorization<'a> {
    access_key_id: &'a str,
    /// `DATE/REGION/SERVICE/aws4_request`.
    scope: &'a str,
    signed_headers: Vec<&'a str>,
    signature: Vec<u8>,
}

/// Refuses a request that is not signed with these credentials, for this region, now.
pub(super) fn verify(
    request: &Request,
    credentials: &NodeCredentials,
    region: &str,
    now: Timestamp,
) -> Result<(), ServiceError> {
    let missing =
        || ServiceError::forbidden("MissingAuthenticationTokenException", "Missing Authentication Token");
    let header = request.header("authorization").ok_or_else(missing)?;
    let authorization = parse(header).ok_or_else(|| {
        let message =
            "Authorization header requires 'Credential', 'SignedHeaders' and 'Signature' parameters.";
        ServiceError::forbidden("IncompleteSignatureException", message)
    })?;
    let session_token = request.header("x-amz-security-token").unwrap_or_default();
    if authorization.access_key_id != credentials.access_key_id || session_token != credentials.session_token
    {
        let message = "The security token included in the request is invalid.";
        return Err(ServiceError::forbidden("UnrecognizedClientException", message));
    }
    let date = request.header("x-amz-date").ok_or_else(missing)?;
    check_date(date, now)?;
    let day = date.get(..8).unwrap_or_default();
    let scope = format!("{day}/{region}/{SERVICE}/aws4_request");
    if authorization.scope != scope {
        let message = format!("Credential should be scoped to {scope}, not {}.", authorization.scope);
        return Err(ServiceError::forbidden("InvalidSignatureException", message));
    }
    for required in ["host", "x-amz-date", "x-amz-security-token"] {
        if !authorization.signed_headers.contains(&required) {
            let message = format!("'{required}' must be a 'SignedHeader' in the AWS Authorization.");
            return Err(ServiceError::forbidden("InvalidSignatureException", message));
        }
    }
    let canonical = canonical_request(request, &authorization.signed_headers);
    let string_to_sign = format!("{ALGORITHM}\n{date}\n{scope}\n{}", sha256(canonical.as_bytes()));
    let key = signing_key(&credentials.secret_access_key, [day, region, SERVICE, "aws4_request"]);
    hmac::verify(&key, string_to_sign.as_bytes(), &authorization.signature).map_err(|_| {
        let message = "The request signature we calculated does not match the signature you provided. Check your AWS \
                       Secret Access Key and signing method. Consult the service documentation for details.";
        ServiceError::forbidden("InvalidSignatureException", message)
    })
}

fn parse(header: &str) -> Option<Authorization<'_>> {
    let fields = header.strip_prefix(ALGORITHM)?.strip_prefix(' ')?;
    let field = |name: &str| {
        let mut fields = fields.split(',').map(str::trim);
        fields.find_map(|field| field.strip_prefix(name)?.strip_prefix('='))
    };
    let (access_key_id, scope) = field("Credential")?.split_once('/')?;
    let signed_headers = field("SignedHeaders")?.split(';').collect();
    Some(Authorization { access_key_id, scope, signed_headers, signature: unhex(field("Signature")?)? })
}

fn check_date(date: &str, now: Timestamp) -> Result<(), ServiceError> {
    let refuse = |message: String| Err(ServiceError::forbidden("InvalidSignatureException", message));
    let signed_at = DateTime::strptime(DATE_FORMAT, date).and_then(|date| date.to_zoned(TimeZone::UTC));
    let Ok(signed_at) = signed_at.map(|zoned| zoned.timestamp()) else {
        let message = format!("Date must be in ISO-8601 'basic format'. Got '{date}'.");
        return Err(ServiceError::forbidden("IncompleteSignatureException", message));
    };
    let print = |time: Timestamp| time.strftime(DATE_FORMAT).to_string();
    let (earliest, latest) = (now - SKEW, now + SKEW);
    if signed_at < earliest {
        let (earliest, now) = (print(earliest), print(now));
        return refuse(format!("Signature expired: {date} is now earlier than {earliest} ({now} - 5 min.)"));
    }
    if signed_at > latest {
        let (latest, now) = (print(latest), print(now));
        return refuse(format!(
            "Signature not yet current: {date} is still later than {latest} ({now} + 5 min.)"
        ));
    }
    Ok(())
}

fn canonical_request(request: &Request, signed_headers: &[&str]) -> String {
    let mut query: Vec<&str> = request.query.split('&').filter(|pair| !pair.is_empty()).collect();
    query.sort_unstable();
    let header = |name: &&str| {
        let values: Vec<String> = request
            .headers
            .get_all(*name)
            .iter()
            .map(|value| {
                String::from_utf8_lossy(value.as_bytes()).split_whitespace().collect::<Vec<_>>().join(" ")
            })
            .collect();
        format!("{name}:{}\n", values.join(","))
    };
    let headers: String = signed_headers.iter().map(header).collect();
    [
        request.method.as_str(),
        &encode_path(&request.path),
        &query.join("&"),
        &headers,
        &signed_headers.join(";"),
        &sha256(&request.body),
    ]
    .join("\n")
}

/// The path as sent, encoded once more, as every service but S3 has it.
fn encode_path(path: &str) -> String {
    path.bytes().fold(String::new(), |text, byte| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
            text + &char::from(byte).to_string()
        }
        _ => text + &format!("%{byte:02X}"),
    })
}

fn signing_key(secret: &str, scope: [&str; 4]) -> Key {
    let start = Key::new(HMAC_SHA256, format!("AWS4{secret}").as_bytes());
    scope.iter().fold(start, |key, part| Key::new(HMAC_SHA256, hmac::sign(&key, part.as_bytes()).as_ref()))
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|digit| digit.to_digit(16).and_then(|value| u8::try_from(value).ok())).collect();
    Some(digits?.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use hyper::{HeaderMap, Method, header::HeaderValue};

    use super::*;

    type Change = fn(&mut Request);

    const NOW: &str = "2026-11-21T09:00:00Z";
    const SIGNED_HEADERS: &str = "host;x-amz-date;x-amz-security-token";

    fn credentials() -> NodeCredentials {
        NodeCredentials {
            access_key_id: "ASIANODE".into(),
            secret_access_key: "secret".into(),
            session_token: "session".into(),
        }
    }

    /// A request signed at `date` with the headers named.
    fn signed(date: &str, signed_headers: &str) -> Request {
        let mut headers = HeaderMap::new();
        headers.insert("host", HeaderValue::from_static("eks-auth.lab"));
        headers.insert("x-amz-date", HeaderValue::from_str(date).unwrap());
        headers.insert("x-amz-security-token", HeaderValue::from_static("session"));
        let mut request = Request {
            method: Method::POST,
            path: "/clusters/lab/assume-role-for-pod-identity".into(),
            query: String::new(),
            headers,
            body: Bytes::from_static(b"{}"),
            client_certificate: None,
        };
        let names: Vec<&str> = signed_headers.split(';').collect();
        let scope = format!("{}/eu-west-1/{SERVICE}/aws4_request", &date[..8]);
        let canonical = sha256(canonical_request(&request, &names).as_bytes());
        let key = signing_key("secret", [&date[..8], "eu-west-1", SERVICE, "aws4_request"]);
        let signature = hmac::sign(&key, format!("{ALGORITHM}\n{date}\n{scope}\n{canonical}").as_bytes());
        let header = format!(
            "{ALGORITHM} Credential=ASIANODE/{scope}, SignedHeaders={signed_headers}, Signature={}",
            hex(signature.as_ref())
        );
        request.headers.insert("authorization", HeaderValue::from_str(&header).unwrap());
        request
    }

    fn verdict(request: &Request) -> Result<(), String> {
        let verdict = verify(request, &credentials(), "eu-west-1", NOW.parse().unwrap());
        verdict.map_err(|error| format!("{}: {}", error.code, error.message))
    }

    #[test]
    fn an_altered_request_is_refused() {
        let alter = |change: Change| {
            let mut request = signed("20261121T090000Z", SIGNED_HEADERS);
            change(&mut request);
            verdict(&request)
        };
        assert_eq!(alter(|_| {}), Ok(()));
        let changes: [(&str, Change); 5] = [
            ("body", |request| request.body = Bytes::from_static(b"{ }")),
            ("path", |request| request.path = "/clusters/other/assume-role-for-pod-identity".into()),
            ("query", |request| request.query = "a=b".into()),
            ("method", |request| request.method = Method::GET),
            ("host", |request| {
                request.headers.insert("host", HeaderValue::from_static("elsewhere"));
            }),
        ];
        for (case, change) in changes {
            let refusal = alter(change).unwrap_err();
            let expected = "InvalidSignatureException: The request signature we calculated";
            assert!(refusal.starts_with(expected), "{case}: {refusal}");
        }
        let missing = alter(|request| {
            request.headers.remove("authorization");
        });
        assert!(missing.unwrap_err().starts_with("MissingAuthenticationTokenException"));
    }

    #[test]
    fn a_signature_is_good_for_five_minutes_around_its_date() {
        for (date, refusal) in [
            ("20261121T085500Z", None),
            ("20261121T090500Z", None),
            (
                "20261121T085459Z",
                Some("Signature expired: 20261121T085459Z is now earlier than 20261121T085500Z"),
            ),
            ("20261121T090501Z", Some("Signature not yet current")),
        ] {
            let found = verdict(&signed(date, SIGNED_HEADERS)).err();
            let as_expected = match (&found, refusal) {
                (None, None) => true,
                (Some(found), Some(refusal)) => found.contains(refusal),
                _ => false,
            };
            assert!(as_expected, "{date}: {found:?}");
        }
    }

    #[test]
    fn what_must_be_signed_may_not_be_left_out() {
        for (signed_headers, missing) in [
            ("x-amz-date;x-amz-security-token", "host"),
            ("host;x-amz-security-token", "x-amz-date"),
            ("host;x-amz-date", "x-amz-security-token"),
        ] {
            let refusal = verdict(&signed("20261121T090000Z", signed_headers)).unwrap_err();
            assert!(refusal.contains(&format!("'{missing}' must be a 'SignedHeader'")), "{refusal}");
        }
    }
}
