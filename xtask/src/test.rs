//! `cargo xtask test`: every test, tier by tier, each within its time budget.
//!
//! Owns which tests make a tier, the counting and the verdict. Nothing is skipped: what cannot run fails.

mod selection;
mod step;

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    process::{self, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
use clap::ValueEnum;
use comfy_table::Cell;
use futures::future::join_all;
use lab::state::{self, State};

use self::{
    selection::{ALONE, Selection, tests_in},
    step::{Outcome, Step},
};
use crate::{
    bpftool, clients, ebpf, privilege, report,
    setup::{Build, Need, Plan},
    vm, workspace,
};

/// Seconds by step, in the workspace.
const BUDGETS: &str = ".ci/budgets.toml";
/// Tells the lab tests which agent to run.
const AGENT_VARIABLE: &str = "PODGATE_AGENT";
/// And which one takes the part of an agent with another ABI.
const UNDEFENDED_VARIABLE: &str = "PODGATE_UNDEFENDED";
const OBJECT_VARIABLE: &str = "PODGATE_EBPF_OBJECT";

/// A kind of tests, by what they need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// Pure logic and documentation examples; needs nothing.
    Unit,
    /// The agent in process against the lab's servers; needs nothing.
    Pipeline,
    /// The programs in the running kernel; needs root.
    Kernel,
    /// The kernel tests in a virtual machine with Linux 6.1; needs Debian's packages.
    #[value(name = "vm-6.1")]
    Vm61,
    /// The kernel tests in a virtual machine with Linux 6.12; needs Debian's packages.
    #[value(name = "vm-6.12")]
    Vm612,
    /// The agent on a simulated node; needs root.
    Lab,
}

/// Seconds by step, from the file.
type Budgets = BTreeMap<String, u64>;
/// Where the tests find what was built for them.
type Environment = Vec<(&'static str, PathBuf)>;

/// A run of the tests.
struct Run<'a> {
    budgets: Budgets,
    runtime: tokio::runtime::Runtime,
    filters: &'a [String],
    outcomes: Vec<Outcome>,
}

// === impl Tier ===

impl Tier {
    /// The kernel of the tier's virtual machine, if it has one.
    fn vm(self) -> Option<vm::Kernel> {
        vm::Kernel::ALL.into_iter().find(|&kernel| Self::from(kernel) == self)
    }

    fn needs_root(self) -> bool {
        matches!(self, Self::Kernel | Self::Lab)
    }

    /// The tier's tests, one selection for each run of cargo.
    fn selections(self) -> anyhow::Result<Vec<Selection>> {
        Ok(match self {
            Self::Unit => vec![
                Selection::new("-p agent -p agent-common -p lab -p xtask --lib --bins"),
                Selection::new("-p agent -p agent-common -p lab --doc"),
            ],
            Self::Pipeline => {
                let mut selection = Selection::new("-p agent -p lab");
                for directory in ["agent/tests", "xtask/lab/tests"] {
                    selection.cargo.extend(tests_in(directory)?);
                }
                vec![selection]
            }
            Self::Kernel => vec![Selection::new("-p agent --features kernel-tests --test kernel")],
            // Not by cargo on this machine.
            Self::Vm61 | Self::Vm612 => Vec::new(),
            // Those with a steady load run alone: others would take the processors from it.
            Self::Lab => vec![
                Selection { skip: Some(ALONE), ..Selection::new("-p xtask --test lab") },
                Selection { only: Some(ALONE), ..Selection::new("-p xtask --test lab") },
            ],
        })
    }

    /// What the tier's tests need and this machine has not.
    fn missing(self) -> anyhow::Result<Vec<Need>> {
        let mut needs = Vec::new();
        if self.needs_root() || self.vm().is_some() {
            needs.extend(ebpf::missing_tools()?);
            needs.extend(bpftool::missing());
            needs.extend(clients::missing_packet_filter());
        }
        if let Some(kernel) = self.vm() {
            needs.extend(vm::missing(&[kernel]));
        }
        if self == Self::Lab {
            needs.extend(clients::missing_packages());
        }
        Ok(needs)
    }

