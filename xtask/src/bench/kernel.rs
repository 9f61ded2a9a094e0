//! `cargo xtask bench kernel`: what the programs cost each connection of a pod, and what connections that they have
//! nothing to do with notice.
//!
//! Owns both measurements and the goals. The first asks the kernel; the second compares the same traffic with the
//! programs and without them, in turns. Nothing is asserted: the tables say whether a goal is met.

mod pairs;
mod programs;
mod ratio;

use std::{collections::BTreeMap, net::Ipv4Addr, path::Path};

use anyhow::{Context as _, bail};
use aya::sys::{Stats, enable_stats};
use comfy_table::Cell;
use lab::{AgentProcess, AgentSpec, EnvKind, Lab, LabSpec, Pod, PodSpec, simulated_network};

use self::{
    pairs::{Client, Compared, Pairs},
    programs::{Programs, Work},
    ratio::Ratios,
};
use super::{
    Binaries, Extent,
    load::LoadResult,
    median, start_server,
    traffic::{CONNECTIONS, REQUESTS, Traffic},
};
use crate::report;

/// Redirected connections whose work is counted.
const REDIRECTED: u32 = 1_000;
/// What is redirected wherever the agent listens.
const REDIRECTED_ADDRESS: &str = "169.254.170.2:80";
/// First port of the server on the node.
const PORT: u16 = 8091;
/// Nanoseconds that all programs together may take for a connection that is none of podgate's business.
const GOAL_NANOSECONDS: f64 = 600.0;
/// What is left of throughput and of requests per second, at least.
const GOAL_RATIO: f64 = 0.98;

/// The node, its pods, the agent's binary and how much is measured.
struct Bench<'a> {
    lab: Lab,
    client: Pod,
    server: Pod,
    agent: &'a Path,
    helper: String,
    extent: Extent,
}

/// Where a pod's connection is redirected.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// To podgate's listener in the pod's own network.
    PodNetwork,
    /// To the node's addresses, as from a socket that is bound to an interface.
    Node,
}

/// Measures both, with the program on outgoing packets and without it, and prints the tables.
pub(super) async fn measure(binaries: &Binaries, extent: Extent) -> anyhow::Result<()> {
    let helper = binaries.helper.as_path();
    let lab = Lab::up(LabSpec::new(&format!("bench-{}", std::process::id()), helper))?;
    let client = lab.add_pod(&PodSpec::new("bench", "client").role("client-role"))?;
    let server = lab.add_pod(&PodSpec::new("bench", "server"))?;
    let bench =
        Bench { lab, client, server, agent: &binaries.agent, helper: helper.display().to_string(), extent };
    let address = *bench.server.addresses.list().first().context("the pod has no address")?;
    let mut pairs = Pairs::start(&bench, &bench.server, address).await?;
    let mut on_loopback = Pairs::start(&bench, &bench.client, Ipv4Addr::LOCALHOST.into()).await?;
    // Both pairs are the same here: what comes out is how good the comparison is.
    let title = "without podgate";
    print_compared(title, &pairs.compare(title).await?, None);
    for (title, egress_filter) in
        [("podgate, --egress-filter off", "off"), ("podgate with its egress filter", "auto")]
    {
        let agent = bench.start_agent(egress_filter).await?;
        bench.programs(title, &agent).await?;
        print_compared(title, &pairs.compare(title).await?, Some(GOAL_RATIO));
        let title = format!("{title}, a pod's own loopback");
        print_compared(&title, &on_loopback.compare(&title).await?, Some(GOAL_RATIO));
        agent.stop().await?;
    }
    drop((pairs, on_loopback));
    bench.lab.down()
}

// === impl Way ===

impl Way {
    const ALL: [Self; 2] = [Self::PodNetwork, Self::Node];

    fn options(self) -> &'static [&'static str] {
        match self {
            Self::PodNetwork => &[],
            Self::Node => &["--interface", "eth0"],
        }
    }
}

