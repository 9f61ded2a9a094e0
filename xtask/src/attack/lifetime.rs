//! Attacks while the agent is not there: who asks without pause may not get the node's role in between.

use std::time::Duration;

use tokio::time::sleep;

use super::{
    IMDS,
    attacker::Act,
    scene::{Outcome, Place, Scene},
};

/// More than the programs wait for a beat.
const STALE: Duration = Duration::from_millis(2_500);
/// Enough for an attempt that waits for the agent in vain, and one after it.
const HANGS: Duration = Duration::from_secs(5);
/// Long enough for a few attempts.
const MOMENT: Duration = Duration::from_millis(500);

pub(super) async fn killed(scene: &Scene) -> anyhow::Result<Outcome> {
    meanwhile(scene, async || {
        scene.kill_agent().await?;
        sleep(STALE).await;
        scene.start_agent().await
    })
    .await
}

pub(super) async fn stopped(scene: &Scene) -> anyhow::Result<Outcome> {
    meanwhile(scene, async || {
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
    meanwhile(scene, async || {
        scene.agent(async |agent| agent.suspend()).await?;
        sleep(HANGS).await;
        scene.agent(async |agent| agent.resume()).await
    })
    .await
}

/// What a pod gets that asks IMDS without pause while something happens to the agent.
async fn meanwhile(
    scene: &Scene,
    happens: impl AsyncFnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let attacker = scene.attacker()?;
    let asking = scene.must_begin(Place::In(&attacker), &Act::ImdsForEver { to: IMDS }).await?;
    sleep(MOMENT).await;
    happens().await?;
    sleep(MOMENT).await;
    let got = asking.finish().await?;
    Ok(scene.loot(&got, Some(&attacker)))
}
