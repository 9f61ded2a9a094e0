//! Verifies a token's signature against the cluster's keys, a JSON Web Key Set (RFC 7517).
//!
//! Owns the algorithms, each bound to its kind of key: a token cannot choose another. Never fetches the keys, never looks
//! at claims.

use std::collections::HashMap;

use aws_lc_rs::{
    rsa::PublicKeyComponents,
    signature::{
        ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, EcdsaVerificationAlgorithm,
        RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512,
        UnparsedPublicKey,
    },
};
use base64::Engine as _;
use serde::Deserialize;

use super::claims::BASE64;

/// The first byte of an uncompressed point (SEC 1).
const UNCOMPRESSED: u8 = 4;

/// Keys by key id.
#[derive(Debug)]
pub struct KeySet(HashMap<String, Key>);

/// Why a signature does not verify.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is no token.
    #[error("it is malformed")]
    Malformed,
    /// None of the keys has its key id.
    #[error("it is signed with a key that is not the cluster's")]
    UnknownKey,
    /// The key is the cluster's, but the signature does not match.
    #[error("its signature is wrong")]
    WrongSignature,
}

#[derive(Debug)]
enum Key {
    Rsa { modulus: Vec<u8>, exponent: Vec<u8> },
    P256(Vec<u8>),
    P384(Vec<u8>),
}

#[derive(Deserialize)]
struct Jwks {
    keys: Vec<Jwk>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    #[serde(default)]
    kid: String,
    n: Option<String>,
    e: Option<String>,
    crv: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: String,
}

// === impl KeySet ===

impl KeySet {
    /// Parses a key set. Keys of unknown kinds are left out.
    pub fn parse(json: &str) -> Result<Self, serde_json::Error> {
        let Jwks { keys } = serde_json::from_str(json)?;
        let usable = keys.iter().filter_map(|jwk| Some((jwk.kid.clone(), Key::from_jwk(jwk)?)));
        Ok(Self(usable.collect()))
    }

    /// Whether it has no keys.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Verifies that one of the keys has signed the token.
    pub fn verify(&self, token: &str) -> Result<(), Error> {
        let (signed, signature) = token.rsplit_once('.').ok_or(Error::Malformed)?;
        let (header, _) = signed.split_once('.').ok_or(Error::Malformed)?;
        let header = BASE64.decode(header).map_err(|_| Error::Malformed)?;
        let header: Header = serde_json::from_slice(&header).map_err(|_| Error::Malformed)?;
        let signature = BASE64.decode(signature).map_err(|_| Error::Malformed)?;
        let key = self.0.get(&header.kid).ok_or(Error::UnknownKey)?;
        let is_right = key.has_signed(&header.alg, signed.as_bytes(), &signature);
        if is_right { Ok(()) } else { Err(Error::WrongSignature) }
    }
}

// === impl Key ===

impl Key {
    fn from_jwk(jwk: &Jwk) -> Option<Self> {
        let number = |text: &Option<String>| BASE64.decode(text.as_deref()?).ok();
        let point = || Some([vec![UNCOMPRESSED], number(&jwk.x)?, number(&jwk.y)?].concat());
        match (jwk.kty.as_str(), jwk.crv.as_deref()) {
            ("RSA", _) => Some(Self::Rsa { modulus: number(&jwk.n)?, exponent: number(&jwk.e)? }),
            ("EC", Some("P-256")) => point().map(Self::P256),
            ("EC", Some("P-384")) => point().map(Self::P384),
            _ => None,
        }
    }

    fn has_signed(&self, algorithm: &str, message: &[u8], signature: &[u8]) -> bool {
        match (self, algorithm) {
            (Self::Rsa { modulus, exponent }, "RS256" | "RS384" | "RS512") => {
                let parameters = match algorithm {
                    "RS256" => &RSA_PKCS1_2048_8192_SHA256,
                    "RS384" => &RSA_PKCS1_2048_8192_SHA384,
                    _ => &RSA_PKCS1_2048_8192_SHA512,
                };
                let key = PublicKeyComponents { n: modulus, e: exponent };
                key.verify(parameters, message, signature).is_ok()
            }
            (Self::P256(point), "ES256") => ecdsa(&ECDSA_P256_SHA256_FIXED, point, message, signature),
            (Self::P384(point), "ES384") => ecdsa(&ECDSA_P384_SHA384_FIXED, point, message, signature),
            _ => false,
        }
    }
}