// === impl Extent ===

impl Extent {
    /// Measurements of unrelated connections, and of requests on one, whose work is counted.
    fn turns(self) -> u32 {
        match self {
            Self::Full => 10,
            Self::Short => 1,
        }
    }

    /// Turns of redirected connections, a thousand each way.
    fn rounds_of_redirected(self) -> usize {
        match self {
            Self::Full => 30,
            // The least that the median has an interval for.
            Self::Short => 6,
        }
    }

    /// Turns of each kind of traffic, each with both pairs.
    fn rounds_of_pairs(self) -> usize {
        match self {
            Self::Full => 400,
            // The least that the median has an interval for.
            Self::Short => 6,
        }
    }
}

// === impl Bench ===

impl Bench<'_> {
    /// What the kernel says about the programs.
    async fn programs(&self, title: &str, agent: &AgentProcess) -> anyhow::Result<()> {
        // Not in a pod: the client's programs count, and not those of its peer.
        let address = simulated_network::node_addresses().v4.into();
        let _server = start_server(self.lab.on_node(&pairs::serve(self, address, PORT))?).await?;
        let client = self.lab.exec(&self.client, EnvKind::None, &pairs::ask(self, address, PORT))?;
        let mut client = Client::start(client).await?;
        let programs = Programs::of(agent.process())?;
        // What is measured afterwards is warm.
        client.measure(Traffic::Connect).await?;
        client.measure(Traffic::Exchange).await?;
        for way in Way::ALL {
            self.redirected(way).await?;
        }

        // Counted as long as this is open.
        let statistics =
            enable_stats(Stats::RunTime).context("the kernel does not count its programs' work")?;
        let mut work = vec![programs.work()?];
        let turns = self.extent.turns();
        for traffic in [Traffic::Connect, Traffic::Exchange] {
            for _ in 0..turns {
                client.measure(traffic).await?;
            }
            work.push(programs.work()?);
        }
        for way in Way::ALL {
            self.redirected(way).await?;
            work.push(programs.work()?);
        }
        drop(statistics);

        let goals = [Some(GOAL_NANOSECONDS), None, None, None];
        let whats = [
            "an unrelated connection",
            "an unrelated small request",
            "a connection redirected in the pod's network, with a request",
            "a connection redirected to the node, with a request",
        ];
        let times = [turns * CONNECTIONS, turns * REQUESTS, REDIRECTED, REDIRECTED];
        for (((pair, what), times), goal) in work.windows(2).zip(whats).zip(times).zip(goals) {
            if let [before, after] = pair {
                print_programs(&format!("{title}: {what}"), &per_time(before, after, times)?, goal);
            }
        }
        println!("Counting adds some 35 to 70 ns to each call.");
        self.ways(title).await
    }

    /// What clients see of both ways to the agent, in turns.
    async fn ways(&self, title: &str) -> anyhow::Result<()> {
        let (mut took, mut ratios) = ([Vec::new(), Vec::new()], Ratios::default());
        let rounds = self.extent.rounds_of_redirected();
        eprintln!("{title}: {rounds} rounds of redirected connections");
        for _ in 0..rounds {
            let mut round = [0.0; Way::ALL.len()];
            for (way, took) in Way::ALL.into_iter().zip(&mut round) {
                *took = self.redirected(way).await?.p50_microseconds;
            }
            let [in_pod, on_node] = round;
            ratios.add(in_pod, on_node);
            took.iter_mut().zip(round).for_each(|(all, one)| all.push(one));
        }
        let (low, high) = ratios.interval();
        let columns =
            ["redirected, with a request", "in the pod's network", "to the node", "ratio", "95 % interval"];
        let mut table = report::table(&columns);
        let [in_pod, on_node] = took.map(|all| format!("{:.1}", median(&all)));
        let ratio = format!("{:.3}", ratios.median());
        table.add_row([format!("{title}, µs"), in_pod, on_node, ratio, format!("{low:.3} to {high:.3}")]);
        println!("{table}");
        Ok(())
    }

    async fn start_agent(&self, egress_filter: &str) -> anyhow::Result<AgentProcess> {
        self.lab
            .start_agent(&AgentSpec::new(
                self.agent,
                &["--imds", "intercept", "--egress-filter", egress_filter],
            ))
            .await
    }

    /// Connections that end at the agent, each with one request for credentials that the agent has already.
    async fn redirected(&self, way: Way) -> anyhow::Result<LoadResult> {
        let requests = REDIRECTED.to_string();
        let mut command = vec![self.helper.as_str(), "bench-load", "--address", REDIRECTED_ADDRESS];
        command.extend(["--path", super::PATH, "--requests", &requests, "--new-connections"]);
        command.extend(way.options());
        let output = self.lab.exec(&self.client, EnvKind::None, &command)?.output().await?;
        if !output.status.success() {
            bail!("the agent does not serve the pod: {}", String::from_utf8_lossy(&output.stderr));
        }
        serde_json::from_slice(&output.stdout).context("the load failed")
    }
}

