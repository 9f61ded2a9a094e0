//! What the servers share of cryptography and no crate has in one call.
//!
//! Owns random bytes and hexadecimal digits. Never holds a key.

use std::fmt::Write as _;

/// Random bytes, fit for keys and tokens.
#[expect(clippy::expect_used, reason = "fails on a programming error only")]
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("BUG: the random number generator does not fail");
    bytes
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
