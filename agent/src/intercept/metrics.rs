//! The kernel's counters as metrics.
//!
//! Owns their name and label; never counts anything itself.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, counter::ConstCounter},
    registry::Registry,
};

use super::Counters;

/// Reads the kernel's counters when they are asked for.
#[derive(Debug)]
struct KernelCounters(Counters);

/// Makes the kernel's counters part of `registry`.
pub(crate) fn register(registry: &mut Registry, counters: Counters) {
    registry.register_collector(Box::new(KernelCounters(counters)));
}

// === impl KernelCounters ===

impl Collector for KernelCounters {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Ok(counters) = self.0.read() else { return Ok(()) };
        let help = "What the programs in the kernel did (unstable)";
        let mut family =
            encoder.encode_descriptor("podgate_kernel_events", help, None, MetricType::Counter)?;
        for (counter, count) in counters {
            ConstCounter::new(count).encode(family.encode_family(&[("event", counter.label())])?)?;
        }
        Ok(())
    }
}
