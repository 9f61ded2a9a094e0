//! A record of the kernel's.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent::testing::outside::record(bytes));
