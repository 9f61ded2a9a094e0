//! Attacks on the sockets by which the agent talks to its own: a root pod that sees the node's files reaches them.

use anyhow::Context as _;
use jiff::{Timestamp, ToSpan as _};
use serde_json::{Value, json};

use super::{
    POD_IDENTITY, PROGRAM,
    attacker::Act,
    get,
    scene::{Outcome, Place, Scene, ask},
};

/// What the simulated EKS Auth's access keys begin with, and their length.
const ACCESS_KEY: (&str, usize) = ("ASIA", 20);

pub(super) async fn commands(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let pid = scene.agent(async |agent| Ok(agent.process().pid)).await?;
    // Where the kubelet keeps the volume, and by the agent's own eyes.
    let of_agent = format!("/proc/{pid}/root/run/podgate/podgate.sock");
    let paths = vec![scene.lab.node.place.agent_socket(), of_agent.into()];
    let whois = format!("/whois/{}", victim.sandbox.pid);
    let requests = ["/metrics", whois.as_str(), "/v1/credentials", "/"]
        .map(|path| format!("GET {path} HTTP/1.0\r\nHost: podgate\r\n\r\n"));
    let act = Act::AskSockets { paths, requests: requests.into() };
    let got = scene.act(Place::WithNode(&attacker), &act).await?;
    if got.status() == 200 {
        return Ok(Outcome::harm("what the agent tells its operators"));
    }
    Ok(scene.unharmed(&victim).await?.after(&got.refusal()))
}

pub(super) async fn asked_handover(scene: &Scene) -> anyhow::Result<Outcome> {
    let (_victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let path = scene.lab.node.place.handover().join("handover.sock");
    let got = scene.act(Place::WithNode(&attacker), &Act::AskHandover { path }).await?;
    let key = got.said.find(ACCESS_KEY.0).and_then(|at| got.said.get(at..at + ACCESS_KEY.1));
    Ok(match key.and_then(|key| scene.lab.eks_auth.issued(key)) {
        Some(issued) => Outcome::harm(format!("the role of {}/{}", issued.namespace, issued.service_account)),
        None => Outcome::nothing(got.refusal()),
    })
}

/// The attacker's own credentials are to be the victim's from the next agent on: what the victim writes with them, the
/// attacker reads.
pub(super) async fn offered_handover(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    scene.until_served(&attacker).await?;
    let request = get(POD_IDENTITY.ip(), PROGRAM, "");
    let own = scene.act(Place::In(&attacker), &ask(POD_IDENTITY, &request)).await?;
    let (_, body) = own.said.split_once("\r\n\r\n").context("the attacker has no credentials")?;
    let own: Value = serde_json::from_str(body)?;
    let entries = json!([{
        "pod": victim.uid,
        "namespace": victim.namespace,
        "service_account": victim.service_account,
        "access_key_id": own["AccessKeyId"],
        "secret_access_key": own["SecretAccessKey"],
        "session_token": own["Token"],
        "expiration": own["Expiration"],
        "obtained_at": Timestamp::now(),
        "account_id": own["AccountId"],
        "partition": "aws",
        "role": attacker.role,
        "refresh_at": Timestamp::now() + 1.hour(),
        "asked": true,
    }]);
    let path = scene.lab.node.place.handover().join("handover.sock");
    let act = Act::OfferHandover { path, entries: entries.to_string() };
    let offer = scene.must_begin(Place::WithNode(&attacker), &act).await?;
    scene.start_agent().await?;
    let outcome = scene.unharmed(&victim).await;
    offer.finish().await?;
    outcome
}