    fn builds(self) -> &'static [Build] {
        match self {
            Self::Unit | Self::Pipeline => &[Build::Tests],
            Self::Kernel => &[Build::KernelPrograms, Build::Tests],
            Self::Vm61 | Self::Vm612 => &[Build::KernelPrograms, Build::VmTests],
            Self::Lab => &[Build::KernelPrograms, Build::Agent, Build::UndefendedAgent, Build::Tests],
        }
    }

    /// What running its tests takes, roughly.
    fn runs(self) -> Duration {
        Duration::from_secs(match self {
            Self::Unit => 30,
            Self::Pipeline | Self::Kernel => 60,
            Self::Vm61 | Self::Vm612 => 240,
            Self::Lab => 300,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Pipeline => "pipeline",
            Self::Kernel => "kernel",
            Self::Vm61 => "vm-6.1",
            Self::Vm612 => "vm-6.12",
            Self::Lab => "lab",
        }
    }
}

impl From<vm::Kernel> for Tier {
    fn from(kernel: vm::Kernel) -> Self {
        match kernel {
            vm::Kernel::V6_1 => Self::Vm61,
            vm::Kernel::V6_12 => Self::Vm612,
        }
    }
}

/// Runs one tier or all, prints the table and, alone on the last line, `N passed, N failed`. With filters, only the tests
/// that match one of them; they are arguments of the test binaries and may be options as well.
pub(crate) fn run(only: Option<Tier>, filters: &[String]) -> anyhow::Result<ExitCode> {
    ensure!(
        only.is_some() || filters.is_empty(),
        "a filter needs a tier: `cargo xtask test --tier TIER -- FILTER`"
    );
    ensure!(
        filters.is_empty() || only.is_none_or(|tier| tier.vm().is_none()),
        "virtual machines run all their tests; `--tier kernel` has the same ones and takes a filter"
    );
    let tiers: Vec<Tier> = only.map_or_else(|| Tier::value_variants().to_vec(), |tier| vec![tier]);
    if tiers.iter().any(|tier| tier.needs_root()) {
        privilege::require_root("the tests of the tiers kernel and lab")?;
    }
    announce(&tiers)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut run = Run { budgets: read_budgets()?, runtime, filters, outcomes: Vec::new() };
    for group in tiers.chunk_by(|one, next| one.vm().is_some() && next.vm().is_some()) {
        match group {
            [tier] if tier.vm().is_none() => run.tier(*tier)?,
            tiers => run.vms(tiers)?,
        }
    }
    Ok(verdict(&run.outcomes, filters))
}

/// Says what will be installed and built, and installs the packages.
fn announce(tiers: &[Tier]) -> anyhow::Result<()> {
    let names: Vec<_> = tiers.iter().map(|tier| tier.name()).collect();
    let title = format!("Tests: {}.", names.join(", "));
    let mut plan = Plan::new(&title, tiers.iter().map(|tier| tier.runs()).sum());
    for tier in tiers {
        plan = plan.needs(tier.missing()?).builds(tier.builds().iter().copied());
    }
    plan.begin()
}

// === impl Run ===

impl Run<'_> {
    /// Compiles the tier's tests, then runs them: two steps, so that each has a time of its own.
    fn tier(&mut self, tier: Tier) -> anyhow::Result<()> {
        let mut environment = Environment::new();
        if tier.needs_root() {
            let step = self.step(format!("{}: build object and agent", tier.name()), "build-agent")?;
            self.outcomes.push(step.measure(|| {
                environment = kernel_environment(tier)?;
                Ok(())
            }));
        }
        // Who filters works on something, and runs everything once more in the end.
        if tier == Tier::Kernel && self.filters.is_empty() {
            let step = self.step(format!("{}: instructions", tier.name()), "build-agent")?;
            self.outcomes.push(step.measure(ebpf::check_workspace_budget));
        }
        let selections = tier.selections()?;
        let compile = self.step(format!("{}: compile", tier.name()), "compile")?;
        let commands = selections.iter().filter(|selection| selection.is_compiled_first()).map(|selection| {
            let mut command = selection.command(&environment);
            command.arg("--no-run");
            command
        });
        let compiled = self.runtime.block_on(compile.run(commands.collect()))?;
        let is_compiled = compiled.is_good();
        self.outcomes.push(compiled);
        if is_compiled {
            let step = self.step(tier.name().to_owned(), tier.name())?.with_filters(self.filters);
            let mut commands = Vec::new();
            for selection in &selections {
                if let Some(arguments) = selection.harness(self.filters, &environment)? {
                    let mut command = selection.command(&environment);
                    command.arg("--").args(arguments);
                    commands.push(command);
                }
            }
            let outcome = self.runtime.block_on(step.run(commands))?;
            self.outcomes.push(outcome);
        }
        if tier == Tier::Lab {
            remove_dead_labs()?;
        }
        Ok(())
    }

    /// Gets the machines ready, then lets them run the tests side by side, because each uses one processor: two steps
    /// for each, so that both have a time of their own.
    fn vms(&mut self, tiers: &[Tier]) -> anyhow::Result<()> {
        let mut ready = Vec::new();
        for &tier in tiers {
            let Some(kernel) = tier.vm() else { continue };
            let prepare = self.step(format!("{}: prepare", tier.name()), "prepare-vm")?;
            self.outcomes.push(prepare.measure(|| {
                ready.push((tier, vm::prepare_tests(kernel)?));
                Ok(())
            }));
        }
        let limit = self.budget("vm")?;
        let run = |(index, (tier, machine)): (usize, (Tier, process::Command))| {
            let name = tier.name().to_owned();
            // The output of one is printed as it is written, that of the others afterwards.
            let step = if index == 0 { Step::new(name, limit) } else { Step::held_back(name, limit) };
            step.with_last_word(vm::SUCCESS).run(vec![machine.into()])
        };
        let runs: Vec<_> = ready.into_iter().enumerate().map(run).collect();
        for outcome in self.runtime.block_on(join_all(runs)) {
            let mut outcome = outcome?;
            outcome.print_held_back();
            self.outcomes.push(outcome);
        }
        Ok(())
    }

    fn step(&self, name: String, budget: &str) -> anyhow::Result<Step> {
        Ok(Step::new(name, self.budget(budget)?))
    }

    fn budget(&self, step: &str) -> anyhow::Result<Duration> {
        match self.budgets.get(step) {
            Some(seconds) => Ok(Duration::from_secs(*seconds)),
            None => bail!("{BUDGETS} has no budget for {step}"),
        }
    }
}

