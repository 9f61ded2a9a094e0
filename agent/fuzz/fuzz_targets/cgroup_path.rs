//! The path of a cgroup.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent::testing::outside::cgroup_path(bytes));
