//! `cargo xtask bench kernel`: what the programs cost each connection of a pod, and what connections that they have
//! nothing to do with notice.
//!
//! Owns both measurements and the goals. The first asks the kernel; the second compares the same node with the agent
//! and without it, in turns. Nothing is asserted: the table says whether a goal is met.

mod programs;
mod ratio;

use std::{collections::BTreeMap, net::IpAddr, path::Path, process::Stdio};

use anyhow::{Context as _, bail};
use aya::sys::{Stats, enable_stats};
use comfy_table::Cell;
use lab::{AgentProcess, AgentSpec, EnvKind, Lab, LabSpec, Pod, PodSpec, netns};

use self::{
    programs::{Programs, Work},
    ratio::Ratios,
};
use super::{
    start_server,
    traffic::{CONNECTIONS, Traffic},
};
use crate::report;

/// Turns, each with and without the agent. Odd: there is one in the middle.
const ROUNDS: usize = 31;
/// Redirected connections whose work is counted.
const REDIRECTED: u32 = 1_000;
/// What is redirected wherever the agent listens.
const REDIRECTED_ADDRESS: &str = "169.254.170.2:80";
/// Nanoseconds that all programs together may take for a connection that is none of podgate's business.
const GOAL_NANOSECONDS: f64 = 600.0;
/// What is left of throughput and of requests per second, at least.
const GOAL_RATIO: f64 = 0.98;

/// The node, its pods and the agent's binary.
struct Bench<'a> {
    lab: Lab,
    client: Pod,
    server: Pod,
    agent: &'a Path,
    helper: String,
}

/// Measures both and prints the tables.
pub(super) async fn measure(agent: &Path, helper: &Path) -> anyhow::Result<()> {
    let lab = Lab::up(LabSpec::new(&format!("bench-{}", std::process::id()), helper))?;
    let client = lab.add_pod(&PodSpec::new("bench", "client").role("client-role"))?;
    let server = lab.add_pod(&PodSpec::new("bench", "server"))?;
    let bench = Bench { lab, client, server, agent, helper: helper.display().to_string() };
    bench.programs().await?;
    bench.others().await?;
    bench.lab.down()
}

// === impl Bench ===

