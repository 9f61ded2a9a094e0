//! How many instructions the verifier may go through for each program: a file that a change must bless.
//!
//! Owns the file's format and the verdict. The counts are the kernel's: they differ between kernels and between
//! compilers.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::{Context as _, bail};
use comfy_table::{Cell, Table};

use crate::report;

/// How far above its budget a program may be, in percent: the next compiler is not the same.
const TOLERANCE_PERCENT: u64 = 5;
/// How the file begins.
const HEADER: &str = "\
# Instructions that the kernel's verifier goes through for each program, by kernel series. A program that needs 5 %
# more fails the tests. Written by `cargo xtask build-ebpf --bless`.
";

/// Verified instructions by program.
pub(crate) type Counts = BTreeMap<String, u32>;

/// The file: programs and their instructions by kernel series.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Budget(BTreeMap<String, Counts>);

// === impl Budget ===

impl Budget {
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        toml::from_str(text).map(Self).context("the budget is not a table of instructions by kernel series")
    }

    /// Replaces a series.
    pub(super) fn bless(&mut self, series: &str, counts: Counts) {
        self.0.insert(series.to_owned(), counts);
    }

    pub(super) fn to_toml(&self) -> String {
        let mut text = HEADER.to_owned();
        for (series, programs) in &self.0 {
            let _ = write!(text, "\n[\"{series}\"]\n");
            for (name, count) in programs {
                let _ = writeln!(text, "{name} = {count}");
            }
        }
        text
    }

    /// Prints the counts beside the budget of the series; fails if a program needs too many. A series that is not in
    /// the file has no budget.
    pub(super) fn check(&self, series: &str, counts: &Counts) -> anyhow::Result<()> {
        let budgets = self.0.get(series);
        let mut table = report::table(&["program", "instructions verified", "budget", "verdict"]);
        let mut over = Vec::new();
        for (name, &count) in counts {
            let budget = budgets.and_then(|budgets| budgets.get(name)).copied();
            let problem = budgets.and_then(|_| problem(count, budget));
            add_row(&mut table, name, count, budget, problem);
            over.extend(problem.map(|problem| format!("{name}: {problem}")));
        }
        println!("{table}");
        if budgets.is_none() {
            println!("There is no budget for kernel {series}: the instructions are compared with nothing.");
        }
        if !over.is_empty() {
            bail!(
                "instructions on kernel {series}: {}; where that is meant to be, `cargo xtask build-ebpf --bless` \
                 makes it the budget",
                over.join(", ")
            );
        }
        Ok(())
    }
}

fn add_row(table: &mut Table, name: &str, count: u32, budget: Option<u32>, problem: Option<&str>) {
    table.add_row([
        Cell::new(name),
        Cell::new(count),
        budget.map_or_else(|| Cell::new("-"), Cell::new),
        report::verdict(problem.is_none(), problem.unwrap_or("ok")),
    ]);
}

fn problem(count: u32, budget: Option<u32>) -> Option<&'static str> {
    match budget {
        None => Some("no budget"),
        Some(budget) if u64::from(count) * 100 > u64::from(budget) * (100 + TOLERANCE_PERCENT) => {
            Some("over budget")
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ebpf, vm::Kernel};

    fn budget() -> Budget {
        Budget::parse("[\"6.1\"]\nactive = 1000\n[\"6.12\"]\nactive = 1\n").unwrap()
    }

    fn counts(name: &str, count: u32) -> Counts {
        [(name.to_owned(), count)].into()
    }

    #[test]
    fn a_program_may_be_five_percent_above_its_budget_and_no_more() {
        for (count, good) in [(1, true), (1000, true), (1050, true), (1051, false)] {
            assert_eq!(budget().check("6.1", &counts("active", count)).is_ok(), good, "{count}");
        }
    }

    #[test]
    fn a_program_without_a_budget_fails_where_others_have_one() {
        let error = budget().check("6.1", &counts("new", 1)).unwrap_err().to_string();
        assert!(error.contains("new: no budget"), "{error}");
        budget().check("7.0", &counts("new", 1)).unwrap();
    }

    #[test]
    fn blessing_replaces_one_series_and_leaves_the_others() {
        let mut budget = budget();
        budget.bless("6.12", counts("connect4", 7));
        assert_eq!(Budget::parse(&budget.to_toml()).unwrap(), budget);
        budget.check("6.1", &counts("active", 1000)).unwrap();
        budget.check("6.12", &counts("connect4", 7)).unwrap();
        assert!(budget.check("6.12", &counts("active", 1)).is_err());
    }

    #[test]
    fn the_budget_has_every_kernel_of_the_virtual_machines() {
        let Budget(budget) = Budget::parse(&ebpf::read_budget().unwrap()).unwrap();
        for kernel in Kernel::ALL {
            assert!(budget.contains_key(kernel.series()), "{}", kernel.series());
        }
    }
}