/// What the tests with root need built, by the variable that tells them where it is.
fn kernel_environment(tier: Tier) -> anyhow::Result<Environment> {
    Ok(if tier == Tier::Lab {
        vec![(AGENT_VARIABLE, ebpf::build_agent()?), (UNDEFENDED_VARIABLE, ebpf::build_undefended_agent()?)]
    } else {
        vec![(OBJECT_VARIABLE, ebpf::build_object()?.path)]
    })
}

/// A test binary that was killed leaves its labs behind.
fn remove_dead_labs() -> anyhow::Result<()> {
    for lab in State::list()?.into_iter().filter(|lab| !lab.is_alive()) {
        state::clean(&lab.name)?;
    }
    Ok(())
}

fn read_budgets() -> anyhow::Result<Budgets> {
    let text = fs::read_to_string(workspace::root().join(BUDGETS))
        .with_context(|| format!("cannot read {BUDGETS}"))?;
    toml::from_str(&text).with_context(|| format!("{BUDGETS} is not a table of seconds"))
}

fn verdict(outcomes: &[Outcome], filters: &[String]) -> ExitCode {
    let mut table = report::table(&["step", "passed", "failed", "time", "budget", "verdict"]);
    for outcome in outcomes {
        let problem = outcome.problem();
        table.add_row([
            Cell::new(&outcome.name),
            Cell::new(outcome.counts(outcome.passed)),
            Cell::new(outcome.counts(outcome.failed)),
            Cell::new(format!("{:.1} s", outcome.took.as_secs_f64())),
            Cell::new(format!("{} s", outcome.budget.as_secs())),
            report::verdict(problem.is_none(), problem.as_deref().unwrap_or("ok")),
        ]);
    }
    println!("{table}");
    let passed: u64 = outcomes.iter().map(|outcome| outcome.passed).sum();
    // A step that failed without a failing test (it did not compile, or took too long) counts as one.
    let failed: u64 = outcomes.iter().map(|outcome| outcome.failed.max(u64::from(!outcome.is_good()))).sum();
    if !filters.is_empty() {
        let ran: u64 = outcomes.iter().map(|outcome| outcome.passed + outcome.failed).sum();
        println!("`{}`: {ran} test{} ran", filters.join(" "), if ran == 1 { "" } else { "s" });
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_needs_a_tier_that_runs_here() {
        let filters = ["jitter".to_owned()];
        assert!(run(None, &filters).unwrap_err().to_string().contains("--tier"));
        assert!(run(Some(Tier::Vm61), &filters).unwrap_err().to_string().contains("--tier kernel"));
    }

    #[test]
    fn unit_tests_need_nothing_of_the_machine() {
        for tier in [Tier::Unit, Tier::Pipeline] {
            assert!(tier.missing().unwrap().is_empty());
            assert_eq!(tier.builds(), [Build::Tests]);
        }
    }
}