impl Bench<'_> {
    /// What the kernel says about the programs.
    async fn programs(&self) -> anyhow::Result<()> {
        // Not in a pod: the client's programs count, and not those of its peer.
        let address = netns::node_addresses().v4.into();
        let _server = start_server(self.lab.on_node(&self.traffic(address, None))?).await?;
        let agent = self.start_agent().await?;
        let programs = Programs::of(agent.process())?;
        // What is measured afterwards is warm.
        self.measure(address, Traffic::Connect).await?;
        self.redirected().await?;

        // Counted as long as this is open.
        let statistics =
            enable_stats(Stats::RunTime).context("the kernel does not count its programs' work")?;
        let before = programs.work()?;
        self.measure(address, Traffic::Connect).await?;
        let between = programs.work()?;
        self.redirected().await?;
        let after = programs.work()?;
        drop(statistics);
        agent.stop().await?;

        let unrelated = per_connection(&before, &between, CONNECTIONS)?;
        print_programs("unrelated connection", &unrelated, Some(GOAL_NANOSECONDS));
        let redirected = per_connection(&between, &after, REDIRECTED)?;
        print_programs("redirected connection, with a request", &redirected, None);
        Ok(())
    }

    /// What two pods notice that talk to each other.
    async fn others(&self) -> anyhow::Result<()> {
        let address = *self.server.addresses.list().first().context("the pod has no address")?;
        let serve = self.lab.exec(&self.server, EnvKind::None, &self.traffic(address, None))?;
        let _server = start_server(serve).await?;
        let mut with = Traffic::ALL.map(|_| Vec::new());
        let mut without = Traffic::ALL.map(|_| Vec::new());
        for round in 1..=ROUNDS {
            eprintln!("two pods: round {round} of {ROUNDS}");
            // The order changes each time, so that a machine that gets slower or faster favours neither.
            let turns = if round % 2 == 0 { [true, false] } else { [false, true] };
            for has_agent in turns {
                let agent = if has_agent { Some(self.start_agent().await?) } else { None };
                let values = if has_agent { &mut with } else { &mut without };
                for (traffic, values) in Traffic::ALL.into_iter().zip(values) {
                    values.push(self.measure(address, traffic).await?);
                }
                if let Some(agent) = agent {
                    stop_with_programs(agent).await?;
                }
            }
        }
        print_others(&with, &without);
        Ok(())
    }

    async fn start_agent(&self) -> anyhow::Result<AgentProcess> {
        self.lab.start_agent(&AgentSpec::new(self.agent, &["--imds", "intercept"])).await
    }

    /// One number from the client's pod.
    async fn measure(&self, address: IpAddr, traffic: Traffic) -> anyhow::Result<f64> {
        let command = self.traffic(address, Some(traffic));
        let mut client = self.lab.exec(&self.client, EnvKind::None, &command)?;
        let output = client.stderr(Stdio::inherit()).output().await?;
        let number = String::from_utf8_lossy(&output.stdout).trim().parse();
        number.with_context(|| format!("the client could not measure {}", traffic.argument()))
    }

    /// Connections that end at the agent, each with one request for credentials that the agent has already.
    async fn redirected(&self) -> anyhow::Result<()> {
        let requests = REDIRECTED.to_string();
        let mut command = vec![self.helper.as_str(), "bench-load", "--address", REDIRECTED_ADDRESS];
        command.extend(["--path", super::PATH, "--requests", &requests, "--new-connections"]);
        let output = self.lab.exec(&self.client, EnvKind::None, &command)?.output().await?;
        if !output.status.success() {
            bail!("the agent does not serve the pod: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    fn traffic(&self, address: IpAddr, traffic: Option<Traffic>) -> Vec<String> {
        let address = address.to_string();
        let mut command = vec![&*self.helper, "bench-traffic", "--address", &address];
        if let Some(traffic) = traffic {
            command.extend(["--measure", traffic.argument()]);
        }
        command.into_iter().map(str::to_owned).collect()
    }
}

/// Stops the agent and makes sure that it has left nothing attached.
async fn stop_with_programs(agent: AgentProcess) -> anyhow::Result<()> {
    let programs = Programs::of(agent.process())?;
    agent.stop().await?;
    if programs.are_loaded()? {
        bail!("the agent's programs are still there after its end: nothing can be measured without them");
    }
    Ok(())
}

fn per_connection(
    before: &BTreeMap<String, Work>,
    after: &BTreeMap<String, Work>,
    connections: u32,
) -> anyhow::Result<BTreeMap<String, Work>> {
    let connections = f64::from(connections);
    let per_connection = |(name, &after): (&String, &Work)| {
        let before = *before.get(name).with_context(|| format!("the program {name} came meanwhile"))?;
        let work = after.since(before);
        let work = Work { nanoseconds: work.nanoseconds / connections, calls: work.calls / connections };
        Ok((name.clone(), work))
    };
    after.iter().map(per_connection).collect()
}

fn print_programs(title: &str, work: &BTreeMap<String, Work>, goal: Option<f64>) {
    let mut table = report::table(&[title, "calls", "ns per call", "ns", "goal", "verdict"]);
    let mut total = Work::default();
    for (name, work) in work {
        let per_call = if work.calls > 0.0 { work.nanoseconds / work.calls } else { 0.0 };
        let numbers = [work.calls, per_call, work.nanoseconds].map(|number| format!("{number:.1}"));
        table.add_row([&[name.clone()][..], &numbers, &["-".to_owned(), "-".to_owned()]].concat());
        total.nanoseconds += work.nanoseconds;
        total.calls += work.calls;
    }
    table.add_row([
        Cell::new("all programs"),
        Cell::new(format!("{:.1}", total.calls)),
        Cell::new(format!("{:.1}", total.nanoseconds / total.calls)),
        Cell::new(format!("{:.1}", total.nanoseconds)),
        Cell::new(goal.map_or_else(|| "-".to_owned(), |goal| format!("<= {goal:.0}"))),
        goal.map_or_else(|| Cell::new("-"), |goal| met(total.nanoseconds <= goal)),
    ]);
    println!("{table}");
}

fn print_others(with: &[Vec<f64>], without: &[Vec<f64>]) {
    let columns =
        ["between two pods", "with podgate", "without", "ratio", "95 % interval", "goal", "verdict"];
    let mut table = report::table(&columns);
    for ((traffic, with), without) in Traffic::ALL.into_iter().zip(with).zip(without) {
        let mut ratios = Ratios::default();
        for (&with, &without) in with.iter().zip(without) {
            ratios.add(with, without);
        }
        let (what, goal) = match traffic {
            Traffic::Connect => ("connect, µs", None),
            Traffic::Stream => ("one stream, MB/s", Some(GOAL_RATIO)),
            Traffic::Exchange => ("small requests/s", Some(GOAL_RATIO)),
        };
        let (low, high) = ratios.interval();
        table.add_row([
            Cell::new(what),
            Cell::new(format!("{:.1}", super::median(with))),
            Cell::new(format!("{:.1}", super::median(without))),
            Cell::new(format!("{:.3}", ratios.median())),
            Cell::new(format!("{low:.3} to {high:.3}")),
            Cell::new(goal.map_or_else(|| "-".to_owned(), |goal| format!(">= {goal}"))),
            goal.map_or_else(|| Cell::new("-"), |goal| met_by(&ratios, goal)),
        ]);
    }
    println!("{table}");
}

/// A goal within the interval is neither surely met nor surely missed.
fn met_by(ratios: &Ratios, goal: f64) -> Cell {
    let (low, high) = ratios.interval();
    let is_met = ratios.median() >= goal;
    match (is_met, low <= goal && goal <= high) {
        (_, false) => met(is_met),
        (true, true) => report::verdict(true, "met, not surely"),
        (false, true) => report::verdict(false, "missed, not surely"),
    }
}

fn met(is_met: bool) -> Cell {
    report::verdict(is_met, if is_met { "met" } else { "missed" })
}
