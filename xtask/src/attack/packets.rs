//! Attacks with packets: handshakes by hand, floods, and what is no TCP connection at all.

use std::{fs, time::Duration};

use agent_common::net::{IMDS_V4, POD_IDENTITY_V4, POD_IDENTITY_V6};
use anyhow::Context as _;
use futures::future::try_join_all;
use lab::{NODE_ROLE, Pod, PodSpec};
use rustix::{
    process::{Pid, Resource, Rlimit, prlimit},
    time::{ClockId, clock_gettime},
};

use tokio::time::sleep;

use super::{
    IMDS, POD_IDENTITY, PROGRAM, ROLES,
    attacker::{Act, Knock, Layer},
    get,
    scene::{Outcome, Place, Scene, address, http, on_host_network},
};

/// Longer than the node takes to be rid of a pod's netdev.
const CLEARED: Duration = Duration::from_millis(500);
/// Nanoseconds of one tick of the tickets that can be guessed: 2 to the power of this.
const TICK: u32 = 26;
/// How many ticks a guess goes back: two seconds and a half.
const TICKS: u64 = 40;
/// As many files as the agent may have open while connections are held.
const AGENT_FILES: u64 = 512;
/// How many probes leave it none.
const PROBES: u32 = 520;

/// What an attacker gets where nothing leaves the pod.
pub(super) const UNSEEN: &str = "no ticket on the wire";

pub(super) async fn guessed_ticket(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    scene.lab.netns(&victim)?.mute()?;
    let act = Act::BeginConnects { to: vec![POD_IDENTITY], count: 1 };
    let under_way = scene.must_begin(Place::In(&victim), &act).await?;
    let now = clock_gettime(ClockId::Boottime);
    let nanoseconds = u64::try_from(now.tv_sec)? * 1_000_000_000 + u64::try_from(now.tv_nsec)?;
    let tick = nanoseconds >> TICK;
    let outcome = forge(scene, &attacker, (tick - TICKS..=tick).map(Some).collect()).await;
    under_way.finish().await?;
    outcome
}

pub(super) async fn replayed_ticket(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let sniffer = scene.lab.add_pod(&sniffer(scene))?;
    let on_the_wire = scene.must_begin(Place::In(&sniffer), &Act::Sniff { from: address(&victim)? }).await?;
    let request = get(POD_IDENTITY.ip(), PROGRAM, "");
    let act = Act::AskLater { to: POD_IDENTITY, request };
    let connected = scene.must_begin(Place::In(&victim), &act).await?;
    let Some(ticket) = on_the_wire.finish().await?.number else {
        connected.finish().await?;
        return Ok(Outcome::nothing(UNSEEN));
    };
    let outcome = forge(scene, &attacker, vec![Some(ticket)]).await;
    connected.finish().await?;
    outcome
}

pub(super) async fn stolen_ticket(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let sniffer = scene.lab.add_pod(&sniffer(scene))?;
    let on_the_wire = scene.must_begin(Place::In(&sniffer), &Act::Sniff { from: address(&victim)? }).await?;
    scene.lab.netns(&victim)?.mute()?;
    let act = Act::BeginConnects { to: vec![POD_IDENTITY], count: 1 };
    let under_way = scene.must_begin(Place::In(&victim), &act).await?;
    let ticket = on_the_wire.finish().await?.number;
    under_way.finish().await?;
    let Some(ticket) = ticket else { return Ok(Outcome::nothing(UNSEEN)) };
    forge(scene, &attacker, vec![Some(ticket)]).await
}

pub(super) async fn no_ticket(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    scene.lab.complete_pod(&victim)?;
    // The netdev of the pod that has ended goes a moment later.
    sleep(CLEARED).await;
    let heir = scene.lab.add_pod_at(&scene.attacker_spec(), &victim)?;
    forge(scene, &heir, vec![None]).await
}

pub(super) async fn syn_flood(scene: &Scene) -> anyhow::Result<Outcome> {
    // Few may wait, so that a small flood is one.
    scene.lab.node.netns.run(|| Ok(fs::write("/proc/sys/net/core/somaxconn", "128")?))?;
    scene.start_agent().await?;
    let (victim, attacker) = (scene.victim().await?, deaf_attacker(scene)?);
    let flood = Act::FloodHandshakes { from: address(&attacker)?, to: POD_IDENTITY_V4, count: 2_000 };
    let flood = scene.must_begin(Place::In(&attacker), &flood).await?;
    let outcome = scene.unharmed(&victim).await;
    let said = flood.finish().await?.said;
    Ok(outcome?.after(&said))
}

pub(super) async fn half_open_connections(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    scene.lab.netns(&attacker)?.mute()?;
    let act = Act::BeginConnects { to: vec![POD_IDENTITY, http(POD_IDENTITY_V6.into())], count: 12_500 };
    let mut running = Vec::new();
    for _ in 0..4 {
        running.push(scene.must_begin(Place::In(&attacker), &act).await?);
    }
    let outcome = scene.unharmed(&victim).await;
    let mut under_way = 0;
    for begun in running {
        under_way += begun.finish().await?.number.unwrap_or_default();
    }
    Ok(outcome?.after(&format!("{under_way} under way")))
}

