//! The kernel's counters.
//!
//! Owns a handle of its own on their map: who reads them waits for nobody.

use std::{fmt, sync::Arc};

use agent_common::{abi::map, counter::Counter};
use aya::maps::{MapData, PerCpuArray};

use super::{Error, maps::reading};

/// Reads what the programs have counted, also after they are gone. Clones share one map handle.
#[derive(Clone)]
pub struct Counters(Arc<PerCpuArray<MapData, u64>>);

// === impl Counters ===

impl Counters {
    pub(super) fn new(map: PerCpuArray<MapData, u64>) -> Self {
        Self(Arc::new(map))
    }

    /// Every counter, summed over the processors.
    pub fn read(&self) -> Result<Vec<(Counter, u64)>, Error> {
        Counter::ALL.iter().map(|&counter| Ok((counter, self.sum(counter)?))).collect()
    }

    fn sum(&self, counter: Counter) -> Result<u64, Error> {
        let values = self.0.get(&(counter as u32), 0).map_err(reading(map::COUNTERS))?;
        Ok(values.iter().sum())
    }
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Counters")
    }
}
