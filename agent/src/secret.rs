//! A string that must not be seen: it prints as `[redacted]` and is read by [`Secret::expose`] alone.

use std::fmt;

use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use zeroize::Zeroizing;

/// A token, key or signature. Overwritten when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Box<str>>);

// === impl Secret ===

impl Secret {
    /// The secret itself, for the one place that sends it where it belongs.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Its SHA-256, by which it is known again without being kept.
    pub fn digest(&self) -> [u8; SHA256_OUTPUT_LEN] {
        let mut sum = [0; SHA256_OUTPUT_LEN];
        sum.copy_from_slice(digest(&SHA256, self.expose().as_bytes()).as_ref());
        sum
    }
}

impl<T: Into<Box<str>>> From<T> for Secret {
    fn from(value: T) -> Self {
        Self(Zeroizing::new(value.into()))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_does_not_print() {
        assert_eq!(format!("{:?}", Secret::from("hunter2")), "[redacted]");
    }
}
