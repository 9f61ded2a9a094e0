//! Credentials as another agent hands them over.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent::testing::outside::transferred(bytes));
