//! Counts what the engine does.
//!
//! Owns the labels, which are closed sets; never a label from outside.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

use super::{Error, scheduler::Class};

/// What the engine counts.
#[derive(Clone, Debug, Default)]
pub struct CacheMetrics {
    fetches: Family<FetchLabels, Counter>,
    /// Answers with credentials that have less life left than their floor.
    pub below_floor: Counter,
    /// Pods whose credentials are those of the predecessor.
    pub transferred: Counter,
    /// Fetches that wait for their turn or are under way.
    pub(super) flights: Gauge,
    /// Whether EKS Auth does not answer.
    pub(super) eks_auth_unavailable: Gauge,
    /// Pods whose credentials cannot be refreshed and have little life left.
    pods_below_floor: Gauge,
    /// Pods for which there is nothing to serve.
    pods_without: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FetchLabels {
    class: &'static str,
    outcome: &'static str,
}

// === impl CacheMetrics ===

impl CacheMetrics {
    /// Counters that `registry` knows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "podgate_credentials_fetches",
            "Attempts to fetch a pod's credentials, by why and with what result (unstable)",
            metrics.fetches.clone(),
        );
        registry.register(
            "podgate_credentials_below_floor",
            "Answers with credentials that have less life left than 30 minutes on IMDS, or 20 elsewhere (unstable)",
            metrics.below_floor.clone(),
        );
        registry.register(
            "podgate_credentials_inherited",
            "Pods whose credentials the predecessor has handed over (unstable)",
            metrics.transferred.clone(),
        );
        registry.register(
            "podgate_credentials_fetches_in_flight",
            "Fetches that wait for their turn or are under way (unstable)",
            metrics.flights.clone(),
        );
        registry.register(
            "podgate_credentials_eks_auth_unavailable",
            "1 while EKS Auth gives no answer (unstable)",
            metrics.eks_auth_unavailable.clone(),
        );
        registry.register(
            "podgate_credentials_pods_below_floor",
            "Pods whose credentials have little life left and cannot be refreshed (unstable)",
            metrics.pods_below_floor.clone(),
        );
        registry.register(
            "podgate_credentials_pods_missing",
            "Pods for which no credentials can be fetched and none are left (unstable)",
            metrics.pods_without.clone(),
        );
        metrics
    }

    pub(super) fn in_need(&self, below_floor: usize, without: usize) {
        for (gauge, pods) in [(&self.pods_below_floor, below_floor), (&self.pods_without, without)] {
            gauge.set(i64::try_from(pods).unwrap_or(i64::MAX));
        }
    }

    pub(super) fn fetched(&self, class: Class, error: Option<&Error>) {
        let class = match class {
            Class::Foreground => "foreground",
            Class::Refresh => "refresh",
            Class::Prefetch => "prefetch",
        };
        let outcome = error.map_or("ok", Error::label);
        self.fetches.get_or_create(&FetchLabels { class, outcome }).inc();
    }
}