/// What was done between two moments for each of so many.
fn per_time(
    before: &BTreeMap<String, Work>,
    after: &BTreeMap<String, Work>,
    times: u32,
) -> anyhow::Result<BTreeMap<String, Work>> {
    let times = f64::from(times);
    let per_time = |(name, &after): (&String, &Work)| {
        let before = *before
            .get(name)
            .with_context(|| format!("the program {name} was loaded during the measurement"))?;
        let work = after.since(before);
        let work = Work { nanoseconds: work.nanoseconds / times, calls: work.calls / times };
        Ok((name.clone(), work))
    };
    after.iter().map(per_time).collect()
}

fn print_programs(title: &str, work: &BTreeMap<String, Work>, goal: Option<f64>) {
    let mut table = report::table(&[title, "calls", "ns per call", "ns", "goal", "verdict"]);
    let mut total = Work::default();
    for (name, work) in work.iter().filter(|(_, work)| work.calls > 0.0) {
        let numbers = [work.calls, work.nanoseconds / work.calls, work.nanoseconds];
        let numbers = numbers.map(|number| format!("{number:.1}"));
        table.add_row([&[name.clone()][..], &numbers, &["-".to_owned(), "-".to_owned()]].concat());
        total.nanoseconds += work.nanoseconds;
        total.calls += work.calls;
    }
    table.add_row([
        Cell::new("all programs"),
        Cell::new(format!("{:.1}", total.calls)),
        Cell::new("-"),
        Cell::new(format!("{:.1}", total.nanoseconds)),
        Cell::new(goal.map_or_else(|| "-".to_owned(), |goal| format!("<= {goal:.0}"))),
        goal.map_or_else(|| Cell::new("-"), |goal| met(total.nanoseconds <= goal)),
    ]);
    println!("{table}");
}

fn print_compared(title: &str, compared: &[Compared], goal: Option<f64>) {
    let columns = [title, "in pods", "in no pod", "ratio", "95 % interval", "goal", "verdict"];
    let mut table = report::table(&columns);
    for Compared { traffic, with, without, ratios } in compared {
        let (what, goal) = match traffic {
            Traffic::Connect => ("connect, µs", None),
            Traffic::Stream => ("one stream, MB/s", goal),
            Traffic::Exchange => ("small requests/s", goal),
        };
        let (low, high) = ratios.interval();
        table.add_row([
            Cell::new(what),
            Cell::new(format!("{with:.1}")),
            Cell::new(format!("{without:.1}")),
            Cell::new(format!("{:.3}", ratios.median())),
            Cell::new(format!("{low:.3} to {high:.3}")),
            Cell::new(goal.map_or_else(|| "-".to_owned(), |goal| format!(">= {goal}"))),
            goal.map_or_else(|| Cell::new("-"), |goal| met_by(ratios, goal)),
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
