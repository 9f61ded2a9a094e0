//! The median of paired ratios, and how sure it is.

use crate::bench::median;

/// With and without, measured in pairs.
#[derive(Debug, Default)]
pub(super) struct Ratios(Vec<f64>);

// === impl Ratios ===

impl Ratios {
    pub(super) fn add(&mut self, with: f64, without: f64) {
        self.0.push(with / without);
    }

    pub(super) fn median(&self) -> f64 {
        median(&self.0)
    }

    /// The median's 95 % interval. Whatever the distribution: how many of the ratios are below their true median
    /// is binomial, with a probability of one half.
    pub(super) fn interval(&self) -> (f64, f64) {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let cut = cut(sorted.len());
        (sorted[cut], sorted[sorted.len() - 1 - cut])
    }
}

/// How many values may be left out at either end: as many as leave at most 2.5 % outside.
fn cut(values: usize) -> usize {
    #[expect(clippy::cast_precision_loss, reason = "a few dozen")]
    let float = |count: usize| count as f64;
    // That exactly `left_out` values are below the true median, and that at most so many are.
    let mut exactly = 0.5_f64.powf(float(values));
    let mut at_most = exactly;
    let mut left_out = 0;
    loop {
        exactly *= float(values - left_out) / float(left_out + 1);
        at_most += exactly;
        if at_most > 0.025 {
            return left_out;
        }
        left_out += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_binomial_tables() {
        // Ranks of the lower limit, counted from 1, as tables of the sign test have them.
        for (values, rank) in [(6, 1), (10, 2), (20, 6), (25, 8), (30, 10), (50, 18)] {
            assert_eq!(cut(values) + 1, rank, "{values}");
        }
    }

    #[test]
    fn the_interval_is_around_the_median() {
        let mut ratios = Ratios::default();
        for hundredth in 1..=25_u32 {
            ratios.add(f64::from(hundredth), 100.0);
        }
        assert!((ratios.median() - 0.13).abs() < 1e-9);
        let (low, high) = ratios.interval();
        assert!((low - 0.08).abs() < 1e-9 && (high - 0.18).abs() < 1e-9, "{low} {high}");
    }
}
