//! Puts the eBPF object where the agent embeds it from: the one that `PODGATE_EBPF_OBJECT` names, else an empty file,
//! so that checks and tests that load nothing need no eBPF toolchain. The agent refuses to start with an empty one.
//!
//! Refuses to build what must never be deployed: a release in which defenses can be switched off.

use std::{env, fs, path::Path, process::ExitCode};

const OBJECT: &str = "PODGATE_EBPF_OBJECT";
/// Set where the feature `undefended` is on.
const UNDEFENDED: &str = "CARGO_FEATURE_UNDEFENDED";

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={OBJECT}");
    // `release`, whatever profile inherits from it is called: what goes into an image.
    if env::var_os(UNDEFENDED).is_some() && env::var("PROFILE").as_deref() == Ok("release") {
        println!(
            "cargo::error=the feature `undefended` is for the suite of attacks, never for a release build"
        );
        return ExitCode::FAILURE;
    }
    let Some(out_dir) = env::var_os("OUT_DIR") else {
        println!("cargo::error=OUT_DIR is not set: this is a build script, run it with cargo");
        return ExitCode::FAILURE;
    };
    let embedded = Path::new(&out_dir).join("podgate.o");
    let result = match env::var(OBJECT) {
        Ok(object) => {
            println!("cargo::rerun-if-changed={object}");
            fs::copy(&object, &embedded).map(drop).map_err(|error| format!("{OBJECT}={object}: {error}"))
        }
        Err(_) => fs::write(&embedded, []).map_err(|error| format!("{}: {error}", embedded.display())),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("cargo::error={error}");
            ExitCode::FAILURE
        }
    }
}
