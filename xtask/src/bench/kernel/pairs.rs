//! The same traffic twice, in turns: between two pods, and in the same networks but in no pod's cgroup, where podgate's
//! programs are not.
//!
//! Owns the four processes. Both pairs run with the same agent and take turns every few milliseconds, so that other load
//! on the machine affects both alike.

use std::{net::IpAddr, process::Stdio};

use anyhow::{Context as _, bail};
use lab::{EnvKind, Pod};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
};

use super::{Bench, ratio::Ratios};
use crate::bench::{median, server, start_server, traffic::Traffic};

/// First ports of the servers: in the pod, and in its network.
const PORTS: [u16; 2] = [8091, 8095];

/// The client's side of a pair.
pub(super) struct Client {
    process: Child,
    orders: ChildStdin,
    numbers: Lines<BufReader<ChildStdout>>,
}

/// Two clients and their servers.
pub(super) struct Pairs {
    rounds: usize,
    in_pods: Client,
    outside: Client,
    _servers: [Child; 2],
}

/// One kind of traffic with the programs and without.
pub(super) struct Compared {
    pub(super) traffic: Traffic,
    pub(super) with: f64,
    pub(super) without: f64,
    pub(super) ratios: Ratios,
}

// === impl Client ===

impl Client {
    /// Starts a client and waits until it is connected.
    pub(super) async fn start(mut command: Command) -> anyhow::Result<Self> {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let orders = process.stdin.take().context("BUG: the client's input is not a pipe")?;
        let output = process.stdout.take().context("BUG: the client's output is not a pipe")?;
        let mut numbers = BufReader::new(output).lines();
        if numbers.next_line().await?.as_deref() != Some(server::READY) {
            bail!("a client of the benchmark did not start");
        }
        Ok(Self { process, orders, numbers })
    }

    /// One number.
    pub(super) async fn measure(&mut self, traffic: Traffic) -> anyhow::Result<f64> {
        let failed = || format!("the client {:?} could not measure {}", self.process.id(), traffic.name());
        self.orders.write_all(format!("{}\n", traffic.name()).as_bytes()).await.with_context(failed)?;
        let number = self.numbers.next_line().await?.with_context(failed)?;
        number.parse().with_context(failed)
    }
}

// === impl Pairs ===

impl Pairs {
    /// Starts both pairs, of the bench's client and a server at this address of a pod.
    pub(super) async fn start(bench: &Bench<'_>, server: &Pod, address: IpAddr) -> anyhow::Result<Self> {
        let [in_pod, outside] = PORTS;
        let servers = [
            start_server(bench.lab.exec(server, EnvKind::None, &serve(bench, address, in_pod))?).await?,
            start_server(bench.lab.exec_outside(server, &serve(bench, address, outside))?).await?,
        ];
        let in_pods = bench.lab.exec(&bench.client, EnvKind::None, &ask(bench, address, in_pod))?;
        let outside = bench.lab.exec_outside(&bench.client, &ask(bench, address, outside))?;
        Ok(Self {
            rounds: bench.extent.rounds_of_pairs(),
            in_pods: Client::start(in_pods).await?,
            outside: Client::start(outside).await?,
            _servers: servers,
        })
    }

    /// Measures every kind of traffic with both, in turns.
    pub(super) async fn compare(&mut self, title: &str) -> anyhow::Result<Vec<Compared>> {
        let mut compared = Vec::new();
        for traffic in Traffic::ALL {
            eprintln!("{title}: {} rounds of {}", self.rounds, traffic.name());
            let (mut with, mut without, mut ratios) = (Vec::new(), Vec::new(), Ratios::default());
            for round in 0..self.rounds {
                // The order changes each time, so that being the first favors neither.
                let (of_pods, of_others) = if round % 2 == 0 {
                    let of_pods = self.in_pods.measure(traffic).await?;
                    (of_pods, self.outside.measure(traffic).await?)
                } else {
                    let of_others = self.outside.measure(traffic).await?;
                    (self.in_pods.measure(traffic).await?, of_others)
                };
                with.push(of_pods);
                without.push(of_others);
                ratios.add(of_pods, of_others);
            }
            compared.push(Compared { traffic, with: median(&with), without: median(&without), ratios });
        }
        Ok(compared)
    }
}

/// The command that is a server.
pub(super) fn serve(bench: &Bench<'_>, address: IpAddr, port: u16) -> Vec<String> {
    let (address, port) = (address.to_string(), port.to_string());
    [&bench.helper, "bench-traffic", "--address", &address, "--port", &port].map(str::to_owned).to_vec()
}

/// The command that is a client.
pub(super) fn ask(bench: &Bench<'_>, address: IpAddr, port: u16) -> Vec<String> {
    let mut command = serve(bench, address, port);
    command.push("--measure".to_owned());
    command
}
