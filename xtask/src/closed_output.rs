//! Output that nobody reads any longer, as of `cargo xtask … | head`.
//!
//! Owns ending without a word. SIGPIPE stays ignored: it would kill the simulated servers, whose clients come and go.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind, set_hook, take_hook},
    process::ExitCode,
};

/// What a shell shows for a program that SIGPIPE ended.
const EXIT_CLOSED: u8 = 128 + 13;

/// Runs `command`; where it panics because its standard output is closed, this is a quiet exit. Whatever it holds is
/// dropped.
pub(crate) fn catch(command: impl FnOnce() -> ExitCode) -> ExitCode {
    let report = take_hook();
    set_hook(Box::new(move |panic| {
        if !is_closed_output(panic.payload()) {
            report(panic);
        }
    }));
    match catch_unwind(AssertUnwindSafe(command)) {
        Ok(code) => code,
        Err(panic) if is_closed_output(&*panic) => ExitCode::from(EXIT_CLOSED),
        Err(panic) => resume_unwind(panic),
    }
}

/// Whether it is the panic of `println!`, as std words it.
fn is_closed_output(panic: &(dyn Any + Send)) -> bool {
    let message = panic.downcast_ref::<String>().map(String::as_str).unwrap_or_default();
    message.starts_with("failed printing to stdout") && message.contains("Broken pipe")
}
