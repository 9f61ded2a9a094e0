//! A session token of IMDS.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent::testing::outside::imds_token(bytes));
