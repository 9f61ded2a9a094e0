//! `podgate detach`: leaves the node as if podgate had never been there.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use serde::Serialize;

use super::fail;
use crate::{config, control::fence, files, intercept, netdev, takeover::transfer};

/// Some heartbeat intervals of a running agent.
const HEARTBEATS: Duration = Duration::from_millis(750);

/// What to remove, and from where.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only list what would be removed.
    #[arg(long)]
    dry_run: bool,
    /// Where bpffs is mounted.
    #[arg(long, env = "PODGATE_BPFFS", default_value = config::DEFAULT_BPFFS)]
    bpffs: PathBuf,
    /// Name of podgate's netdev.
    #[arg(long, env = "PODGATE_NETDEV", default_value = config::DEFAULT_NETDEV)]
    netdev: String,
    /// Directory in which podgate's agents hand credentials over to each other.
    #[arg(long, env = "PODGATE_HANDOVER_DIR", default_value = config::DEFAULT_HANDOVER_DIR)]
    handover_dir: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What podgate has on the node.
#[derive(Debug, Serialize)]
struct Found {
    pins: Vec<PathBuf>,
    netdev: Option<String>,
    filters: Vec<String>,
    handover: Vec<PathBuf>,
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
    let found = Found::on(args).await?;
    if args.json {
        println!("{}", serde_json::to_string(&found).map_err(|error| error.to_string())?);
    } else {
        print!("{}", found.for_people(args.dry_run));
    }
    if args.dry_run {
        return Ok(());
    }
    // Programs first: as long as they run, pods are sent to the addresses that go next. What cannot be removed now is tried
    // again.
    for pin in &found.pins {
        let _ = intercept::unpin(pin);
    }
    // A running agent notices with its next heartbeat, and exits: until then it may have pinned something between two
    // removals.
    if !found.pins.is_empty() {
        tokio::time::sleep(HEARTBEATS).await;
    }
    let mut problems = Vec::new();
    for pin in intercept::pinned(&args.bpffs).map_err(|error| error.to_string())? {
        problems.extend(intercept::unpin(&pin).err().map(|error| error.to_string()));
    }
    for netdev in &found.filters {
        problems.extend(intercept::remove_filter(netdev).err().map(|error| error.to_string()));
    }
    problems.extend(netdev::remove(&args.netdev).await.err().map(|error| error.to_string()));
    for path in &found.handover {
        let removed = files::remove_if_present(path);
        problems.extend(removed.err().map(|error| format!("cannot remove {}: {error}", path.display())));
    }
    if problems.is_empty() { Ok(()) } else { Err(problems.join("\n")) }
}

// === impl Found ===

impl Found {
    async fn on(args: &Args) -> Result<Self, String> {
        let pins = intercept::pinned(&args.bpffs).map_err(|error| error.to_string())?;
        let is_there = netdev::exists(&args.netdev).await.map_err(|error| error.to_string())?;
        let netdev = is_there.then(|| args.netdev.clone());
        let filters = fence::filtered().await.map_err(|error| error.to_string())?;
        let directory = &args.handover_dir;
        let handover = transfer::left(directory)
            .map_err(|error| format!("cannot look into {}: {error}", directory.display()))?;
        Ok(Self { pins, netdev, filters, handover })
    }

    fn for_people(&self, dry_run: bool) -> String {
        let verb = if dry_run { "would remove" } else { "removing" };
        let path = |path: &PathBuf| format!("{verb} {}\n", path.display());
        let (pins, handover) = (self.pins.iter().map(path), self.handover.iter().map(path));
        let filters =
            self.filters.iter().map(|netdev| format!("{verb} the filter on what leaves by {netdev}\n"));
        let netdev =
            self.netdev.iter().map(|netdev| format!("{verb} the netdev {netdev} with its addresses\n"));
        let lines: String = pins.chain(filters).chain(netdev).chain(handover).collect();
        if lines.is_empty() { "nothing of podgate's is on this node\n".to_owned() } else { lines }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_see_each_thing_or_that_there_is_none() {
        let nothing = Found { pins: vec![], netdev: None, filters: vec![], handover: vec![] };
        assert_eq!(nothing.for_people(false), "nothing of podgate's is on this node\n");
        let found = Found {
            pins: vec!["/sys/fs/bpf/podgate/v1/links/connect4".into()],
            netdev: Some("podgate0".into()),
            filters: vec!["eth0".into()],
            handover: vec!["/run/podgate-handover/handover.sock".into()],
        };
        let expected = "would remove /sys/fs/bpf/podgate/v1/links/connect4\n\
                        would remove the filter on what leaves by eth0\n\
                        would remove the netdev podgate0 with its addresses\n\
                        would remove /run/podgate-handover/handover.sock\n";
        assert_eq!(found.for_people(true), expected);
    }
}
