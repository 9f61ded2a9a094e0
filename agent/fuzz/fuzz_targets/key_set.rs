//! A JSON web key set and a token.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent::testing::outside::key_set(bytes));
