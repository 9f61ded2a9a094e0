//! Parses a service-account token, and checks its times.
//!
//! Owns the checks that need nothing but the token, with the error texts of the EKS Pod Identity Agent (0.1.37), which
//! users search the web for. Signatures are up to `jwks`; never fetches a key.

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use jiff::Timestamp;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::{identity::PodUid, secret::Secret};

/// Longest token that is parsed, in bytes. Real ones have 1 to 2 kB.
pub const MAX_LEN: usize = 16 * 1024;

/// The algorithms that the EKS Pod Identity Agent's library knows; only the name is checked here.
const ALGORITHMS: [&str; 14] = [
    "HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384",
    "ES512", "EdDSA", "none",
];

pub(super) const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new()
        .with_encode_padding(false)
        .with_decode_padding_mode(DecodePaddingMode::RequireNone)
        .with_decode_allow_trailing_bits(true),
);

/// The claims of a token. They count for nothing until the token is verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claims {
    /// The pod that it is bound to.
    pub pod: Option<PodUid>,
    /// Who issued it.
    pub issuer: Option<String>,
    /// Who may accept it.
    pub audiences: Vec<String>,
    /// When it expires; some never do.
    pub expiration: Option<Timestamp>,
}

/// A token that a caller sent: parsed, not verified.
#[derive(Clone, Debug)]
pub struct SentToken {
    /// The token.
    pub token: Secret,
    /// Its claims.
    pub claims: Claims,
}

/// Why a token is refused. The texts are the EKS Pod Identity Agent's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No header, or an empty one.
    #[error("Service account token cannot be empty")]
    Empty,
    /// It is no token.
    #[error("Service account token cannot be parsed: {0}")]
    Malformed(String),
    /// It has expired, or is not valid yet.
    #[error("Service account token failed basic claim validations: {0}")]
    Invalid(&'static str),
}

#[derive(Deserialize)]
struct Payload {
    iss: Option<String>,
    #[serde(rename = "sub")]
    _sub: Option<String>,
    #[serde(rename = "jti")]
    _jti: Option<String>,
    aud: Option<Audience>,
    #[serde(default, deserialize_with = "seconds")]
    exp: Option<i64>,
    #[serde(default, deserialize_with = "seconds")]
    nbf: Option<i64>,
    #[serde(rename = "iat", default, deserialize_with = "seconds")]
    _iat: Option<i64>,
    #[serde(rename = "kubernetes.io", default)]
    kubernetes: Value,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

/// Parses a token, and checks its times.
pub fn read(token: &str, now: Timestamp) -> Result<Claims, Error> {
    if token.is_empty() {
        return Err(Error::Empty);
    }
    let malformed = |what: String| Error::Malformed(format!("token is malformed: {what}"));
    let unverifiable =
        |what| Error::Malformed(format!("token is unverifiable: signing method (alg) is {what}"));
    if token.len() > MAX_LEN {
        return Err(malformed(format!("token is longer than {MAX_LEN} bytes")));
    }
    let mut segments = token.split('.');
    let (Some(header), Some(payload), Some(_signature), None) =
        (segments.next(), segments.next(), segments.next(), segments.next())
    else {
        return Err(malformed("token contains an invalid number of segments".into()));
    };
    let header = decode(header).map_err(|e| malformed(format!("could not base64 decode header: {e}")))?;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&header)
        .map_err(|e| malformed(format!("could not JSON decode header: {}", shape(&e))))?;
    let payload = decode(payload).map_err(|e| malformed(format!("could not base64 decode claim: {e}")))?;
    let payload: Payload = serde_json::from_slice(&payload)
        .map_err(|e| malformed(format!("could not JSON decode claim: {}", shape(&e))))?;
    let algorithm = header.get("alg").and_then(Value::as_str).ok_or_else(|| unverifiable("unspecified"))?;
    if !ALGORITHMS.contains(&algorithm) {
        return Err(unverifiable("unavailable"));
    }
    let expired = payload.exp.is_some_and(|exp| exp <= now.as_second());
    let early = payload.nbf.is_some_and(|nbf| nbf > now.as_second());
    match (expired, early) {
        (false, false) => {
            let pod = payload.kubernetes.pointer("/pod/uid").and_then(Value::as_str);
            let audiences = match payload.aud {
                None => vec![],
                Some(Audience::One(audience)) => vec![audience],
                Some(Audience::Many(audiences)) => audiences,
            };
            let expiration = payload.exp.and_then(|exp| Timestamp::from_second(exp).ok());
            Ok(Claims { pod: pod.and_then(PodUid::parse), issuer: payload.iss, audiences, expiration })
        }
        (true, false) => Err(Error::Invalid("token is expired")),
        (false, true) => Err(Error::Invalid("token is not valid yet")),
        (true, true) => Err(Error::Invalid("token is expired, token is not valid yet")),
    }
}

