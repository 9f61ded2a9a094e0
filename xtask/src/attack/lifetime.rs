//! Attacks while the agent is not there, or another takes its place: who asks without pause may not get the node's role in
//! between.

use std::time::Duration;

use anyhow::bail;
use lab::Pod;
use tokio::time::sleep;

use super::{
    IMDS,
    attacker::{self, Act},
    scene::{Outcome, Place, Scene, on_host_network},
};

/// More than the programs wait for a heartbeat.
const STALE: Duration = Duration::from_millis(2_500);
/// Enough for an attempt that waits for the agent unsuccessfully, and one after it.
const HANGS: Duration = Duration::from_secs(5);
/// Long enough for a few attempts.
const MOMENT: Duration = Duration::from_millis(500);

/// How often an agent is succeeded: what a successor leaves open is open for a moment only.
const SUCCESSIONS: usize = 3;
/// The same by an agent of another ABI and back.
const ABI_SUCCESSIONS: usize = 2;
/// Where whoever listens at every address is in the way of who listens at one.
const HTTP: u16 = 80;

/// What those who ask see of what happens to the agent.
#[derive(PartialEq, Eq)]
enum Sees {
    Refusals,
    Nothing,
}

pub(super) async fn killed(scene: &Scene) -> anyhow::Result<Outcome> {
    meanwhile(scene, Sees::Refusals, async || {
        scene.kill_agent().await?;
        sleep(STALE).await;
        scene.start_agent().await
    })
    .await
}

pub(super) async fn stopped(scene: &Scene) -> anyhow::Result<Outcome> {
    meanwhile(scene, Sees::Refusals, async || {
        scene
            .agent(async |agent| {
                agent.terminate()?;
                agent.wait().await
            })
            .await?;
        sleep(MOMENT).await;
        scene.start_agent().await
    })
    .await
}

pub(super) async fn hung(scene: &Scene) -> anyhow::Result<Outcome> {
    meanwhile(scene, Sees::Refusals, async || {
        scene.agent(async |agent| agent.suspend()).await?;
        sleep(HANGS).await;
        scene.agent(async |agent| agent.resume()).await
    })
    .await
}

pub(super) async fn succeeded(scene: &Scene) -> anyhow::Result<Outcome> {
    meanwhile(scene, Sees::Nothing, async || {
        for _ in 0..SUCCESSIONS {
            scene.succeed_agent().await?;
        }
        Ok(())
    })
    .await
}

pub(super) async fn succeeded_by_other_abi(scene: &Scene) -> anyhow::Result<Outcome> {
    meanwhile(scene, Sees::Nothing, async || {
        for _ in 0..ABI_SUCCESSIONS {
            scene.succeed_agent_by_other_abi().await?;
            scene.succeed_agent().await?;
        }
        Ok(())
    })
    .await
}

/// Somebody listens at every address, who could while no agent was there.
pub(super) async fn squatted_after_death(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    scene.kill_agent().await?;
    squatted(scene, &victim).await
}

/// The same on a node that has just been booted.
pub(super) async fn squatted_at_boot(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.lab.add_pod(&scene.victim_spec())?;
    squatted(scene, &victim).await
}

async fn squatted(scene: &Scene, victim: &Pod) -> anyhow::Result<Outcome> {
    let squatter = scene.lab.add_pod(&on_host_network(scene.attacker_spec(), ("podgate.dev/imds", "off")))?;
    let tenant = scene.lab.add_pod(&scene.tenant_spec())?;
    let squatting = scene.must_begin(Place::In(&squatter), &Act::Squat { port: HTTP }).await?;
    let started = scene.start_agent().await;
    let got = scene.act(Place::In(&tenant), &Act::Imds { to: IMDS, headers: String::new() }).await?;
    let loot = scene.loot(&got, Some(&tenant));
    let outcome = if loot.is_harm { loot } else { scene.unharmed(victim).await? };
    squatting.finish().await?;
    Ok(match started {
        Ok(()) => outcome,
        Err(_) => outcome.after("the agent does not start"),
    })
}

/// What a pod gets that asks IMDS without pause while something happens to the agent.
async fn meanwhile(
    scene: &Scene,
    sees: Sees,
    happens: impl AsyncFnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let attacker = scene.attacker()?;
    scene.until_served(&attacker).await?;
    let asking = scene.must_begin(Place::In(&attacker), &Act::ImdsForEver { to: IMDS }).await?;
    sleep(MOMENT).await;
    let began = attacker::now_ms();
    happens().await?;
    let time = began..attacker::now_ms();
    sleep(MOMENT).await;
    let got = asking.finish().await?;
    let outcome = scene.loot(&got, Some(&attacker));
    // The attempt that was under way when it began has met it too.
    let under_way = got.asked_at.range(..time.start).next_back().copied();
    let time = under_way.unwrap_or(time.start)..time.end;
    let (asked, refused) = (got.asked_at.range(time.clone()).count(), got.refused_at.range(time).count());
    if asked == 0 || sees == Sees::Refusals && refused == 0 && !outcome.is_harm {
        bail!("no attempt has met what happened to the agent: {asked} asked then, {refused} were refused");
    }
    let attempts = got.number.unwrap_or_default();
    Ok(outcome.after(&format!("{attempts} attempts")))
}
