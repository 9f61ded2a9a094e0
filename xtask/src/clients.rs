//! The clients of the demo and the lab tests: curl, Python, and boto3 in two versions, unmodified.
//!
//! Owns getting them onto the machine: system packages where they are missing, the rest under `target/clients`.

use std::{fs, path::PathBuf, process::Command};

use anyhow::Context as _;

use crate::{
    apt,
    cmd::{self, Missing},
    workspace,
};

/// The last boto3 that knows IMDSv2 but not yet Pod Identity.
const BOTO3_OLD: &str = "1.28.85";
const BOTO3_CURRENT: &str = "1.44.5";
/// The client program, in the workspace.
const SCRIPT: &str = "xtask/clients/boto3_credentials.py";

/// What is needed of the system: how to see that it is there, and the Debian package that brings it.
const TOOLS: [(&[&str], &str); 4] = [
    (&["curl", "--version"], "curl"),
    (&["python3", "--version"], "python3"),
    (&["python3", "-c", "import ensurepip, venv"], "python3-venv"),
    (&["nft", "--version"], "nftables"),
];

/// The clients, ready to run.
#[derive(Debug)]
pub(crate) struct Clients {
    /// An SDK that predates Pod Identity.
    pub(crate) boto3_old: Boto3,
    /// A current SDK.
    pub(crate) boto3_current: Boto3,
    /// Such as `curl 8.14.1`.
    pub(crate) curl_version: String,
}

/// boto3 in an environment of its own.
#[derive(Debug)]
pub(crate) struct Boto3 {
    python: PathBuf,
}

// === impl Clients ===

impl Clients {
    /// Installs what is missing, saying so first.
    pub(crate) fn prepare() -> anyhow::Result<Self> {
        install_packages()?;
        Ok(Self {
            boto3_old: Boto3::install(BOTO3_OLD)?,
            boto3_current: Boto3::install(BOTO3_CURRENT)?,
            curl_version: curl_version()?,
        })
    }
}

// === impl Boto3 ===

impl Boto3 {
    /// The command that resolves credentials.
    pub(crate) fn command(&self) -> Vec<String> {
        [&self.python, &workspace::root().join(SCRIPT)].map(|path| path.display().to_string()).into()
    }

    fn install(version: &str) -> anyhow::Result<Self> {
        let directory = workspace::target_directory().join("clients").join(format!("boto3-{version}"));
        let python = directory.join("bin/python");
        let complete = directory.join("complete");
        if !complete.exists() {
            cmd::run(
                &format!("python environment for boto3 {version}"),
                Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory),
            )?;
            cmd::run(
                &format!("boto3 {version}"),
                Command::new(&python)
                    .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
                    .arg(format!("boto3=={version}")),
            )?;
            fs::write(complete, "")?;
        }
        Ok(Self { python })
    }
}

/// Installs curl and Python where they are missing.
pub(crate) fn install_packages() -> anyhow::Result<()> {
    let is_there = |probe: &[&str]| {
        Command::new(probe[0]).args(&probe[1..]).output().is_ok_and(|out| out.status.success())
    };
    let missing: Vec<&str> =
        TOOLS.iter().filter(|(probe, _)| !is_there(probe)).map(|(_, package)| *package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !apt::is_usable() {
        let packages = missing.join(" ");
        return Err(Missing(format!(
            "the clients in the pods need {packages}: install them with this system's package manager, on Debian\n\
             \x20   sudo apt-get install --no-install-recommends {packages}"
        ))
        .into());
    }
    apt::install("the clients in the pods", &missing)
}

fn curl_version() -> anyhow::Result<String> {
    let output = Command::new("curl").arg("--version").output().context("cannot run curl")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
}
