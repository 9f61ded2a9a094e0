//! Metrics of the credential cache.
//!
//! Owns the labels, which are closed sets.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{Error, scheduler::Priority};

/// Metrics of the credential cache.
#[derive(Clone, Debug, Default)]
pub struct CacheMetrics {
    fetches: Family<FetchLabels, Counter>,
    /// Answers with credentials below their floor.
    pub below_floor: Counter,
    /// Pods whose credentials were inherited from the predecessor.
    pub transferred: Counter,
    /// Fetches that are queued or running.
    pub(super) in_flight: Gauge,
    /// Whether the circuit is open.
    pub(super) eks_auth_unavailable: Gauge,
    /// Pods with credentials below the floor that cannot be refreshed.
    pods_below_floor: Gauge,
    /// Pods that failed to get credentials and have none.
    pods_missing: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FetchLabels {
    priority: &'static str,
    outcome: &'static str,
}

// === impl CacheMetrics ===

impl CacheMetrics {
    /// Registers all of them in `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "podgate_credentials_fetches",
            "Attempts to fetch a pod's credentials, by priority and outcome (unstable)",
            metrics.fetches.clone(),
        );
        registry.register(
            "podgate_credentials_below_floor",
            "Answers with credentials that have less than 30 minutes left on IMDS, or 20 elsewhere (unstable)",
            metrics.below_floor.clone(),
        );
        registry.register(
            "podgate_credentials_inherited",
            "Pods whose credentials were inherited from the predecessor (unstable)",
            metrics.transferred.clone(),
        );
        registry.register(
            "podgate_credentials_fetches_in_flight",
            "Fetches that are queued or running (unstable)",
            metrics.in_flight.clone(),
        );
        registry.register(
            "podgate_credentials_eks_auth_unavailable",
            "1 while EKS Auth does not answer (unstable)",
            metrics.eks_auth_unavailable.clone(),
        );
        registry.register(
            "podgate_credentials_pods_below_floor",
            "Pods with credentials near expiration that cannot be refreshed (unstable)",
            metrics.pods_below_floor.clone(),
        );
        registry.register(
            "podgate_credentials_pods_missing",
            "Pods that have no credentials and cannot fetch any (unstable)",
            metrics.pods_missing.clone(),
        );
        metrics
    }

    pub(super) fn set_failing(&self, below_floor: usize, missing: usize) {
        for (gauge, pods) in [(&self.pods_below_floor, below_floor), (&self.pods_missing, missing)] {
            gauge.set(i64::try_from(pods).unwrap_or(i64::MAX));
        }
    }

    pub(super) fn fetched(&self, priority: Priority, error: Option<&Error>) {
        let priority = match priority {
            Priority::Foreground => "foreground",
            Priority::Refresh => "refresh",
            Priority::Prefetch => "prefetch",
        };
        let outcome = error.map_or("ok", Error::label);
        self.fetches.get_or_create(&FetchLabels { priority, outcome }).inc();
    }
}
