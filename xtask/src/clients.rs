//! The clients of the demo and the lab tests: curl, Python, and boto3 in two versions, unmodified.
//!
//! Owns what they need of the system, and their environments under `target/clients`.

use std::{fs, path::PathBuf, process::Command};

use anyhow::Context as _;

use crate::{
    cmd,
    setup::{Need, Source},
    workspace,
};

/// The last boto3 that knows IMDSv2 but not yet Pod Identity.
const BOTO3_OLD: &str = "1.28.85";
const BOTO3_CURRENT: &str = "1.44.5";
/// The file that says that an environment is complete.
const COMPLETE: &str = "complete";
/// The client program, in the workspace.
const SCRIPT: &str = "xtask/clients/boto3_credentials.py";

/// What the clients need of the system: how to see that it is there, and the Debian package that brings it.
const CLIENT_TOOLS: [(&[&str], &str); 3] = [
    (&["curl", "--version"], "curl"),
    (&["python3", "--version"], "python3"),
    (&["python3", "-c", "import ensurepip, venv"], "python3-venv"),
];
/// What loads the rules of simulated nodes with a packet filter, and its package.
const PACKET_FILTER: (&[&str], &str) = (&["nft", "--version"], "nftables");

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
    /// What is missing, system packages included.
    pub(crate) fn missing() -> Vec<Need> {
        let mut needs = missing_packages();
        let versions = [(BOTO3_OLD, "an SDK older than EKS Pod Identity"), (BOTO3_CURRENT, "a current SDK")];
        let missing = versions.into_iter().filter(|(version, _)| !Boto3::is_installed(version));
        needs.extend(missing.map(|(version, purpose)| Need {
            name: Boto3::step(version),
            source: Source::Pip,
            purpose: purpose.to_owned(),
            seconds: 15,
            mib: 120,
        }));
        needs
    }

    /// Installs what is missing below the target directory.
    pub(crate) fn prepare() -> anyhow::Result<Self> {
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
        let directory = Self::directory(version);
        let python = directory.join("bin/python");
        if !Self::is_installed(version) {
            cmd::run(
                &format!("Python environment for {}", Self::step(version)),
                Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory),
            )?;
            cmd::run(
                &Self::step(version),
                Command::new(&python)
                    .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
                    .arg(format!("boto3=={version}")),
            )?;
            fs::write(directory.join(COMPLETE), "")?;
        }
        Ok(Self { python })
    }

    fn is_installed(version: &str) -> bool {
        Self::directory(version).join(COMPLETE).exists()
    }

    fn directory(version: &str) -> PathBuf {
        workspace::target_directory().join("clients").join(format!("boto3-{version}"))
    }

    fn step(version: &str) -> String {
        format!("boto3 {version}")
    }
}

/// The clients' packages that this system has not.
pub(crate) fn missing_packages() -> Vec<Need> {
    let missing = CLIENT_TOOLS.iter().filter(|(probe, _)| !cmd::succeeds(probe));
    missing.map(|(_, package)| Need::apt(*package, "the clients in the pods")).collect()
}

/// The packet filter's package, if this system has it not.
pub(crate) fn missing_packet_filter() -> Option<Need> {
    let (probe, package) = PACKET_FILTER;
    (!cmd::succeeds(probe)).then(|| Need::apt(package, "the packet filters of simulated nodes"))
}

/// Where the packet filter is.
pub(crate) fn packet_filter() -> anyhow::Result<PathBuf> {
    let (probe, package) = PACKET_FILTER;
    let path = probe.first().and_then(|program| cmd::find_in_path(program));
    path.with_context(|| format!("{} is not in PATH: it is in Debian's package {package}", probe[0]))
}

fn curl_version() -> anyhow::Result<String> {
    let output = Command::new("curl").arg("--version").output().context("cannot run curl")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
}