fn ecdsa(
    algorithm: &'static EcdsaVerificationAlgorithm,
    point: &[u8],
    message: &[u8],
    signature: &[u8],
) -> bool {
    UnparsedPublicKey::new(algorithm, point).verify(message, signature).is_ok()
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::{
        encoding::AsDer as _,
        rand::SystemRandom,
        rsa::{KeyPair, KeySize},
        signature::{
            ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair,
            EcdsaSigningAlgorithm, KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512,
            RsaSignatureEncoding,
        },
    };
    use serde_json::{Value, json};

    use super::*;

    fn signed(alg: &str, kid: &str, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
        let header = BASE64.encode(json!({"alg": alg, "kid": kid}).to_string());
        let message = format!("{header}.{}", BASE64.encode(r#"{"sub":"x"}"#));
        let signature = BASE64.encode(sign(message.as_bytes()));
        format!("{message}.{signature}")
    }

    fn rsa(pair: &KeyPair, encoding: &'static RsaSignatureEncoding, message: &[u8]) -> Vec<u8> {
        let mut signature = vec![0; pair.public_modulus_len()];
        pair.sign(encoding, &SystemRandom::new(), message, &mut signature).unwrap();
        signature
    }

    fn rsa_jwk(pair: &KeyPair, kid: &str) -> Value {
        let key = pair.public_key();
        assert!(key.as_der().is_ok());
        let number = |bytes: &[u8]| BASE64.encode(bytes);
        json!({"kty": "RSA", "kid": kid, "n": number(key.modulus().big_endian_without_leading_zero()),
            "e": number(key.exponent().big_endian_without_leading_zero())})
    }

    fn ec(algorithm: &'static EcdsaSigningAlgorithm, crv: &str, kid: &str) -> (EcdsaKeyPair, Value) {
        let pair = EcdsaKeyPair::generate(algorithm).unwrap();
        let point = pair.public_key().as_ref()[1..].to_vec();
        let (x, y) = point.split_at(point.len() / 2);
        let jwk = json!({"kty": "EC", "crv": crv, "kid": kid, "x": BASE64.encode(x), "y": BASE64.encode(y)});
        (pair, jwk)
    }

    fn set(keys: &[Value]) -> KeySet {
        KeySet::parse(&json!({"keys": keys}).to_string()).unwrap()
    }

    #[test]
    fn each_algorithm_is_verified_with_its_own_kind_of_key() {
        let pair = KeyPair::generate(KeySize::Rsa2048).unwrap();
        let (p256, jwk256) = ec(&ECDSA_P256_SHA256_FIXED_SIGNING, "P-256", "b");
        let (p384, jwk384) = ec(&ECDSA_P384_SHA384_FIXED_SIGNING, "P-384", "c");
        let keys = set(&[rsa_jwk(&pair, "a"), jwk256, jwk384, json!({"kty": "oct", "kid": "d"})]);
        let by_ec = |pair: &EcdsaKeyPair, message: &[u8]| {
            pair.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec()
        };
        let good = [
            signed("RS256", "a", |message| rsa(&pair, &RSA_PKCS1_SHA256, message)),
            signed("RS384", "a", |message| rsa(&pair, &RSA_PKCS1_SHA384, message)),
            signed("RS512", "a", |message| rsa(&pair, &RSA_PKCS1_SHA512, message)),
            signed("ES256", "b", |message| by_ec(&p256, message)),
            signed("ES384", "c", |message| by_ec(&p384, message)),
        ];
        for token in good {
            assert_eq!(keys.verify(&token), Ok(()), "{token}");
        }
        let wrong = [
            signed("none", "a", |_| vec![]),
            signed("HS256", "a", |message| rsa(&pair, &RSA_PKCS1_SHA256, message)),
            signed("ES256", "a", |message| by_ec(&p256, message)),
            signed("RS256", "b", |message| rsa(&pair, &RSA_PKCS1_SHA256, message)),
            signed("RS512", "a", |message| rsa(&pair, &RSA_PKCS1_SHA256, message)),
        ];
        for token in wrong {
            assert_eq!(keys.verify(&token), Err(Error::WrongSignature), "{token}");
        }
        for kid in ["", "d", "z"] {
            let token = signed("RS256", kid, |message| rsa(&pair, &RSA_PKCS1_SHA256, message));
            assert_eq!(keys.verify(&token), Err(Error::UnknownKey), "{kid}");
        }
    }

    #[test]
    fn not_a_byte_of_a_token_can_be_changed() {
        let pair = KeyPair::generate(KeySize::Rsa2048).unwrap();
        let keys = set(&[rsa_jwk(&pair, "a")]);
        let token = signed("RS256", "a", |message| rsa(&pair, &RSA_PKCS1_SHA256, message));
        for at in 0..token.len() - 1 {
            let mut forged = token.clone().into_bytes();
            forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
            let forged = String::from_utf8(forged).unwrap();
            assert!(keys.verify(&forged).is_err(), "byte {at}");
        }
    }
}
