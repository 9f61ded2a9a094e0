//! Attacks with tokens, and on those who send them.

use std::time::Duration;

use lab::{Pod, cluster::POD_IDENTITY_AUDIENCE, jwt::SigningKey};

use super::{
    POD_IDENTITY, PROGRAM,
    attacker::Act,
    get, network,
    scene::{Outcome, Place, Scene, ask, attacker, on_host_network},
};

/// Life of the tokens here.
const HOUR: Duration = Duration::from_hours(1);

pub(super) async fn forged_token(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = network::on_one_address(scene).await?;
    let claims =
        scene.lab.cluster.pod_claims(&victim.namespace, &victim.name, &[POD_IDENTITY_AUDIENCE], HOUR);
    let forged = SigningKey::generate().sign(&claims);
    let got = scene.act(Place::In(&attacker), &ask(POD_IDENTITY, &with_token(&forged))).await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

pub(super) async fn stolen_token(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let got =
        scene.act(Place::In(&attacker), &ask(POD_IDENTITY, &with_token(&token(scene, &victim)))).await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

pub(super) async fn joined_listener(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    let attacker = scene.lab.add_pod(&on_host_network(attacker(), ("podgate.dev/imds", "off")))?;
    let listener = match scene.begin(Place::In(&attacker), &Act::Join { at: POD_IDENTITY }).await? {
        Ok(listener) => listener,
        Err(got) => return Ok(Outcome::nothing(got.error.unwrap_or_default())),
    };
    let token = token(scene, &victim);
    scene.act(Place::In(&victim), &ask(POD_IDENTITY, &with_token(&token))).await?;
    let got = listener.finish().await?;
    Ok(if got.said.contains(&token) {
        Outcome::harm("the token of shop/victim")
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