pub(super) async fn held_connections(scene: &Scene) -> anyhow::Result<Outcome> {
    let act = Act::HoldConnections { to: POD_IDENTITY, count: 1_000, saying: String::new() };
    held(scene, &scene.attacker()?, &act).await
}

pub(super) async fn held_probes(scene: &Scene) -> anyhow::Result<Outcome> {
    let attacker = scene.lab.add_pod(&PodSpec { host_network: true, ..scene.attacker_spec() })?;
    // Whoever asks now and then is not cut off as who is idle. More than these would not fit into the queue.
    let saying = "GET /livez HTTP/1.1\r\nHost: podgate\r\n\r\n".to_owned();
    held(scene, &attacker, &Act::HoldConnections { to: lab::agent_process::ADMIN, count: PROBES, saying })
        .await
}

async fn held(scene: &Scene, attacker: &Pod, act: &Act) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    limit_files(scene).await?;
    let held = scene.must_begin(Place::In(attacker), act).await?;
    let outcome = scene.unharmed(&victim).await;
    let said = held.finish().await?.said;
    Ok(outcome?.after(&said))
}

/// Four processes go on opening connections, more than wait to be accepted.
pub(super) async fn full_queue(scene: &Scene) -> anyhow::Result<Outcome> {
    // On the host's network, where all wait in one queue: a pod's own network has one of its own.
    let intercepted = ("podgate.dev/imds", "intercept");
    let victim = scene.lab.add_pod(&on_host_network(scene.victim_spec(), intercepted))?;
    scene.until_served(&victim).await?;
    let attacker = scene.lab.add_pod(&on_host_network(scene.attacker_spec(), intercepted))?;
    limit_files(scene).await?;
    let act = Act::ChurnConnections { to: POD_IDENTITY, count: 800 };
    let processes = (0..4).map(|_| scene.must_begin(Place::In(&attacker), &act));
    let processes = try_join_all(processes).await?;
    let outcome = scene.unharmed(&victim).await;
    let mut opened = 0;
    for process in processes {
        opened += process.finish().await?.number.unwrap_or_default();
    }
    Ok(outcome?.after(&format!("{opened} connections opened")))
}

async fn limit_files(scene: &Scene) -> anyhow::Result<()> {
    scene
        .agent(async |agent| {
            let pid =
                Pid::from_raw(agent.process().pid.cast_signed()).context("BUG: the agent has no pid")?;
            let files = Rlimit { current: Some(AGENT_FILES), maximum: Some(AGENT_FILES) };
            prlimit(Some(pid), Resource::Nofile, files).context("cannot limit the agent's files")?;
            Ok(())
        })
        .await
}

pub(super) async fn raw_tcp(scene: &Scene) -> anyhow::Result<Outcome> {
    imds_by_hand(scene, Layer::Ip).await
}

pub(super) async fn packet_socket(scene: &Scene) -> anyhow::Result<Outcome> {
    imds_by_hand(scene, Layer::Link).await
}

async fn imds_by_hand(scene: &Scene, layer: Layer) -> anyhow::Result<Outcome> {
    let attacker = scene.attacker()?;
    let act = Act::Forge {
        from: address(&attacker)?,
        to: IMDS_V4,
        layer,
        tickets: vec![None],
        request: get(IMDS.ip(), &format!("{ROLES}{NODE_ROLE}"), ""),
    };
    let got = scene.act(Place::In(&attacker), &act).await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

pub(super) async fn datagram(scene: &Scene) -> anyhow::Result<Outcome> {
    knock(scene, Knock::Datagram).await
}

pub(super) async fn ping(scene: &Scene) -> anyhow::Result<Outcome> {
    knock(scene, Knock::Ping).await
}

async fn knock(scene: &Scene, how: Knock) -> anyhow::Result<Outcome> {
    let attacker = scene.attacker()?;
    let got = scene.act(Place::In(&attacker), &Act::Knock { to: IMDS_V4, how }).await?;
    Ok(match got.error {
        Some(error) => Outcome::nothing(error),
        None => Outcome::harm(got.said),
    })
}

/// An accomplice on the host's network, which sees what is on the node's wires.
fn sniffer(scene: &Scene) -> PodSpec {
    PodSpec { host_network: true, ..PodSpec::new(&scene.attacker_spec().namespace, "sniffer") }
}

/// A pod whose own kernel does not meddle with the handshakes that it makes by hand.
pub(super) fn deaf_attacker(scene: &Scene) -> anyhow::Result<Pod> {
    let attacker = scene.attacker()?;
    scene.lab.netns(&attacker)?.deafen(address(&attacker)?.into())?;
    Ok(attacker)
}

pub(super) async fn forge(
    scene: &Scene,
    attacker: &Pod,
    tickets: Vec<Option<u64>>,
) -> anyhow::Result<Outcome> {
    let act = Act::Forge {
        from: address(attacker)?,
        to: POD_IDENTITY_V4,
        layer: Layer::Link,
        tickets,
        request: get(POD_IDENTITY.ip(), PROGRAM, ""),
    };
    let got = scene.act(Place::In(attacker), &act).await?;
    Ok(scene.loot(&got, Some(attacker)))
}
