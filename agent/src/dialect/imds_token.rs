//! The session tokens of IMDSv2: stateless, bound to the pod.
//!
//! Owns minting and checking them. A token is its expiry and a MAC over that expiry and the pod, so every generation with
//! the key accepts it. It grants nothing by itself: the kernel attests the caller.

use std::fmt;

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::URL_SAFE};
use jiff::Timestamp;

use crate::identity::PodUid;

/// Mints and checks session tokens.
pub struct ImdsTokens(hmac::Key);

/// The expiry in seconds, then the MAC: 40 bytes, which are 56 characters as in a token of EC2.
const LEN: usize = 8 + 32;
/// Separates this MAC from any other under the same key.
const CONTEXT: &[u8] = b"podgate imds session token";

// === impl ImdsTokens ===

impl ImdsTokens {
    /// Tokens under this key.
    pub fn new(key: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// A token for a pod, valid for `ttl_secs`.
    pub fn mint(&self, pod: PodUid, now: Timestamp, ttl_secs: u32) -> String {
        let expiry = now.as_second().saturating_add(ttl_secs.into()).to_be_bytes();
        let mac = hmac::sign(&self.0, &message(expiry, pod));
        URL_SAFE.encode([&expiry, mac.as_ref()].concat())
    }

    /// Whether the token is this pod's and has not expired.
    pub fn is_valid(&self, token: &str, pod: PodUid, now: Timestamp) -> bool {
        let Some((expiry, mac)) = split(token) else { return false };
        hmac::verify(&self.0, &message(expiry, pod), &mac).is_ok()
            && now.as_second() < i64::from_be_bytes(expiry)
    }
}

impl fmt::Debug for ImdsTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ImdsTokens([redacted])")
    }
}

fn message(expiry: [u8; 8], pod: PodUid) -> Vec<u8> {
    [CONTEXT, &expiry, pod.as_bytes()].concat()
}

fn split(token: &str) -> Option<([u8; 8], Vec<u8>)> {
    let bytes = (token.len() <= 128).then(|| URL_SAFE.decode(token).ok()).flatten()?;
    let (expiry, mac) = bytes.split_first_chunk()?;
    (bytes.len() == LEN).then(|| (*expiry, mac.to_vec()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::pod_uid;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn a_token_is_valid_for_its_pod_until_it_expires() {
        let tokens = ImdsTokens::new(&[7; 32]);
        let (pod, other) = (pod_uid(), pod_uid());
        let token = tokens.mint(pod, at(1000), 60);
        assert_eq!(token.len(), 56);
        assert!(token.ends_with("=="));
        assert!(tokens.is_valid(&token, pod, at(1059)));
        assert!(!tokens.is_valid(&token, pod, at(1060)), "expired");
        assert!(!tokens.is_valid(&token, other, at(1001)), "of another pod");
        assert!(!ImdsTokens::new(&[8; 32]).is_valid(&token, pod, at(1001)), "another key");
    }

    #[test]
    fn no_byte_of_a_token_can_be_changed() {
        let tokens = ImdsTokens::new(&[7; 32]);
        let pod = pod_uid();
        let token = URL_SAFE.decode(tokens.mint(pod, at(1000), 60)).unwrap();
        for position in 0..token.len() {
            let mut forged = token.clone();
            forged[position] ^= 1;
            assert!(!tokens.is_valid(&URL_SAFE.encode(&forged), pod, at(1001)), "{position}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_a_token(token in ".{0,140}") {
            prop_assert!(!ImdsTokens::new(&[7; 32]).is_valid(&token, pod_uid(), at(0)));
        }
    }
}
