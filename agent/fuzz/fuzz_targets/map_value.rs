//! The type information of a map, and a value.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent::testing::outside::map_value(bytes));
