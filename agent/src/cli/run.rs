//! `podgate run`: checks, then the agent.

use std::process::ExitCode;

use rustix::process::{Resource, Rlimit};
use tracing::{error, info};

use crate::{
    app,
    config::{Config, Flags},
    error::chain,
    preflight::Facts,
    telemetry,
};

/// What must be put right before the agent can run.
const EXIT_PRECONDITION: u8 = 2;

/// Runs the agent.
pub fn run(flags: &Flags) -> ExitCode {
    let config = match Config::parse(flags) {
        Ok(config) => config,
        Err(problems) => return refuse(problems),
    };
    // Keys and tokens are in memory: no core dump, and no other process of root's without ptrace rights looks in.
    let dumpable = rustix::process::DumpableBehavior::NotDumpable;
    if let Err(error) = rustix::process::set_dumpable_behavior(dumpable) {
        return refuse([format!("cannot forbid core dumps, which would hold credentials: {error}")]);
    }
    // Each connection is a descriptor, and pods decide how many there are.
    let files = rustix::process::getrlimit(Resource::Nofile);
    let files = Rlimit { current: files.maximum, maximum: files.maximum };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, files) {
        return refuse([format!("cannot raise the limit of open files: {error}")]);
    }
    let findings = Facts::gather(&config).findings();
    if !findings.is_empty() {
        return refuse(findings);
    }
    telemetry::init(config.log_format, &config.log_filter);
    #[cfg(feature = "undefended")]
    if let Err(error) = crate::undefended::init() {
        return refuse([error]);
    }
    #[cfg(feature = "undefended")]
    tracing::warn!("{}", crate::undefended::warning());
    info!(version = env!("CARGO_PKG_VERSION"), config = %settings(&config), "podgate starts");
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return refuse([format!("cannot start threads: {error}")]),
    };
    match runtime.block_on(app::run(config)) {
        Ok(()) => {
            info!("podgate is shutting down");
            ExitCode::SUCCESS
        }
        Err(error) => {
            error!(error = chain(&error), "fatal error");
            ExitCode::FAILURE
        }
    }
}

fn refuse<T: std::fmt::Display>(problems: impl IntoIterator<Item = T>) -> ExitCode {
    for problem in problems {
        eprintln!("podgate: {problem}");
    }
    ExitCode::from(EXIT_PRECONDITION)
}

/// The settings as one line; there is no secret among them.
fn settings(config: &Config) -> String {
    serde_json::to_string(config).unwrap_or_default()
}
