//! What is counted, in Prometheus's text format.
//!
//! Owns the registry and its labels, which are closed sets; never a label from outside.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use hyper::StatusCode;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter, counter::Counter, family::Family},
    registry::Registry,
};

use crate::{dialect::Dialect, intercept::Interceptor};

/// Counts requests.
#[derive(Clone, Debug, Default)]
pub struct RequestMetrics(Family<RequestLabels, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    dialect: &'static str,
    status: u16,
}

/// Reads the kernel's counters when they are asked for.
#[derive(Debug)]
struct KernelCounters(Arc<Mutex<Interceptor>>);

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

/// Makes the kernel's counters part of `registry`.
pub fn register_kernel(registry: &mut Registry, interceptor: Arc<Mutex<Interceptor>>) {
    registry.register_collector(Box::new(KernelCounters(interceptor)));
}

// === impl KernelCounters ===

impl Collector for KernelCounters {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let counters = self.0.lock().unwrap_or_else(PoisonError::into_inner).counters();
        let Ok(counters) = counters else { return Ok(()) };
        let help = "What the programs in the kernel did (unstable)";
        let mut family =
            encoder.encode_descriptor("podgate_kernel_events", help, None, MetricType::Counter)?;
        for (counter, count) in counters {
            ConstCounter::new(count).encode(family.encode_family(&[("event", counter.label())])?)?;
        }
        Ok(())
    }
}
