//! Annotations of a namespace and a pod.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent::testing::outside::annotations(bytes));
