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

/// Counts requests.
#[derive(Clone, Debug, Default)]
pub struct RequestMetrics(Family<RequestLabels, Counter>);

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
        registry.register("podgate_requests", "Requests answered (unstable)", metrics.0.clone());
        metrics
    }

    /// Counts one answer.
    pub fn count(&self, dialect: Dialect, status: StatusCode) {
        let labels = RequestLabels { dialect: dialect.label(), status: status.as_u16() };
        self.0.get_or_create(&labels).inc();
    }
}
