//! Attacks by the translation of addresses: the node's, which Services and host ports have for everybody, and a pod's own.
//!
//! Owns the rules, which leave the node with the attempt.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use agent_common::net::{IMDS_V4, IMDS_V6, POD_IDENTITY_V4};
use lab::{
    Pod,
    simulated_network::{NetNs, node_addresses},
};
use tokio::time::sleep;

use super::{
    POD_IDENTITY, PROGRAM,
    attacker::Act,
    get, packets,
    scene::{Outcome, Place, Scene, address, ask, http, on_host_network},
};

/// A Service's addresses.
const SERVICE_V4: Ipv4Addr = Ipv4Addr::new(10, 100, 0, 77);
const SERVICE_V6: Ipv6Addr = Ipv6Addr::new(0xfd20, 0, 0, 0, 0, 0, 0, 0x77);
/// Where a thief's pod lets connections come that it does not answer.
const SWALLOWS: u16 = 8080;
/// Longer than the agent takes to listen in a new pod's network.
const LISTENS: Duration = Duration::from_secs(1);

/// Rules of the node's packet filter, as long as this is.
struct Rules<'a>(&'a NetNs);

// === impl Rules ===

impl<'a> Rules<'a> {
    /// Loads a chain of this type, at this hook and of this priority.
    fn load(scene: &'a Scene, kind: &str, rules: &str) -> anyhow::Result<Self> {
        let node = &scene.lab.node.netns;
        node.load_rules(&format!("table inet attack {{ chain attack {{ type {kind}; {rules}; }}; }}"))?;
        Ok(Self(node))
    }
}

impl Drop for Rules<'_> {
    fn drop(&mut self) {
        // With rules that stay, the node serves nobody any more, and the next attempt says so.
        let _ = self.0.load_rules("delete table inet attack");
    }
}

pub(super) async fn service(scene: &Scene) -> anyhow::Result<Outcome> {
    let rule = format!("ip daddr {SERVICE_V4} tcp dport 80 dnat ip to {IMDS_V4}:80");
    through_service(scene, &rule, SERVICE_V4.into()).await
}

pub(super) async fn service_over_ipv6(scene: &Scene) -> anyhow::Result<Outcome> {
    let rule = format!("ip6 daddr {SERVICE_V6} tcp dport 80 dnat ip6 to [{IMDS_V6}]:80");
    through_service(scene, &rule, SERVICE_V6.into()).await
}

async fn through_service(scene: &Scene, rule: &str, at: IpAddr) -> anyhow::Result<Outcome> {
    let attacker = scene.attacker()?;
    let _rules = Rules::load(scene, "nat hook prerouting priority -100", rule)?;
    imds(scene, &attacker, at).await
}

/// Behind everything that sees a pod's packets in the pod, the pod itself writes IMDS's address into them.
pub(super) async fn rewritten(scene: &Scene) -> anyhow::Result<Outcome> {
    const ANY: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 9);
    let attacker = scene.attacker()?;
    let chain = |hook: &str, field: &str, from: Ipv4Addr, to: Ipv4Addr| {
        format!(
            "chain {hook} {{ type filter hook {hook} device eth0 priority 0; \
             ip {field} {from} ip {field} set {to}; }}"
        )
    };
    let (out, back) = (chain("egress", "daddr", ANY, IMDS_V4), chain("ingress", "saddr", IMDS_V4, ANY));
    scene.lab.netns(&attacker)?.load_rules(&format!("table netdev attack {{ {out}; {back}; }}"))?;
    imds(scene, &attacker, ANY.into()).await
}

async fn imds(scene: &Scene, attacker: &Pod, at: IpAddr) -> anyhow::Result<Outcome> {
    let got = scene.act(Place::In(attacker), &Act::Imds { to: http(at), headers: String::new() }).await?;
    Ok(scene.loot(&got, Some(attacker)))
}

/// A host port takes pods' connections to podgate, whose handshakes the thief does not answer but repeats.
pub(super) async fn stolen_on_its_way(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    let from = address(&victim)?;
    steal(scene, "nat hook prerouting priority -100", &victim, from).await
}

/// The same of a pod on the host's network, whose connections the node translates where they begin.
pub(super) async fn stolen_from_host_network(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = on_host_network(scene.victim_spec(), ("podgate.dev/imds", "intercept"));
    let victim = scene.lab.add_pod(&victim)?;
    scene.until_served(&victim).await?;
    // What a node connects to at an address of its own has this address itself.
    steal(scene, "nat hook output priority -100", &victim, POD_IDENTITY_V4).await
}

async fn steal(scene: &Scene, kind: &str, victim: &Pod, from: Ipv4Addr) -> anyhow::Result<Outcome> {
    let thief = packets::deaf_attacker(scene)?;
    let pod = address(&thief)?;
    let rule =
        format!("ip saddr != {pod} ip daddr {POD_IDENTITY_V4} tcp dport 80 dnat ip to {pod}:{SWALLOWS}");
    let _rules = Rules::load(scene, kind, &rule)?;
    let sniffer = scene.must_begin(Place::In(&thief), &Act::Sniff { from }).await?;
    let act = Act::BeginConnects { to: vec![POD_IDENTITY], count: 1 };
    let under_way = scene.must_begin(Place::In(victim), &act).await?;
    let outcome = match sniffer.finish().await?.number {
        Some(ticket) => packets::forge(scene, &thief, vec![Some(ticket)]).await,
        None => Ok(Outcome::nothing(packets::UNSEEN)),
    };
    under_way.finish().await?;
    outcome
}

/// A host port takes pods' connections to podgate, and leads to a pod that answers none.
pub(super) async fn host_port(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, other) = (scene.victim().await?, scene.attacker()?);
    let rule = format!("ip daddr {POD_IDENTITY_V4} tcp dport 80 dnat ip to {}:80", address(&other)?);
    let _rules = Rules::load(scene, "nat hook prerouting priority -100", &rule)?;
    scene.unharmed(&victim).await
}

/// All pods have the node's own address for the node itself.
pub(super) async fn masqueraded(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    sleep(LISTENS).await;
    let rule = format!("ip daddr {POD_IDENTITY_V4} tcp dport 80 snat ip to {}", node_addresses().v4);
    let _rules = Rules::load(scene, "nat hook input priority 100", &rule)?;
    scene.until_served(&victim).await?;
    let left_alone = scene.attacker_spec().annotation("podgate.dev/pod-identity", "off");
    let attacker = scene.lab.add_pod(&left_alone)?;
    let request = get(POD_IDENTITY.ip(), PROGRAM, "");
    let got = scene.act(Place::In(&attacker), &ask(POD_IDENTITY, &request)).await?;
    Ok(scene.loot(&got, Some(&attacker)))
}
