//! A pod as the API server tells it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent::testing::outside::api_pod(bytes));
