//! Attacks by requests that somebody else makes: a server in a pod that fetches URLs, the kubelet with its probes and hooks, a
//! process of the node in a pod's network. At every address at which podgate answers.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::{Duration, Instant},
};

use agent_common::net::{ECS_V4, IMDS_V4, POD_IDENTITY_V6};
use anyhow::bail;
use lab::{NODE_ROLE, Pod};
use procfs::{net::TcpState, process::Process};
use tokio::time::sleep;

use super::{
    IMDS, IMDS6, OWN, POD_IDENTITY, PROGRAM, ROLES,
    attacker::{self, Act, Route},
    get, network, request,
    scene::{Outcome, Place, Scene, ask, http},
};

/// What a proxy adds.
const FORWARDED: &str = "X-Forwarded-For: 203.0.113.7\r\n";
/// Podgate's own IPv6 address.
const OWN6: SocketAddr = http(IpAddr::V6(Ipv6Addr::new(0xfd70, 0x6f64, 0x6761, 0x7465, 0, 0, 0, 1)));
/// Where pods ask for credentials, but for IMDS and the listeners in their own networks.
pub(super) const CONTAINER: [SocketAddr; 5] =
    [POD_IDENTITY, http(IpAddr::V6(POD_IDENTITY_V6)), http(IpAddr::V4(ECS_V4)), OWN, OWN6];
/// How long the agent may take until it listens in a pod's network.
const SET_UP: Duration = Duration::from_secs(30);
const RETRY_DELAY: Duration = Duration::from_millis(20);

/// A server that has a token of its own, which whoever makes it fetch a URL has not.
pub(super) async fn fetched_url(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.lab.add_pod(&scene.attacker_spec().with_token())?;
    scene.until_known(&victim).await?;
    let own = own_listeners(&victim).await?;
    let mut outcomes = Vec::new();
    for to in CONTAINER.iter().chain(&own) {
        outcomes.push(fetch(scene, &victim, *to, PROGRAM, "").await?);
    }
    let role = victim.role.as_deref().unwrap_or_default();
    for to in [IMDS, IMDS6].iter().chain(&own) {
        for role in [role, NODE_ROLE] {
            outcomes.push(fetch(scene, &victim, *to, &format!("{ROLES}{role}"), "").await?);
        }
    }
    Ok(Outcome::worst(outcomes))
}

/// A server that passes requests on, whole, and says for whom.
pub(super) async fn open_proxy(scene: &Scene) -> anyhow::Result<Outcome> {
    let victim = scene.victim().await?;
    let own = own_listeners(&victim).await?;
    let mut outcomes = Vec::new();
    for to in [IMDS, IMDS6] {
        let got = scene.act(Place::In(&victim), &Act::Imds { to, headers: FORWARDED.to_owned() }).await?;
        outcomes.push(scene.loot(&got, None).after(&to.to_string()));
    }
    for to in CONTAINER.iter().chain(&own) {
        outcomes.push(fetch(scene, &victim, *to, PROGRAM, FORWARDED).await?);
    }
    Ok(Outcome::worst(outcomes))
}

async fn fetch(
    scene: &Scene,
    from: &Pod,
    to: SocketAddr,
    path: &str,
    headers: &str,
) -> anyhow::Result<Outcome> {
    let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n{headers}Connection: close\r\n\r\n", url(to));
    let got = scene.act(Place::In(from), &ask(to, &request)).await?;
    Ok(scene.loot(&got, None).after(&to.to_string()))
}

