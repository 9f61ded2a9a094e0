//! The secrets of one handover: who proves what to whom, and how the credentials are sealed.
//!
//! Owns the cryptography, as pure functions of the key and both nonces; never a socket. Every value is bound to both nonces
//! and to its purpose, so that none can be replayed in another handover or reflected in the same one.

use agent_common::defense::{Defense, holds};
use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, LessSafeKey, Nonce as AeadNonce, UnboundKey},
    error::Unspecified,
    hmac,
};
use zeroize::Zeroizing;

use crate::intercept::HandoverKey;

/// Length of a nonce.
pub(super) const NONCE: usize = 32;
/// Length of a proof.
pub(super) const PROOF: usize = 32;
/// Length that the seal adds.
pub(super) const SEAL: usize = 16;
/// What the successor's proof is an HMAC of, before the nonces.
const OF_PROOF: &[u8] = b"podgate handover: the next agent has the key";
/// The same for the key that seals the credentials.
const OF_SEAL: &[u8] = b"podgate handover: the predecessor's credentials";

/// What makes a handover unlike every other.
pub(super) type Nonce = [u8; NONCE];

/// What both sides know once they have exchanged nonces.
pub(super) struct Session {
    key: hmac::Key,
    nonces: [Nonce; 2],
}

// === impl Session ===

impl Session {
    /// With the nonces of both sides.
    pub(super) fn new(key: &HandoverKey, successor: Nonce, predecessor: Nonce) -> Self {
        Self { key: key.hmac(), nonces: [successor, predecessor] }
    }

    /// Proves that the successor has the key.
    pub(super) fn proof(&self) -> [u8; PROOF] {
        let mut proof = [0; PROOF];
        proof.copy_from_slice(self.derive(OF_PROOF).as_ref());
        proof
    }

    /// Whether that is what this is.
    pub(super) fn accepts(&self, proof: &[u8; PROOF]) -> bool {
        let context = self.context(OF_PROOF);
        hmac::verify(&self.key, &context, proof).is_ok() || !holds(Defense::HandoverProof)
    }

    /// Encrypts the credentials. That they can be opened proves that the predecessor has the key.
    pub(super) fn seal(&self, mut credentials: Zeroizing<Vec<u8>>) -> Result<Vec<u8>, Unspecified> {
        if holds(Defense::HandoverProof) {
            let (key, nonce) = self.seal_key()?;
            key.seal_in_place_append_tag(nonce, Aad::empty(), &mut *credentials)?;
        }
        Ok(std::mem::take(&mut *credentials))
    }

    /// The credentials, if they were sealed in this very handover with the key.
    pub(super) fn open(&self, sealed: Vec<u8>) -> Result<Zeroizing<Vec<u8>>, Unspecified> {
        let mut sealed = Zeroizing::new(sealed);
        if holds(Defense::HandoverProof) {
            let (key, nonce) = self.seal_key()?;
            let length = key.open_in_place(nonce, Aad::empty(), &mut sealed)?.len();
            sealed.truncate(length);
        }
        Ok(sealed)
    }

    /// This key seals a single message, so a fixed nonce is safe.
    fn seal_key(&self) -> Result<(LessSafeKey, AeadNonce), Unspecified> {
        let key = UnboundKey::new(&AES_256_GCM, self.derive(OF_SEAL).as_ref())?;
        Ok((LessSafeKey::new(key), AeadNonce::assume_unique_for_key([0; 12])))
    }

    fn derive(&self, purpose: &[u8]) -> hmac::Tag {
        hmac::sign(&self.key, &self.context(purpose))
    }

    fn context(&self, purpose: &[u8]) -> Vec<u8> {
        [purpose, &self.nonces[0], &self.nonces[1]].concat()
    }
}
