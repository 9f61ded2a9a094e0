//! Credentials near their end: clients that go on asking their SDK have fresh ones all the time.
//!
//! Owns how long the simulated EKS Auth lets credentials live here, and the proof: what an SDK shows is good by the records
//! of who issued it, at every moment, beyond the end of what it had at first.

use std::{collections::BTreeSet, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use futures::future::join_all;
use jiff::Timestamp;
use lab::simulated_network::Routing;
use tokio::time::{Instant, sleep};

use super::{
    Subject,
    cell::Owner,
    column::{Column, PodKind},
    process::Answer,
    progress::Progress,
    scene::{Found, Scene},
};

/// Less than any SDK's window before the end in which it asks for new ones, and more than the minute in which the Java
/// SDK v2 takes them for ended.
const LIFE: Duration = Duration::from_secs(100);
/// Past the end of the first ones.
const WATCHED: Duration = Duration::from_secs(115);
const RETRY_DELAY: Duration = Duration::from_secs(1);
const COLUMN: Column = Column::Refresh;

/// A node on which credentials do not live long.
pub(super) async fn node(binary: &Path, subjects: &[Subject], progress: &Progress) -> anyhow::Result<Found> {
    let keepers = subjects.iter().filter(|subject| subject.client.keeps);
    let scene = Scene::up("refresh", Routing::VpcCni, subjects, &[PodKind::Injected], progress)?;
    scene.lab.eks_auth.set_session(LIFE);
    let agent = scene.start_agent(binary).await?;
    let reads = scene.lab.imds.credential_reads();
    let cells = join_all(
        keepers.map(async |subject| scene.judge(subject, COLUMN, &keep_asking(&scene, subject).await)),
    )
    .await;
    let leaks = scene.lab.imds.credential_reads() - reads;
    agent.stop().await?;
    scene.down()?;
    Ok(Found { cells, leaks })
}

/// What a client goes on asking for is good; its last answer.
async fn keep_asking(scene: &Scene<'_>, subject: &Subject) -> anyhow::Result<Answer> {
    let pod = scene.pod(subject, COLUMN)?;
    let mut client = scene.start(subject, COLUMN, &["keep"])?;
    let mut answer = client.answer().await?;
    let began = Instant::now();
    let mut keys = BTreeSet::new();
    while let Some(key) = answer.access_key_id.clone() {
        if scene.owner(pod, Some(&key)) != Some(Owner::Pod) {
            break;
        }
        let issued = scene.lab.eks_auth.issued(&key).context("BUG: a pod's own key was issued")?;
        let late = Timestamp::now().duration_since(issued.expiration);
        ensure!(!late.is_positive(), "shows credentials that ended {late:#} ago");
        keys.insert(key);
        if began.elapsed() > WATCHED {
            ensure!(keys.len() > 1, "BUG: nothing that lives {LIFE:?} is good for {WATCHED:?}");
            break;
        }
        sleep(RETRY_DELAY).await;
        answer = client.again().await?;
    }
    Ok(answer)
}
