//! A connection's bytes, from HTTP to what is asked.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent::testing::outside::http_head(bytes));
