//! Attacks with tokens, and on those who send them.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use lab::{Pod, cgroupfs, cluster::POD_IDENTITY_AUDIENCE, jwt::SigningKey};

use super::{
    OWN, POD_IDENTITY, PROGRAM,
    attacker::Act,
    fetches, get, network,
    scene::{Outcome, Place, Scene, ask, http, on_host_network},
};

/// Life of the tokens here.
const HOUR: Duration = Duration::from_hours(1);
/// Where a mesh sends what its pod connects to.
const SIDECAR: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15_001);

pub(super) async fn forged_token(scene: &Scene) -> anyhow::Result<Outcome> {
    // Anonymous, because the kernel attests every pod: a process of the node, in none.
    let (victim, _) = network::on_one_address(scene).await?;
    let claims =
        scene.lab.cluster.pod_claims(&victim.namespace, &victim.name, &[POD_IDENTITY_AUDIENCE], HOUR);
    let forged = SigningKey::generate().sign(&claims);
    let got = scene.act(Place::OnNode, &ask(POD_IDENTITY, &with_token(&forged))).await?;
    Ok(scene.loot(&got, None))
}

pub(super) async fn stolen_token(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let got =
        scene.act(Place::In(&attacker), &ask(POD_IDENTITY, &with_token(&token(scene, &victim)))).await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

pub(super) async fn stolen_token_at_own_pair(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let got = scene.act(Place::In(&attacker), &ask(OWN, &with_token(&token(scene, &victim)))).await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

/// A pod that leaves itself to the EKS Pod Identity Agent: its connections are not redirected.
pub(super) async fn stolen_token_of_one_left_alone(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    let left_alone = scene.attacker_spec().annotation("podgate.dev/pod-identity", "off");
    let attacker = scene.lab.add_pod(&left_alone)?;
    scene.until_known(&attacker).await?;
    let request = with_token(&token(scene, &victim));
    let mut outcomes = Vec::new();
    for to in fetches::CONTAINER {
        let got = scene.act(Place::In(&attacker), &ask(to, &request)).await?;
        outcomes.push(scene.loot(&got, Some(&attacker)).after(&to.to_string()));
    }
    Ok(Outcome::worst(outcomes))
}

pub(super) async fn stolen_token_by_sidecar(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let container = scene.lab.node.place.cgroups.container(&attacker.cgroup, &"5".repeat(64));
    cgroupfs::create(&container)?;
    let sidecar = Pod { container, ..attacker.clone() };
    let sidecar =
        scene.must_begin(Place::In(&sidecar), &Act::Relay { at: SIDECAR, to: POD_IDENTITY }).await?;
    let request = get(POD_IDENTITY.ip(), PROGRAM, "");
    let own = scene.act(Place::In(&attacker), &ask(SIDECAR, &request)).await?;
    let own = scene.loot(&own, Some(&attacker));
    if own.got != "its own role" {
        return Ok(Outcome::harm(format!("{} for its own pod", own.got)));
    }
    let got = scene.act(Place::In(&attacker), &ask(SIDECAR, &with_token(&token(scene, &victim)))).await?;
    sidecar.finish().await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

pub(super) async fn joined_listener(scene: &Scene) -> anyhow::Result<Outcome> {
    listen(scene, POD_IDENTITY, async || Ok(())).await
}

pub(super) async fn wildcard_listener(scene: &Scene) -> anyhow::Result<Outcome> {
    listen(scene, http(Ipv4Addr::UNSPECIFIED.into()), async || scene.kill_agent().await).await
}

/// Whether a pod on the host's network that listens gets another pod's token, before something happens and after.
async fn listen(
    scene: &Scene,
    at: SocketAddr,
    happens: impl AsyncFnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    let attacker = scene.lab.add_pod(&on_host_network(scene.attacker_spec(), ("podgate.dev/imds", "off")))?;
    let listener = match scene.begin(Place::In(&attacker), &Act::Join { at }).await? {
        Ok(listener) => listener,
        Err(got) => return Ok(Outcome::nothing(got.error.unwrap_or_default())),
    };
    let token = token(scene, &victim);
    let asks = ask(POD_IDENTITY, &with_token(&token));
    scene.act(Place::In(&victim), &asks).await?;
    happens().await?;
    scene.act(Place::In(&victim), &asks).await?;
    let got = listener.finish().await?;
    Ok(if got.said.contains(&token) {
        Outcome::harm(format!("the token of {}", victim.full_name()))
    } else {
        Outcome::nothing("no connection")
    })
}

fn token(scene: &Scene, pod: &Pod) -> String {
    scene.lab.cluster.mint_pod_token(&pod.namespace, &pod.name, &[POD_IDENTITY_AUDIENCE], HOUR)
}

fn with_token(token: &str) -> String {
    get(POD_IDENTITY.ip(), PROGRAM, &format!("Authorization: {token}\r\n"))
}
