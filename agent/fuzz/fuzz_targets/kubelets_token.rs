//! The kubelet's token file.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| agent::testing::outside::kubelets_token(bytes));
