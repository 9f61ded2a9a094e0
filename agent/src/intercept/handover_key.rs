//! The key by which two agents of a node know each other when credentials change hands.
//!
//! Owns where it is: with the programs effective, in a map that is pinned nowhere. So the agent whose programs are
//! effective has it, and whoever is the node's root and loads programs; a pod that reaches the pins does not. Never on
//! disk.

use std::{fmt, io, path::Path};

use agent_common::abi::program;
use aws_lc_rs::hmac;
use zeroize::Zeroizing;

use super::{Error, object::Object, pins};
use crate::bpf::{Link, retained};

/// Name of the map with the key, the same for every ABI.
const MAP: &str = "HANDOVER_KEY";
const LENGTH: usize = 32;

/// 256 bits, made anew by each agent.
#[derive(Clone)]
pub struct HandoverKey(Zeroizing<[u8; LENGTH]>);

// === impl HandoverKey ===

impl HandoverKey {
    /// A fresh one, from the kernel's random numbers.
    pub fn random() -> Result<Self, Error> {
        let mut key = Zeroizing::new([0; LENGTH]);
        getrandom::fill(&mut *key).map_err(Error::Randomness)?;
        Ok(Self(key))
    }

    /// For HMAC with SHA-256.
    pub fn hmac(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &*self.0)
    }

    /// Has it retained by a program that stays with the pins.
    pub(super) fn retain(&self, object: &Object) -> Result<(), Error> {
        let retained = retained::retain(object.program(program::CONNECT4)?, MAP, *self.0);
        retained.map_err(|source| Error::Map { action: "making", map: MAP, source: source.into() })
    }
}

impl fmt::Debug for HandoverKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HandoverKey(redacted)")
    }
}

/// The key of the agent whose programs are effective, of whatever ABI; `None` where there are none that have one.
pub fn handover_key(bpffs: &Path) -> Result<Option<HandoverKey>, Error> {
    let pins = pins::all(bpffs).map_err(|source| Error::Pin { path: bpffs.to_owned(), source })?;
    for pin in pins.iter().filter(|pin| pin.ends_with(Path::new(pins::LINKS).join(program::CONNECT4))) {
        let found = Link::open(pin).and_then(|link| retained::retained(&link, MAP));
        let failed = |source: io::Error| Error::Map { action: "reading", map: MAP, source: source.into() };
        if let Some(key) = found.map_err(failed)? {
            return Ok(Some(HandoverKey(Zeroizing::new(key))));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_random_and_not_printed() {
        let (one, other) = (HandoverKey::random().unwrap(), HandoverKey::random().unwrap());
        assert_ne!(*one.0, *other.0);
        assert_eq!(format!("{one:?}"), "HandoverKey(redacted)");
    }
}
