//! Attacks on who is taken for which pod: sockets that are older or somebody else's, cgroups of the attacker's making,
//! pods too new to be known, annotations.

use std::{path::PathBuf, time::Duration};

use lab::{
    NODE_ROLE, Pod, PodSpec,
    cgroupfs::{self, Qos},
    eks_agent_process::DAEMON_SET,
};
use tokio::time::sleep;

use super::{
    IMDS, POD_IDENTITY, PROGRAM, ROLES,
    attacker::{Act, Route},
    get,
    scene::{Outcome, Place, Scene, ask},
};

/// Longer than the node takes to hear of a pod.
const NEWS: Duration = Duration::from_millis(500);
/// A static pod's.
const CONFIG_HASH: &str = "fc407168c6823ed1e0a61410d6621724";

pub(super) async fn passed_socket(scene: &Scene) -> anyhow::Result<Outcome> {
    let path = scene.shared_file("socket");
    passed(scene, Act::GiveSocket { path: path.clone(), to: POD_IDENTITY }, path).await
}

/// Where podgate redirects connections: for a program that comes second this looks like the work of the first.
pub(super) async fn unsent_socket(scene: &Scene) -> anyhow::Result<Outcome> {
    let path = scene.shared_file("socket");
    passed(scene, Act::GiveUnsent { path: path.clone(), to: POD_IDENTITY }, path).await
}

async fn passed(scene: &Scene, give: Act, path: PathBuf) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let giver = scene.must_begin(Place::In(&victim), &give).await?;
    let take = Act::TakeSocket { path, to: POD_IDENTITY, request: program() };
    let got = scene.act(Place::In(&attacker), &take).await?;
    giver.finish().await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

pub(super) async fn earlier_socket(scene: &Scene) -> anyhow::Result<Outcome> {
    let attacker = scene.attacker()?;
    let request = get(IMDS.ip(), &format!("{ROLES}{NODE_ROLE}"), "");
    let connected = scene.must_begin(Place::In(&attacker), &Act::AskLater { to: IMDS, request }).await?;
    scene.start_agent().await?;
    let got = connected.finish().await?;
    Ok(scene.loot(&got, Some(&attacker)))
}

pub(super) async fn lookalike_cgroup(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let elsewhere = scene.lab.node.place.cgroups.root.join("elsewhere");
    from_cgroup(scene, &attacker, elsewhere.join(below_root(scene, &victim)?)).await
}

/// A container to which its cgroup is delegated makes what it likes below it: named like a pod by either driver, of any class.
pub(super) async fn nested_cgroup(scene: &Scene) -> anyhow::Result<Outcome> {
    let (victim, attacker) = (scene.victim().await?, scene.attacker()?);
    let systemd_uid = victim.uid.replace('-', "_");
    let id = "5".repeat(64);
    let names = [
        below_root(scene, &victim)?,
        format!("kubepods.slice/kubepods-pod{systemd_uid}.slice/cri-containerd-{id}.scope").into(),
        format!(
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{systemd_uid}.slice/cri-containerd-{id}.scope"
        )
        .into(),
        format!("kubepods/pod{}/{id}", victim.uid).into(),
        format!("kubepods/burstable/pod{}/{id}", victim.uid).into(),
    ];
    let mut outcomes = Vec::new();
    for name in names {
        outcomes.push(from_cgroup(scene, &attacker, attacker.container.join(name)).await?);
    }
    Ok(Outcome::worst(outcomes))
}

pub(super) async fn unknown_pod(scene: &Scene) -> anyhow::Result<Outcome> {
    let attacker = scene.lab.start_unannounced(&scene.attacker_spec())?;
    imds(scene, &attacker).await
}

pub(super) async fn loosening_annotation(scene: &Scene) -> anyhow::Result<Outcome> {
    let attacker = scene.lab.add_pod(&scene.attacker_spec().annotation("podgate.dev/imds", "off"))?;
    sleep(NEWS).await;
    imds(scene, &attacker).await
}

pub(super) async fn claimed_owner(scene: &Scene) -> anyhow::Result<Outcome> {
    let claims = PodSpec { daemon_set: Some(DAEMON_SET.to_owned()), ..scene.attacker_spec() };
    let attacker = scene.lab.add_pod(&claims)?;
    sleep(NEWS).await;
    imds(scene, &attacker).await
}

pub(super) async fn static_pod(scene: &Scene) -> anyhow::Result<Outcome> {
    let tenant = scene.attacker_spec().annotation("kubernetes.io/config.hash", CONFIG_HASH);
    let tenant = tenant.annotation("kubernetes.io/config.mirror", CONFIG_HASH);
    scene.lab.add_pod(&tenant)?;
    sleep(NEWS).await;
    // The kubelet names a static pod's cgroup by the hash. Such a pod is not the API server's.
    let started = scene.lab.start_unannounced(&PodSpec::new("kube-system", "static"))?;
    let cgroups = &scene.lab.node.place.cgroups;
    let cgroup = cgroups.pod(Qos::Burstable, CONFIG_HASH);
    let container = cgroups.container(&cgroup, &"5".repeat(64));
    cgroupfs::create(&container)?;
    let static_pod = Pod { cgroup, container, ..started };
    let got = scene.act(Place::In(&static_pod), &ask(POD_IDENTITY, &program())).await?;
    Ok(scene.loot(&got, None))
}

async fn imds(scene: &Scene, attacker: &Pod) -> anyhow::Result<Outcome> {
    let got = scene.act(Place::In(attacker), &Act::Imds { to: IMDS, headers: String::new() }).await?;
    Ok(scene.loot(&got, Some(attacker)))
}

/// Connects a socket of the attacker's pod from a cgroup of its own making.
async fn from_cgroup(scene: &Scene, attacker: &Pod, cgroup: PathBuf) -> anyhow::Result<Outcome> {
    let route = Route { to: POD_IDENTITY, from_port: None, cgroup: Some(cgroup) };
    let act = Act::Ask { route, request: program() };
    let got = scene.act(Place::In(attacker), &act).await?;
    Ok(scene.loot(&got, Some(attacker)))
}

/// `kubepods.slice/…`, as the kubelet names the pod's container.
fn below_root(scene: &Scene, pod: &Pod) -> anyhow::Result<PathBuf> {
    Ok(pod.container.strip_prefix(&scene.lab.node.place.cgroups.root)?.to_owned())
}

fn program() -> String {
    get(POD_IDENTITY.ip(), PROGRAM, "")
}
