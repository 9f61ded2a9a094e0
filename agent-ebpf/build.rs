//! Rebuilds the programs when the linker changes, which Cargo does not notice by itself.

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        println!("cargo::rerun-if-changed={linker}");
    }
}