/// Decodes a segment. The error is Go's: it names the first byte outside the alphabet, else the last one, where that would
/// start a new group.
fn decode(segment: &str) -> Result<Vec<u8>, String> {
    BASE64.decode(segment).map_err(|_| {
        let is_digit = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let at = segment.bytes().position(|byte| !is_digit(byte));
        let at = at.unwrap_or_else(|| segment.len().saturating_sub(1));
        format!("illegal base64 data at input byte {at}")
    })
}

/// Describes a JSON error without quoting the text, which is a secret.
fn shape(error: &serde_json::Error) -> String {
    let what = match error.classify() {
        serde_json::error::Category::Data => "unexpected type",
        serde_json::error::Category::Eof => "unexpected end of JSON input",
        _ => "invalid character",
    };
    format!("{what} at column {}", error.column())
}

/// A JSON number, truncated to whole seconds.
fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<i64>, D::Error> {
    let number = Option::<serde_json::Number>::deserialize(deserializer)?;
    #[expect(clippy::cast_possible_truncation, reason = "a claim out of range saturates: far past or future")]
    Ok(number.map(|number| number.as_i64().unwrap_or_else(|| number.as_f64().unwrap_or(0.0) as i64)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const UID: &str = "0c5cb3f2-7a47-4a4b-8f0c-5b0f6a3d2e11";

    fn now() -> Timestamp {
        Timestamp::from_second(1_000_000).unwrap()
    }

    fn token(header: &Value, payload: &Value) -> String {
        format!("{}.{}.c2ln", BASE64.encode(header.to_string()), BASE64.encode(payload.to_string()))
    }

    fn refusal(token: &str) -> String {
        read(token, now()).unwrap_err().to_string()
    }

    #[test]
    fn a_kubelet_token_is_parsed() {
        let payload = json!({
            "aud": ["pods.eks.amazonaws.com"], "exp": 1_000_060, "nbf": 999_999.5, "iss": "https://oidc",
            "sub": "system:serviceaccount:app:web",
            "kubernetes.io": {"namespace": "app", "pod": {"name": "web-0", "uid": UID},
                              "serviceaccount": {"name": "web", "uid": "x"}},
        });
        let claims = read(&token(&json!({"alg": "RS256"}), &payload), now()).unwrap();
        assert_eq!(claims.pod, PodUid::parse(UID));
        assert_eq!(claims.issuer.as_deref(), Some("https://oidc"));
        assert_eq!(claims.audiences, ["pods.eks.amazonaws.com"]);
    }

    #[test]
    fn every_refusal_has_the_text_of_the_eks_agent() {
        let rs256 = json!({"alg": "RS256"});
        let parsed = "Service account token cannot be parsed: token is";
        let failed = "Service account token failed basic claim validations: token is";
        let cases = [
            (String::new(), "Service account token cannot be empty".to_owned()),
            ("a.b".into(), format!("{parsed} malformed: token contains an invalid number of segments")),
            ("a.b.c.d".into(), format!("{parsed} malformed: token contains an invalid number of segments")),
            (
                format!("Bearer {}", token(&rs256, &json!({}))),
                format!(
                    "{parsed} malformed: could not base64 decode header: illegal base64 data at input byte 6"
                ),
            ),
            (
                token(&json!({}), &json!({})),
                format!("{parsed} unverifiable: signing method (alg) is unspecified"),
            ),
            (
                token(&json!({"alg": "XX"}), &json!({})),
                format!("{parsed} unverifiable: signing method (alg) is unavailable"),
            ),
            (token(&rs256, &json!({"exp": 1_000_000})), format!("{failed} expired")),
            (token(&rs256, &json!({"nbf": 1_000_001})), format!("{failed} not valid yet")),
            (
                token(&rs256, &json!({"nbf": 1_000_001, "exp": 5})),
                format!("{failed} expired, token is not valid yet"),
            ),
        ];
        for (token, text) in cases {
            assert_eq!(refusal(&token), text);
        }
        let claim = "could not JSON decode claim";
        assert!(refusal(&token(&rs256, &json!({"exp": "soon"}))).contains(claim));
        assert!(refusal(&token(&rs256, &json!([]))).contains(claim));
        assert!(refusal("W10.e30.").contains("could not JSON decode header"));
        for (segment, at) in [("!", 0), ("e30=", 3), ("e", 0), ("e30e3", 4), ("e3+e3", 2), ("e30e30é", 6)] {
            let text = format!("could not base64 decode claim: illegal base64 data at input byte {at}");
            assert!(refusal(&format!("e30.{segment}.")).ends_with(&text), "{segment}");
        }
    }

    #[test]
    fn a_refusal_never_quotes_the_token() {
        let secret = token(&json!({"alg": "RS256"}), &json!({"exp": "SECRETVALUE"}));
        assert!(!refusal(&secret).contains("SECRETVALUE"));
    }

    proptest! {
        #[test]
        fn no_token_panics(token in ".{0,200}") {
            let _ = read(&token, now());
        }

        #[test]
        fn no_payload_panics(payload in ".{0,100}") {
            let token = format!("{}.{}.", BASE64.encode(r#"{"alg":"RS256"}"#), BASE64.encode(payload));
            let _ = read(&token, now());
        }
    }
}
