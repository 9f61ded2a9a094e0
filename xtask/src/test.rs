//! `cargo xtask test`: every test, tier by tier, each within its time budget.
//!
//! Owns which tests make a tier, the counting and the verdict. Nothing is skipped: what cannot run fails.

mod step;

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    process::{self, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use comfy_table::Cell;
use futures::future::join_all;
use lab::state::{self, State};
use tokio::process::Command;

use self::step::{Outcome, Step};
use crate::{bpftool, clients, ebpf, privilege, report, vm, workspace};

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

// === impl Tier ===

impl Tier {
    /// The kernel of the tier's virtual machine, if it has one.
    fn vm(self) -> Option<vm::Kernel> {
        vm::Kernel::ALL.into_iter().find(|&kernel| Self::from(kernel) == self)
    }

    fn needs_root(self) -> bool {
        matches!(self, Self::Kernel | Self::Lab)
    }

    /// `cargo test` arguments that select the tier's tests, one list for each run of cargo.
    fn selection(self) -> anyhow::Result<Vec<Vec<String>>> {
        let arguments = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        Ok(match self {
            Self::Unit => vec![
                arguments("-p agent -p agent-common -p lab -p xtask --lib --bins"),
                arguments("-p agent -p agent-common -p lab --doc"),
            ],
            Self::Pipeline => {
                let mut selection = arguments("-p agent -p lab");
                for directory in ["agent/tests", "xtask/lab/tests"] {
                    selection.extend(tests_in(directory)?);
                }
                vec![selection]
            }
            Self::Kernel => vec![arguments("-p agent --features kernel-tests --test kernel")],
            // Not by cargo on this machine.
            Self::Vm61 | Self::Vm612 => Vec::new(),
            // Those with a steady load come alone: others would take the processors from it.
            Self::Lab => vec![
                arguments("-p xtask --test lab -- --skip upgrade::"),
                arguments("-p xtask --test lab -- upgrade:: --test-threads=1 --nocapture"),
            ],
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

/// Runs one tier or all, prints the table and, alone on the last line, `N passed, N failed`.
pub(crate) fn run(only: Option<Tier>) -> anyhow::Result<ExitCode> {
    let tiers: Vec<Tier> = only.map_or_else(|| Tier::value_variants().to_vec(), |tier| vec![tier]);
    if tiers.iter().any(|tier| tier.needs_root()) {
        privilege::require_root("the tests of the tiers kernel and lab")?;
    }
    let budgets = read_budgets()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut outcomes = Vec::new();
    for group in tiers.chunk_by(|one, next| one.vm().is_some() && next.vm().is_some()) {
        match group {
            [tier] if tier.vm().is_none() => run_tier(*tier, &budgets, &runtime, &mut outcomes)?,
            tiers => run_vms(tiers, &budgets, &runtime, &mut outcomes)?,
        }
    }
    Ok(verdict(&outcomes))
}

/// Compiles the tier's tests, then runs them: two steps, so that each has a time of its own.
fn run_tier(
    tier: Tier,
    budgets: &Budgets,
    runtime: &tokio::runtime::Runtime,
    outcomes: &mut Vec<Outcome>,
) -> anyhow::Result<()> {
    let environment = if tier.needs_root() {
        let step =
            Step::new(format!("{}: build object and agent", tier.name()), budget(budgets, "build-agent")?);
        let mut environment = Vec::new();
        outcomes.push(step.measure(|| {
            environment = kernel_environment(tier)?;
            Ok(())
        }));
        environment
    } else {
        Vec::new()
    };
    if tier == Tier::Kernel {
        let step = Step::new(format!("{}: instructions", tier.name()), budget(budgets, "build-agent")?);
        outcomes.push(step.measure(ebpf::check_workspace_budget));
    }
    let compile = Step::new(format!("{}: compile", tier.name()), budget(budgets, "compile")?);
    let selection = tier.selection()?;
    // Examples in the documentation are compiled as they run.
    let compiled = selection.iter().filter(|arguments| !arguments.iter().any(|argument| argument == "--doc"));
    let compile_commands = compiled.map(|arguments| {
        let of_cargo = arguments.split(|argument| argument == "--").next().unwrap_or_default();
        let mut command = cargo_test(of_cargo, &environment);
        command.arg("--no-run");
        command
    });
    let compiled = runtime.block_on(compile.run(compile_commands.collect()))?;
    let is_compiled = compiled.is_good();
    outcomes.push(compiled);
    if is_compiled {
        let tests = Step::new(tier.name().to_owned(), budget(budgets, tier.name())?);
        let commands = selection.iter().map(|arguments| cargo_test(arguments, &environment));
        outcomes.push(runtime.block_on(tests.run(commands.collect()))?);
    }
    if tier == Tier::Lab {
        remove_dead_labs()?;
    }
    Ok(())
}

/// Gets the machines ready, then lets them run the tests side by side, because each uses one processor: two steps for
/// each, so that both have a time of their own.
fn run_vms(
    tiers: &[Tier],
    budgets: &Budgets,
    runtime: &tokio::runtime::Runtime,
    outcomes: &mut Vec<Outcome>,
) -> anyhow::Result<()> {
    let mut ready = Vec::new();
    for &tier in tiers {
        let Some(kernel) = tier.vm() else { continue };
        let prepare = Step::new(format!("{}: prepare", tier.name()), budget(budgets, "prepare-vm")?);
        outcomes.push(prepare.measure(|| {
            ready.push((tier, vm::prepare_tests(kernel)?));
            Ok(())
        }));
    }
    let limit = budget(budgets, "vm")?;
    let run = |(index, (tier, machine)): (usize, (Tier, process::Command))| {
        let name = tier.name().to_owned();
        // The output of one comes as it is written, that of the others whole, afterwards.
        let step = if index == 0 { Step::new(name, limit) } else { Step::held_back(name, limit) };
        step.with_last_word(vm::SUCCESS).run(vec![machine.into()])
    };
    let runs: Vec<_> = ready.into_iter().enumerate().map(run).collect();
    for outcome in runtime.block_on(join_all(runs)) {
        let mut outcome = outcome?;
        outcome.print_held_back();
        outcomes.push(outcome);
    }
    Ok(())
}

/// Selects every integration test in a directory's files; those in directories of their own need root.
fn tests_in(directory: &str) -> anyhow::Result<Vec<String>> {
    let path = workspace::root().join(directory);
    let entries = fs::read_dir(&path).with_context(|| format!("cannot list {}", path.display()))?;
    let mut selection = Vec::new();
    for entry in entries {
        let file = entry?.path();
        if file.extension().is_some_and(|extension| extension == "rs") {
            let name = file.file_stem().unwrap_or_default().to_string_lossy();
            selection.extend(["--test".to_owned(), name.into_owned()]);
        }
    }
    Ok(selection)
}

fn cargo_test(arguments: &[String], environment: &[(&str, PathBuf)]) -> Command {
    let mut command = Command::from(workspace::cargo());
    command.arg("test").args(arguments).envs(environment.iter().map(|(name, value)| (*name, value)));
    command
}

/// What the tests with root need built, by the variable that tells them where it is.
fn kernel_environment(tier: Tier) -> anyhow::Result<Vec<(&'static str, PathBuf)>> {
    bpftool::install()?;
    Ok(if tier == Tier::Lab {
        clients::install_packages()?;
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

fn budget(budgets: &Budgets, step: &str) -> anyhow::Result<Duration> {
    match budgets.get(step) {
        Some(seconds) => Ok(Duration::from_secs(*seconds)),
        None => bail!("{BUDGETS} has no budget for {step}"),
    }
}

fn verdict(outcomes: &[Outcome]) -> ExitCode {
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
    println!("{passed} passed, {failed} failed");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
