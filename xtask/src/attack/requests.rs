//! Attacks by HTTP: a pod is tricked into asking, and the answer is somebody else's.

use super::{
    IMDS, POD_IDENTITY, PROGRAM, ROLES,
    attacker::Act,
    get,
    scene::{Outcome, Place, Scene, ask},
};

/// The name of the attacker's page.
const PAGE: &str = "rebound.example";
/// What a proxy adds.
const FORWARDED: &str = "X-Forwarded-For: 203.0.113.7\r\n";

pub(super) async fn rebound_name(scene: &Scene) -> anyhow::Result<Outcome> {
    one_of(scene, &[format!("GET {PROGRAM} HTTP/1.1\r\nHost: {PAGE}\r\nConnection: close\r\n\r\n")]).await
}

pub(super) async fn rebound_imds(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    let headers = format!("Origin: http://{PAGE}\r\nSec-Fetch-Site: same-origin\r\n");
    let got = scene.act(Place::In(&victim), &Act::Imds { to: IMDS, headers }).await?;
    Ok(scene.loot(&got, None))
}

pub(super) async fn absolute_form(scene: &Scene) -> anyhow::Result<Outcome> {
    let address = POD_IDENTITY.ip().to_string();
    let requests = [(PAGE, &*address), (&*address, PAGE)].map(|(line, host)| {
        format!("GET http://{line}{PROGRAM} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
    });
    let twice =
        format!("GET {PROGRAM} HTTP/1.1\r\nHost: {address}\r\nHost: {PAGE}\r\nConnection: close\r\n\r\n");
    one_of(scene, &[&requests[..], &[twice]].concat()).await
}

pub(super) async fn tricked_server(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    let role = victim.role.as_deref().unwrap_or_default();
    let request = get(IMDS.ip(), &format!("{ROLES}{role}"), "");
    let got = scene.act(Place::In(&victim), &ask(IMDS, &request)).await?;
    Ok(scene.loot(&got, None))
}

pub(super) async fn other_dialect(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    // What IMDSv2 is there against: a GET, without a header of its own.
    let request = get(POD_IDENTITY.ip(), PROGRAM, "");
    let got = scene.act(Place::In(&victim), &ask(IMDS, &request)).await?;
    Ok(scene.loot(&got, None))
}

pub(super) async fn smuggled_request(scene: &Scene) -> anyhow::Result<Outcome> {
    let inner = get(POD_IDENTITY.ip(), PROGRAM, "");
    let host = POD_IDENTITY.ip();
    let length = inner.len();
    let outer = format!(
        "GET {PROGRAM} HTTP/1.1\r\nHost: {host}\r\n{FORWARDED}Content-Length: {length}\r\n\r\n{inner}"
    );
    one_of(scene, &[outer]).await
}

/// Whether a pod that is made to send one of these gets credentials.
async fn one_of(scene: &Scene, requests: &[String]) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    let mut outcome = Outcome::nothing("nothing was tried");
    for request in requests {
        let got = scene.act(Place::In(&victim), &ask(POD_IDENTITY, request)).await?;
        outcome = scene.loot(&got, None);
        if outcome.is_harm {
            break;
        }
    }
    Ok(outcome)
}
