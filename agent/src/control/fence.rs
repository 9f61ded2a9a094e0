//! Keeps the second fence where packets leave the node: on every netdev but `lo` and those of pods.
//!
//! Owns the join of the node's netdevs and the pods' networks, and what is said of the fence; never attaches a program. A
//! netdev is a pod's because its other end is in the pod's network, as the kernel says, never because of its name.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::AsFd as _,
    sync::atomic::AtomicI64,
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt as _};
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::time::timeout;
use tracing::{error, info, warn};

use crate::{
    identity::sandboxes::Sandboxes,
    intercept::{self, FENCE_FILTER, Fenced, Filter, Netdev, Netdevs},
    netdev::{
        self,
        inventory::{EgressFilter, Inventory, NodeNetdev},
    },
};

/// How often is looked whether other programs came before the fence, or removed it.
pub const CHECK_INTERVAL: Duration = Duration::from_secs(5);
/// How often is looked for the network of a new pod: no notification tells that its first process has entered it.
const NEW_POD_INTERVAL: Duration = Duration::from_millis(100);
/// Changes that come so soon after each other are one: a CNI makes several at a time.
const SETTLE: Duration = Duration::from_millis(5);
/// For how long is waited for them at most.
const SETTLE_MAX: Duration = Duration::from_millis(50);
/// After a failure to read the node's netdevs.
const RETRY_DELAY: Duration = Duration::from_secs(1);

/// How many netdevs have the fence, and how well.
#[derive(Clone, Debug, Default)]
pub struct FenceMetrics(Family<Labels, Gauge<i64, AtomicI64>>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    state: &'static str,
}

/// What the log has said, so that it says nothing twice.
#[derive(Debug, Default)]
struct Said {
    first: BTreeSet<String>,
    behind: BTreeSet<String>,
    open: BTreeSet<String>,
}

/// Why the node's netdevs cannot be read.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Netdev(#[from] netdev::Error),
    #[error("cannot read the pods' cgroups: {0}")]
    Pods(#[source] io::Error),
    #[error(transparent)]
    Intercept(#[from] intercept::Error),
}

// === impl FenceMetrics ===

impl FenceMetrics {
    /// Gauges that `registry` knows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "podgate_fence_netdevs",
            "Netdevs by which packets leave the node, by state of the second fence: first, behind, open (unstable)",
            metrics.0.clone(),
        );
        metrics.set(&Fenced::default());
        metrics
    }

    fn set(&self, fenced: &Fenced) {
        let states =
            [("first", fenced.first.len()), ("behind", fenced.behind.len()), ("open", fenced.open.len())];
        for (state, count) in states {
            self.0.get_or_create(&Labels { state }).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }
}

/// Follows the node's netdevs and the networks of its pods until shutdown. `set` is called with what they are, when they
/// change and at every [`CHECK_INTERVAL`]; it gives nothing while another agent is active.
pub async fn run(
    mut pods: Sandboxes,
    metrics: FenceMetrics,
    mut set: impl AsyncFnMut(Netdevs) -> Result<Option<Fenced>, intercept::Error>,
) {
    let mut said = Said::default();
    loop {
        if let Err(error) = follow(&mut pods, &metrics, &mut said, &mut set).await {
            error!(%error, "cannot keep the second fence on new netdevs of this node; trying again");
        }
        tokio::time::sleep(RETRY_DELAY).await;
    }
}

/// The same until the kernel sends no more notifications.
async fn follow(
    pods: &mut Sandboxes,
    metrics: &FenceMetrics,
    said: &mut Said,
    set: &mut impl AsyncFnMut(Netdevs) -> Result<Option<Fenced>, intercept::Error>,
) -> Result<(), Error> {
    let (inventory, mut changes) = Inventory::open()?;
    loop {
        let netdevs = look(&inventory, pods).await?;
        let fenced = set(netdevs).await?.unwrap_or_default();
        metrics.set(&fenced);
        let is_settled = !pods.are_incomplete(Instant::now());
        said.say(&fenced, is_settled);
        let until = if is_settled { CHECK_INTERVAL } else { NEW_POD_INTERVAL };
        // A notification only says when to look, not what changed.
        if let Ok(change) = timeout(until, changes.next()).await {
            if change.is_none() {
                return Ok(());
            }
            // As long as it may take is as long as it takes where there is no end of them.
            let _ = timeout(SETTLE_MAX, settle(&mut changes)).await;
        }
    }
}