/// A tenant's pod may have the kubelet ask any host and port, with any headers.
pub(super) async fn probed_by_kubelet(scene: &Scene) -> anyhow::Result<Outcome> {
    let (_victim, _) = network::on_one_address(scene).await?;
    let kubelet = scene.lab.node.place.cgroups.system().join("kubelet.service");
    let on_node = listeners(scene.lab.node.place.keeper.pid)?;
    let on_loopback = on_node.into_iter().map(|at| match at.ip() {
        ip if ip.is_unspecified() => SocketAddr::new(Ipv4Addr::LOCALHOST.into(), at.port()),
        _ => at,
    });
    // The real IMDS is the node's own, and the kubelet of the node.
    let addresses: Vec<_> = CONTAINER
        .into_iter()
        .chain(on_loopback)
        .filter(|at| ![IMDS.ip(), IMDS6.ip()].contains(&at.ip()))
        .collect();
    let mut outcomes = Vec::new();
    for to in addresses {
        for host in [url(to), POD_IDENTITY.ip().to_string()] {
            let route = Route { to, from_port: None, cgroup: Some(kubelet.clone()) };
            let request = format!("GET {PROGRAM} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
            let got = scene.act(Place::OnNode, &Act::Ask { route, request }).await?;
            outcomes.push(scene.loot(&got, None).after(&to.to_string()));
        }
    }
    Ok(Outcome::worst(outcomes))
}

/// `kubectl port-forward`, and whatever else of the node or of another pod comes into a pod's network.
pub(super) async fn port_forward(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, proxy) = (scene.victim().await?, scene.attacker()?);
    let own = own_listeners(&victim).await?;
    // Who is known at an address has been there.
    for to in &own {
        let got = scene.act(Place::In(&victim), &ask(*to, &get(POD_IDENTITY.ip(), PROGRAM, ""))).await?;
        anyhow::ensure!(!got.access_keys().is_empty(), "the pod itself is not served at {to}: {got:?}");
    }
    let mut outcomes = Vec::new();
    for place in [Place::Beside(&victim), Place::Through(&proxy, &victim)] {
        for to in &own {
            for host in [url(*to), POD_IDENTITY.ip().to_string()] {
                let request = format!("GET {PROGRAM} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
                let got = scene.act(place, &ask(*to, &request)).await?;
                outcomes.push(scene.loot(&got, None).after(&to.to_string()));
            }
            outcomes.push(imds_at(scene, place, *to, &victim).await?);
        }
    }
    Ok(Outcome::worst(outcomes))
}

/// IMDSv2 at an address that is not IMDS's.
async fn imds_at(scene: &Scene, place: Place<'_>, to: SocketAddr, pod: &Pod) -> anyhow::Result<Outcome> {
    let host = IpAddr::V4(IMDS_V4);
    let put = request("PUT", host, "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n");
    let got = scene.act(place, &ask(to, &put)).await?;
    let body = got.said.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
    let Some(session) = body.filter(|_| got.status() == 200) else {
        return Ok(Outcome::nothing(got.refusal()).after(&to.to_string()));
    };
    let path = format!("{ROLES}{}", pod.role.as_deref().unwrap_or_default());
    let asks = get(host, &path, &format!("X-aws-ec2-metadata-token: {session}\r\n"));
    let got = scene.act(place, &ask(to, &asks)).await?;
    Ok(scene.loot(&got, None).after(&to.to_string()))
}

/// Where podgate listens in a pod's own network, once it does in both families.
async fn own_listeners(pod: &Pod) -> anyhow::Result<[SocketAddr; 2]> {
    let begun = Instant::now();
    loop {
        let listeners: Vec<_> = listeners(pod.sandbox.pid)?;
        let of = |ip: IpAddr| listeners.iter().copied().find(|at| at.ip() == ip);
        match (of(Ipv4Addr::LOCALHOST.into()), of(Ipv6Addr::LOCALHOST.into())) {
            (Some(v4), Some(v6)) => return Ok([v4, v6]),
            _ if begun.elapsed() > SET_UP => bail!("nobody listens in the network of {}", pod.full_name()),
            _ => sleep(RETRY_DELAY).await,
        }
    }
}

/// Where somebody listens in a process's network.
fn listeners(pid: u32) -> anyhow::Result<Vec<SocketAddr>> {
    let process = Process::new(pid.cast_signed())?;
    let sockets = process.tcp()?.into_iter().chain(process.tcp6()?);
    let listening = sockets.filter(|socket| socket.state == TcpState::Listen);
    Ok(listening.map(|socket| socket.local_address).collect())
}

/// A URL's host and port.
fn url(to: SocketAddr) -> String {
    let host = attacker::host(to.ip());
    if to.port() == 80 { host } else { format!("{host}:{}", to.port()) }
}
