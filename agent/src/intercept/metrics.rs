//! The kernel's counters as metrics.
//!
//! Owns their name and label; never counts anything itself.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter},
    registry::Registry,
};

use super::Interceptor;

/// Reads the kernel's counters when they are asked for.
#[derive(Debug)]
struct KernelCounters(Arc<Mutex<Interceptor>>);

/// Makes the kernel's counters part of `registry`.
pub fn register(registry: &mut Registry, interceptor: Arc<Mutex<Interceptor>>) {
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
