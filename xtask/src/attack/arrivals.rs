//! Attacks by pods that come at an unlucky moment, when no agent can learn of them, and ask for the node's role at once.
//! SDKs cache for hours what one answer got them.

use std::time::Duration;

use lab::{
    Pod, PodSpec,
    fault_injection::{Fault, Service},
};
use rustix::process::{Pid, setpriority_process};
use tokio::time::sleep;

use super::{
    IMDS,
    attacker::Act,
    scene::{Outcome, Place, Running, Scene},
};

/// Longer than the programs wait for a heartbeat.
const STALE: Duration = Duration::from_millis(2_500);
/// Long enough for a few attempts.
const MOMENT: Duration = Duration::from_millis(500);
/// How many pods come one after the other to a node whose agent has hardly any processor left.
const ARRIVALS: usize = 2;
/// Busy loops, on a machine with few processors.
const BUSY_LOOPS: usize = 8;
/// By its weight, 15 where others have 1,024, this leaves the agent 0.4 % of a processor next to four loops on each of two:
/// less than the 10m of its requests do next to pods that request the rest.
const NICEST: i32 = 19;

pub(super) async fn while_dead(scene: &Scene) -> anyhow::Result<Outcome> {
    scene.kill_agent().await?;
    arrive(scene, STALE, async || scene.start_agent().await).await
}

pub(super) async fn while_hung(scene: &Scene) -> anyhow::Result<Outcome> {
    scene.agent(async |agent| agent.suspend()).await?;
    arrive(scene, STALE, async || scene.agent(async |agent| agent.resume()).await).await
}

/// The agent lives, and its watches are silent.
pub(super) async fn while_blind(scene: &Scene) -> anyhow::Result<Outcome> {
    scene.lab.faults.set(Service::KubeApi, Fault::Hang);
    let outcome = arrive(scene, MOMENT, async || {
        scene.lab.faults.clear(Service::KubeApi);
        Ok(())
    })
    .await;
    // Also after an error: others use this node.
    scene.lab.faults.clear(Service::KubeApi);
    outcome
}

pub(super) async fn while_starved(scene: &Scene) -> anyhow::Result<Outcome> {
    let earlier = strict_pods(scene, "earlier")?;
    for pod in &earlier {
        scene.until_known(pod).await?;
    }
    let hog = scene.lab.add_pod(&scene.victim_spec())?;
    starve(scene).await?;
    let burning = scene.must_begin(Place::In(&hog), &Act::BurnCpu { threads: BUSY_LOOPS }).await?;
    let known = ask_for_ever(scene, &earlier).await?;
    let mut outcomes = Vec::new();
    for number in 0..ARRIVALS {
        let new = strict_pods(scene, &format!("new{number}"))?;
        let asking = ask_for_ever(scene, &new).await?;
        sleep(MOMENT).await;
        outcomes.extend(finish(scene, asking).await?);
    }
    outcomes.extend(finish(scene, known).await?);
    burning.finish().await?;
    Ok(Outcome::worst(outcomes))
}

/// What pods get that come now and ask without pause, as long as this lasts and until a while after the agent is well again.
async fn arrive(
    scene: &Scene,
    lasts: Duration,
    recover: impl AsyncFnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let asking = ask_for_ever(scene, &strict_pods(scene, "new")?).await?;
    sleep(lasts).await;
    recover().await?;
    sleep(MOMENT).await;
    Ok(Outcome::worst(finish(scene, asking).await?))
}

/// Pods that no cluster leaves the node's role to, whatever its mode: by an annotation of their own, and because the EKS
/// webhook gave them an identity.
fn strict_pods(scene: &Scene, name: &str) -> anyhow::Result<[Pod; 2]> {
    let annotated = scene.attacker_spec().annotation("podgate.dev/imds", "intercept");
    let injected = scene.attacker_spec().with_token();
    let add = |mut spec: PodSpec, kind: &str| {
        spec.name = format!("{name}-{kind}");
        scene.lab.add_pod(&spec)
    };
    Ok([add(annotated, "annotated")?, add(injected, "injected")?])
}

async fn ask_for_ever(scene: &Scene, pods: &[Pod; 2]) -> anyhow::Result<Vec<(Pod, Running)>> {
    let mut asking = Vec::new();
    for pod in pods {
        let running = scene.must_begin(Place::In(pod), &Act::ImdsForEver { to: IMDS }).await?;
        asking.push((pod.clone(), running));
    }
    Ok(asking)
}

async fn finish(scene: &Scene, asking: Vec<(Pod, Running)>) -> anyhow::Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    for (pod, running) in asking {
        let got = running.finish().await?;
        let attempts = got.number.unwrap_or_default();
        anyhow::ensure!(attempts > 0, "{} has not asked", pod.full_name());
        outcomes.push(scene.loot(&got, Some(&pod)).after(&format!("{}: {attempts} attempts", pod.name)));
    }
    Ok(outcomes)
}

/// Leaves the agent what nobody else wants of the processors.
async fn starve(scene: &Scene) -> anyhow::Result<()> {
    scene
        .agent(async |agent| {
            let process = procfs::process::Process::new(agent.process().pid.cast_signed())?;
            for task in process.tasks()? {
                setpriority_process(Pid::from_raw(task?.tid), NICEST)?;
            }
            Ok(())
        })
        .await
}