/// Waits until changes that belong together have all come.
async fn settle(changes: &mut (impl Stream<Item = ()> + Unpin)) {
    while let Ok(Some(())) = timeout(SETTLE, changes.next()).await {}
}

/// What the node's netdevs are now.
async fn look(inventory: &Inventory, pods: &mut Sandboxes) -> Result<Netdevs, Error> {
    // First: this numbers the networks behind them.
    let netdevs = inventory.netdevs().await?;
    for found in pods.refresh(Instant::now()).map_err(Error::Pods)? {
        // It has none where no netdev leads there yet; a network that ends meanwhile is an error.
        if let Ok(Some(id)) = inventory.network_id(found.namespace.as_fd()).await {
            pods.learn(&found, id);
        }
    }
    let networks: BTreeMap<_, _> = pods.known().collect();
    let mut sorted = Netdevs::default();
    for netdev in netdevs.into_iter().filter(|netdev| !netdev.is_loopback) {
        match netdev.peer_network.and_then(|network| networks.get(&network)) {
            Some(&pod) => {
                sorted.pods.insert(netdev.index, pod);
            }
            None => sorted.outward.push(outward(netdev, inventory).await),
        }
    }
    Ok(sorted)
}

/// The netdevs that have the fence's filter, as they do where the kernel has no tcx.
pub async fn filtered() -> Result<Vec<String>, netdev::Error> {
    let (inventory, _) = Inventory::open()?;
    let mut found = Vec::new();
    for netdev in inventory.netdevs().await? {
        if own_filter(&inventory.filters(netdev.index).await).is_some() {
            found.push(netdev.name);
        }
    }
    Ok(found)
}

async fn outward(netdev: NodeNetdev, inventory: &Inventory) -> Netdev {
    let filter = own_filter(&inventory.filters(netdev.index).await);
    Netdev { index: netdev.index, name: netdev.name, has_ethernet: netdev.has_ethernet, filter }
}

/// The fence's filter among those of a netdev, which are in the order in which they see a packet.
fn own_filter(filters: &[EgressFilter]) -> Option<Filter> {
    let (preference, handle) = FENCE_FILTER;
    let place =
        filters.iter().position(|filter| (filter.preference, filter.handle) == (preference, handle))?;
    Some(Filter { program_id: filters[place].program_id, is_first: place == 0 })
}

// === impl Said ===

impl Said {
    /// Unless it `is_settled` which netdevs are pods', one that has the fence may be a new pod's, which is said of none.
    fn say(&mut self, fenced: &Fenced, is_settled: bool) {
        let first: BTreeSet<_> = fenced.first.iter().cloned().collect();
        let first = if is_settled { first } else { first.intersection(&self.first).cloned().collect() };
        let behind = fenced.behind.iter().cloned().collect();
        let open = fenced.open.iter().map(|(netdev, _)| netdev.clone()).collect();
        for netdev in new(&first, &self.first) {
            info!(netdev, "the second fence is on a netdev: strict pods' packets to IMDS do not leave by it");
        }
        for netdev in new(&behind, &self.behind) {
            warn!(
                netdev,
                "another program comes before the second fence (`bpftool net show dev {netdev}`): what it sends on by \
                 itself, the fence does not see"
            );
        }
        for (netdev, error) in fenced.open.iter().filter(|(netdev, _)| !self.open.contains(netdev)) {
            error!(netdev, %error, "the second fence is not on a netdev: strict pods may reach IMDS by it");
        }
        *self = Self { first, behind, open };
    }
}

fn new<'a>(now: &'a BTreeSet<String>, before: &'a BTreeSet<String>) -> impl Iterator<Item = &'a String> {
    now.difference(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fences_filter_is_told_by_preference_and_handle() {
        let (preference, handle) = FENCE_FILTER;
        let own = EgressFilter { preference, handle, program_id: Some(7) };
        let other = EgressFilter { handle: 1, program_id: Some(8), ..own };
        let later = EgressFilter { preference: 2, ..own };
        let found = |is_first| Some(Filter { program_id: Some(7), is_first });
        assert_eq!(own_filter(&[own, other]), found(true));
        assert_eq!(own_filter(&[other, own]), found(false));
        assert_eq!(own_filter(&[other, later]), None);
    }
}
