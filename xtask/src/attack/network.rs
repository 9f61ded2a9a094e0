//! Attacks with addresses and networks: shared ones, reused ones, other pods', other families.

use std::{
    net::{Ipv6Addr, SocketAddr},
    time::Duration,
};

use agent_common::net::IMDS_V4;
use anyhow::bail;
use lab::Pod;
use tokio::time::sleep;

use super::{
    IMDS6, POD_IDENTITY, PROGRAM,
    attacker::{Act, Route},
    get,
    scene::{Outcome, Place, Scene, ask, http, on_host_network},
};

/// The port that two pods with one address use one after the other.
const PORT: u16 = 40_000;
/// Longer than the node takes to be rid of a pod's netdev.
const CLEARED: Duration = Duration::from_millis(500);

pub(super) async fn absent_ticket(scene: &Scene) -> anyhow::Result<Outcome> {
    let (_victim, attacker) = on_one_address(scene).await?;
    let got = scene.act(Place::In(&attacker), &ask(POD_IDENTITY, &program())).await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

pub(super) async fn reused_port(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = on_one_address(scene).await?;
    let act = from_port();
    let got = scene.act(Place::In(&victim), &act).await?;
    if scene.loot(&got, Some(&victim)).got != "its own role" {
        bail!("the victim was not served: {got:?}");
    }
    let got = scene.act(Place::In(&attacker), &act).await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

pub(super) async fn reused_address(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    scene.lab.complete_pod(&victim)?;
    // The netdev of the pod that has ended goes a moment later.
    sleep(CLEARED).await;
    let heir = scene.lab.add_pod_at(&scene.attacker_spec(), &victim)?;
    let got = scene.act(Place::In(&heir), &ask(POD_IDENTITY, &program())).await?;
    Ok(scene.loot(&got, Some(&heir)))
}

pub(super) async fn doubled_address(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let act = from_port();
    scene.act(Place::In(&victim), &act).await?;
    scene.lab.double(&victim, &attacker)?;
    let got = scene.act(Place::In(&attacker), &act).await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

pub(super) async fn from_the_node(scene: &Scene) -> anyhow::Result<Outcome> {
    let (_victim, _) = on_one_address(scene).await?;
    let got = scene.act(Place::OnNode, &ask(POD_IDENTITY, &program())).await?;
    Ok(scene.loot(&got, None))
}

pub(super) async fn beside_a_pod(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    let got = scene.act(Place::Beside(&victim), &ask(POD_IDENTITY, &program())).await?;
    Ok(scene.loot(&got, None))
}

pub(super) async fn foreign_network(scene: &Scene) -> anyhow::Result<Outcome> {
    let (application, proxy) = (scene.victim().await?, scene.attacker()?);
    let got = scene.act(Place::Through(&proxy, &application), &ask(POD_IDENTITY, &program())).await?;
    // The proxy connects for the application, which would get the proxy's role.
    Ok(scene.loot(&got, None))
}

pub(super) async fn ipv6(scene: &Scene) -> anyhow::Result<Outcome> {
    imds(scene, IMDS6).await
}

pub(super) async fn mapped(scene: &Scene) -> anyhow::Result<Outcome> {
    let mapped: Ipv6Addr = IMDS_V4.to_ipv6_mapped();
    imds(scene, http(mapped.into())).await
}

async fn imds(scene: &Scene, to: SocketAddr) -> anyhow::Result<Outcome> {
    let attacker = scene.attacker()?;
    let got = scene.act(Place::In(&attacker), &Act::Imds { to, headers: String::new() }).await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

/// Two pods on the host's network: one that podgate serves, and one that it leaves alone.
pub(super) async fn on_one_address(scene: &Scene) -> anyhow::Result<(Pod, Pod)> {
    let victim =
        scene.lab.add_pod(&on_host_network(scene.victim_spec(), ("podgate.dev/imds", "intercept")))?;
    let attacker =
        scene.lab.add_pod(&on_host_network(scene.attacker_spec(), ("podgate.dev/pod-identity", "off")))?;
    scene.until_served(&victim).await?;
    Ok((victim, attacker))
}

/// One request, from the port.
fn from_port() -> Act {
    let route = Route { to: POD_IDENTITY, from_port: Some(PORT), cgroup: None };
    Act::Ask { route, request: program() }
}

fn program() -> String {
    get(POD_IDENTITY.ip(), PROGRAM, "")
}
