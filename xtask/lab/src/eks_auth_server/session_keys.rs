//! Access keys in the shape that AWS gives them.
//!
//! Owns randomness and alphabets. Never stores a key.

use base64::{Engine as _, prelude::BASE64_STANDARD};

use crate::crypto::random;

const BASE32: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
const BASE36: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// `ASIA` and 16 characters; 80 random bits make it unique.
pub(super) fn access_key_id() -> String {
    format!("ASIA{}", text(BASE32, 16))
}

/// 40 characters.
pub(super) fn secret_access_key() -> String {
    BASE64_STANDARD.encode(random::<30>())
}

/// As long as real ones are, so that an answer does not fit a small buffer.
pub(super) fn session_token() -> String {
    BASE64_STANDARD.encode(random::<750>())
}

/// An id as EKS gives associations.
pub(super) fn lower_base36(length: usize) -> String {
    text(BASE36, length)
}

fn text(alphabet: &[u8], length: usize) -> String {
    let bytes = random::<32>();
    bytes[..length].iter().map(|byte| char::from(alphabet[usize::from(*byte) % alphabet.len()])).collect()
}
