//! `podgate detach`: leaves the node as if podgate had never been there.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use serde::Serialize;

use super::fail;
use crate::{config, intercept, link};

/// Some of a running agent's beats.
const BEATS: Duration = Duration::from_millis(750);

/// What to remove, and from where.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only list what would be removed.
    #[arg(long)]
    dry_run: bool,
    /// Where bpffs is mounted.
    #[arg(long, env = "PODGATE_BPFFS", default_value = config::DEFAULT_BPFFS)]
    bpffs: PathBuf,
    /// Name of podgate's network link.
    #[arg(long, env = "PODGATE_LINK", default_value = config::DEFAULT_LINK)]
    link: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What podgate has on the node.
#[derive(Debug, Serialize)]
struct Found {
    pins: Vec<PathBuf>,
    link: Option<String>,
    rules: Vec<String>,
}

/// Finds, prints and removes.
pub fn run(args: &Args) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&format!("cannot start: {error}")),
    };
    match runtime.block_on(detach(args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

async fn detach(args: &Args) -> Result<(), String> {
    let found = Found::on(&args.bpffs, &args.link).await?;
    if args.json {
        println!("{}", serde_json::to_string(&found).map_err(|error| error.to_string())?);
    } else {
        print!("{}", found.for_people(args.dry_run));
    }
    if args.dry_run {
        return Ok(());
    }
    // Programs first: as long as they run, pods are sent to the addresses that go next.
    let mut problems = Vec::new();
    for pin in &found.pins {
        problems.extend(intercept::unpin(pin).err().map(|error| error.to_string()));
    }
    // An agent that runs notices with its next beat, and ends: until then it would restore its rules.
    if !found.pins.is_empty() {
        tokio::time::sleep(BEATS).await;
    }
    problems.extend(link::remove(&args.link).await.err().map(|error| error.to_string()));
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n")) }
}

// === impl Found ===

impl Found {
    async fn on(bpffs: &Path, link: &str) -> Result<Self, String> {
        let pins = intercept::pinned(bpffs).map_err(|error| error.to_string())?;
        let (link, rules) = link::find_all(link).await.map_err(|error| error.to_string())?;
        Ok(Self { pins, link, rules })
    }

    fn for_people(&self, dry_run: bool) -> String {
        let verb = if dry_run { "would remove" } else { "removing" };
        let pins = self.pins.iter().map(|pin| format!("{verb} {}\n", pin.display()));
        let rules = self.rules.iter().map(|rule| format!("{verb} the rule {rule}\n"));
        let link =
            self.link.iter().map(|link| format!("{verb} the network link {link} with its addresses\n"));
        let lines: String = pins.chain(rules).chain(link).collect();
        if lines.is_empty() { "nothing of podgate's is on this node\n".to_owned() } else { lines }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_each_thing_or_that_there_is_none() {
        let nothing = Found { pins: vec![], link: None, rules: vec![] };
        assert_eq!(nothing.for_people(false), "nothing of podgate's is on this node\n");
        let found = Found {
            pins: vec!["/sys/fs/bpf/podgate/v1/links/connect4".into()],
            link: Some("podgate0".into()),
            rules: vec!["from all to 169.254.170.23 lookup 255 proto 80".into()],
        };
        let expected = "would remove /sys/fs/bpf/podgate/v1/links/connect4\n\
                        would remove the rule from all to 169.254.170.23 lookup 255 proto 80\n\
                        would remove the network link podgate0 with its addresses\n";
        assert_eq!(found.for_people(true), expected);
    }
}
