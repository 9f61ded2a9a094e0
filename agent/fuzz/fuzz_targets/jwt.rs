//! A service-account token.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent::testing::outside::jwt(bytes));
