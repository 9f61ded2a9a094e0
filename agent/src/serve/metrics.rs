//! Counts requests.
//!
//! Owns the labels, which are closed sets; never a label from outside.

use hyper::StatusCode;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use crate::dialect::Dialect;

/// Counts requests, and connections that get none.
#[derive(Clone, Debug, Default)]
pub struct RequestMetrics {
    requests: Family<RequestLabels, Counter>,
    /// Connections beyond what a caller may have open.
    pub refused_connections: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    dialect: &'static str,
    status: u16,
}

// === impl RequestMetrics ===

impl RequestMetrics {
    /// Counters that `registry` knows.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("podgate_requests", "Requests answered (unstable)", metrics.requests.clone());
        registry.register(
            "podgate_refused_connections",
            "Connections beyond what a caller may have open (unstable)",
            metrics.refused_connections.clone(),
        );
        metrics
    }

    /// Counts one answer.
    pub fn count(&self, dialect: Dialect, status: StatusCode) {
        let labels = RequestLabels { dialect: dialect.label(), status: status.as_u16() };
        self.requests.get_or_create(&labels).inc();
    }
}
