//! Service-account tokens: RS256 JSON web tokens in the shape a Kubernetes API server gives them.
//!
//! Owns keys, encoding and signatures. Never decides whether a token is acceptable: its readers do.

use aws_lc_rs::{
    digest::{SHA256, digest},
    encoding::AsDer as _,
    rand::SystemRandom,
    rsa::{KeyPair, KeySize},
    signature::{KeyPair as _, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_SHA256, UnparsedPublicKey},
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::crypto::hex;

/// The claims of a service-account token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Audiences.
    pub aud: Vec<String>,
    /// Expiry, seconds since 1970.
    pub exp: i64,
    /// Issued at, seconds since 1970.
    pub iat: i64,
    /// Issuer of the cluster.
    pub iss: String,
    /// Unique id of the token.
    pub jti: String,
    /// What Kubernetes says about the token.
    #[serde(rename = "kubernetes.io")]
    pub kubernetes: KubernetesClaims,
    /// Not valid before, seconds since 1970.
    pub nbf: i64,
    /// `system:serviceaccount:NAMESPACE:NAME`.
    pub sub: String,
}

/// The private claim `kubernetes.io`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KubernetesClaims {
    /// Namespace of the service account and the pod.
    pub namespace: String,
    /// Node of the bound pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<ObjectClaim>,
    /// The pod the token is bound to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<ObjectClaim>,
    /// The service account.
    pub serviceaccount: ObjectClaim,
    /// When a token with a prolonged life was meant to expire, seconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warnafter: Option<i64>,
}

/// An object named in a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectClaim {
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
}

/// A key pair that signs tokens. A second one makes forged tokens.
#[derive(Debug)]
pub struct SigningKey {
    pair: KeyPair,
    id: String,
}

/// Why a token could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// Not a token of this shape at all.
    Malformed,
    /// Signed with a key that is not ours, by its id.
    UnknownKey,
    /// The signature is not that of the claims.
    BadSignature,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: String,
}

// === impl SigningKey ===

impl SigningKey {
    /// A new 2048-bit key.
    ///
    /// # Panics
    /// If the random number generator fails.
    #[expect(clippy::expect_used, reason = "fails on a programming error only")]
    pub fn generate() -> Self {
        let pair = KeyPair::generate(KeySize::Rsa2048).expect("BUG: 2048 bits is a legal size");
        let der = pair.public_key().as_der().expect("BUG: a generated key has an encoding");
        let id = hex(&digest(&SHA256, der.as_ref()).as_ref()[..20]);
        Self { pair, id }
    }

    /// A new key that pretends to be this one: the same id, another signature.
    #[must_use]
    pub fn forge(&self) -> Self {
        Self { id: self.id.clone(), ..Self::generate() }
    }

    /// The key's id: 40 hexadecimal digits, as EKS has them.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A signed token.
    ///
    /// # Panics
    /// If the random number generator fails.
    #[expect(clippy::expect_used, reason = "fails on a programming error only")]
    pub fn sign(&self, claims: &Claims) -> String {
        let header = json!({"alg": "RS256", "kid": self.id});
        let claims = serde_json::to_vec(claims).expect("BUG: claims are plain data");
        let signed = format!("{}.{}", encode(header.to_string().as_bytes()), encode(&claims));
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.pair
            .sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature)
            .expect("BUG: the buffer has the size of the modulus");
        format!("{signed}.{}", encode(&signature))
    }

    /// The claims of a token whose signature is this key's. Says nothing about time, audience or binding.
    pub fn verify(&self, token: &str) -> Result<Claims, Error> {
        let (signed, signature) = token.rsplit_once('.').ok_or(Error::Malformed)?;
        let (header, claims) = signed.split_once('.').ok_or(Error::Malformed)?;
        let header: Header = serde_json::from_slice(&decode(header)?).map_err(|_| Error::Malformed)?;
        if header.alg != "RS256" || header.kid != self.id {
            return Err(Error::UnknownKey);
        }
        UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, self.pair.public_key().as_ref())
            .verify(signed.as_bytes(), &decode(signature)?)
            .map_err(|_| Error::BadSignature)?;
        serde_json::from_slice(&decode(claims)?).map_err(|_| Error::Malformed)
    }

    /// The public key, as one of a JSON web key set.
    pub fn jwk(&self) -> Value {
        let key = self.pair.public_key();
        json!({
            "use": "sig",
            "kty": "RSA",
            "kid": self.id,
            "alg": "RS256",
            "n": encode(key.modulus().big_endian_without_leading_zero()),
            "e": encode(key.exponent().big_endian_without_leading_zero()),
        })
    }
}

fn encode(bytes: &[u8]) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

fn decode(text: &str) -> Result<Vec<u8>, Error> {
    BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| Error::Malformed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims() -> Claims {
        Claims {
            aud: vec!["a".into()],
            exp: 2,
            iat: 1,
            iss: "i".into(),
            jti: "j".into(),
            kubernetes: KubernetesClaims {
                namespace: "app".into(),
                node: None,
                pod: Some(ObjectClaim { name: "p".into(), uid: "u".into() }),
                serviceaccount: ObjectClaim { name: "s".into(), uid: "v".into() },
                warnafter: None,
            },
            nbf: 1,
            sub: "system:serviceaccount:app:s".into(),
        }
    }

    #[test]
    fn only_the_own_signature_over_the_very_claims_is_accepted() {
        let key = SigningKey::generate();
        let token = key.sign(&claims());
        assert_eq!(key.verify(&token), Ok(claims()));

        let mut other = claims();
        other.kubernetes.namespace = "prod".into();
        let part = |token: &str, at: usize| token.split('.').nth(at).unwrap().to_owned();
        let altered = format!("{}.{}.{}", part(&token, 0), part(&key.sign(&other), 1), part(&token, 2));
        let none = format!("{}.{}.", encode(br#"{"alg":"none"}"#), part(&token, 1));
        for (case, token, error) in [
            ("altered claims", altered, Error::BadSignature),
            ("forged with the same key id", key.forge().sign(&claims()), Error::BadSignature),
            ("another key", SigningKey::generate().sign(&claims()), Error::UnknownKey),
            ("no signature", none, Error::UnknownKey),
            ("no token", "abc".into(), Error::Malformed),
        ] {
            assert_eq!(key.verify(&token), Err(error), "{case}");
        }
    }

    #[test]
    fn the_public_key_is_that_of_the_key_that_signed() {
        let key = SigningKey::generate();
        let public = key.jwk();
        let jwk = |name: &str| public[name].as_str().unwrap().to_owned();
        let components = aws_lc_rs::signature::RsaPublicKeyComponents {
            n: decode(&jwk("n")).unwrap(),
            e: decode(&jwk("e")).unwrap(),
        };
        let token = key.sign(&claims());
        let (signed, signature) = token.rsplit_once('.').unwrap();
        components
            .verify(&RSA_PKCS1_2048_8192_SHA256, signed.as_bytes(), &decode(signature).unwrap())
            .unwrap();
        assert_eq!(jwk("kid").len(), 40);
    }
}
