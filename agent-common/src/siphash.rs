//! SipHash-2-4, the keyed function that makes tickets unguessable.
//!
//! Owns the algorithm; never sees what it is for. It is here and not in the kernel programs so that it can be tested
//! against the reference.

/// SipHash-2-4 of two words under a 128-bit key: the reference's answer for the 16 bytes `words` in little-endian.
///
/// Aumasson and Bernstein, "`SipHash`: a fast short-input PRF", 2012.
#[inline(always)]
pub const fn siphash24(key: [u64; 2], words: [u64; 2]) -> u64 {
    const LENGTH: u64 = 16 << 56;
    let mut state = [
        key[0] ^ 0x736f_6d65_7073_6575,
        key[1] ^ 0x646f_7261_6e64_6f6d,
        key[0] ^ 0x6c79_6765_6e65_7261,
        key[1] ^ 0x7465_6462_7974_6573,
    ];
    state = absorb(state, words[0]);
    state = absorb(state, words[1]);
    state = absorb(state, LENGTH);
    state[2] ^= 0xff;
    state = round(round(round(round(state))));
    state[0] ^ state[1] ^ state[2] ^ state[3]
}

#[inline(always)]
const fn absorb(mut state: [u64; 4], word: u64) -> [u64; 4] {
    state[3] ^= word;
    state = round(round(state));
    state[0] ^= word;
    state
}

#[inline(always)]
const fn round([mut v0, mut v1, mut v2, mut v3]: [u64; 4]) -> [u64; 4] {
    v0 = v0.wrapping_add(v1);
    v1 = v1.rotate_left(13) ^ v0;
    v0 = v0.rotate_left(32);
    v2 = v2.wrapping_add(v3);
    v3 = v3.rotate_left(16) ^ v2;
    v0 = v0.wrapping_add(v3);
    v3 = v3.rotate_left(21) ^ v0;
    v2 = v2.wrapping_add(v1);
    v1 = v1.rotate_left(17) ^ v2;
    v2 = v2.rotate_left(32);
    [v0, v1, v2, v3]
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::hash::Hasher as _;
    #[expect(deprecated, reason = "the standard library's SipHash-2-4 has no other name")]
    use std::hash::SipHasher;

    use super::*;

    #[test]
    fn the_reference_vector_comes_out() {
        // Key 00..0f and message 00..0f: entry 16 of `vectors_sip64` in the authors' repository.
        let words = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        assert_eq!(siphash24(words, words), 0x3f2a_cc7f_57c2_9bdb);
    }

    #[test]
    fn it_agrees_with_the_standard_library() {
        let mut word = 1_u64;
        for _ in 0..1_000 {
            let mut next = || {
                word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                word
            };
            let (key, words) = ([next(), next()], [next(), next()]);
            #[expect(deprecated, reason = "see above")]
            let mut reference = SipHasher::new_with_keys(key[0], key[1]);
            words.map(u64::to_le_bytes).iter().for_each(|bytes| reference.write(bytes));
            assert_eq!(siphash24(key, words), reference.finish());
        }
    }
}
