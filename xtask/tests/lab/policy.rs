//! What operators, namespaces and pods may say about a pod's connections, and how soon it holds.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    path::PathBuf,
    thread,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail};
use lab::{
    Lab, NODE_ROLE, Pod, PodSpec,
    agent_process::ADMIN,
    cgroupfs::{self, Qos},
    cluster,
    fault_injection::{Fault, Service},
    simulated_network::NetNs,
    simulated_node::NODE_NAME,
};
use serde_json::Value;
use tokio::time::sleep;

use crate::lab_node::{self, Answer, Node, POD_IDENTITY, ROLES};

/// In which a change is to be in effect.
const SOON: Duration = Duration::from_secs(1);
/// Less than a kubelet takes from a pod's cgroup to its first container: sandbox and network come between.
const TO_FIRST_CONTAINER: Duration = Duration::from_millis(250);
/// More than the programs wait for a heartbeat.
const STALE: Duration = Duration::from_millis(2300);
/// Of a static pod's configuration.
const CONFIG_HASH: &str = "fc407168c6823ed1e0a61410d6621724";
/// `lo` is always the first netdev of a namespace.
const LO: u32 = 1;

/// Whom a pod reaches at the metadata service's address.
#[derive(Debug, PartialEq, Eq)]
enum Reached {
    RealService,
    Podgate,
    Nothing,
}

/// Asks for the node's role, as a client of IMDSv1 does.
async fn reached(node: &Node, pod: &Pod) -> anyhow::Result<Reached> {
    let answer = node.curl(pod, &[ROLES]).await?;
    Ok(match answer.status {
        200 if answer.body == NODE_ROLE => Reached::RealService,
        401 if answer.body.contains("podgate") => Reached::Podgate,
        0 if answer.milliseconds < 100.0 => Reached::Nothing,
        _ => bail!("{answer:?}"),
    })
}

/// Waits until the agent has said that this pod's policy is effective, with this mode and for this reason.
pub(crate) async fn effective(node: &Node, pod: &Pod, imds: &str, reason: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let said = last_policy(&node.agent.log, |line| line["pod.uid"] == pod.uid.as_str())?;
        if said.as_ref().is_some_and(|said| said["imds"] == imds && said["reason"] == reason) {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "{} is not {imds} for {reason}: {said:?}", pod.full_name());
        sleep(Duration::from_millis(5)).await;
    }
}

/// The agent's last word about a pod's policy.
fn last_policy(log: &PathBuf, of_pod: impl Fn(&Value) -> bool) -> anyhow::Result<Option<Value>> {
    let text = fs::read_to_string(log)?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    Ok(lines.filter(|line| line["message"] == "a pod's policy is effective" && of_pod(line)).last())
}

/// A pod of this namespace whose service account has the role `NAME-role`.
fn spec(namespace: &str, name: &str) -> PodSpec {
    PodSpec { namespace: namespace.to_owned(), ..lab_node::spec(name) }
}

/// Adds a pod to a namespace that has these annotations.
fn pod_of(node: &Node, spec: &PodSpec, namespace: &[(&str, &str)]) -> anyhow::Result<Pod> {
    let pod = node.lab.add_pod(spec)?;
    for (key, value) in namespace {
        node.lab.cluster.annotate_namespace(&spec.namespace, key, Some(value));
    }
    Ok(pod)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_loosens_and_tightens_above_the_floor() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "intercept", "--imds-floor", "audit"]).await?;
    for (mode, in_effect, reason, expected) in [
        ("off", "Audit", "Floor", Reached::RealService),
        ("audit", "Audit", "Namespace", Reached::RealService),
        ("deny", "Deny", "Namespace", Reached::Nothing),
    ] {
        let namespace = format!("says-{mode}");
        let pod = pod_of(&node, &spec(&namespace, "web"), &[("podgate.dev/imds", mode)])?;
        effective(&node, &pod, in_effect, reason).await?;
        assert_eq!(reached(&node, &pod).await?, expected, "{mode}");
    }
    let silent = node.pod("web")?;
    assert_eq!(reached(&node, &silent).await?, Reached::Podgate);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_tightens_and_loosens_only_where_its_namespace_lets_it() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let says = |namespace, mode| spec(namespace, mode).annotation("podgate.dev/imds", mode);
    for (spec, namespace, in_effect, reason, expected) in [
        (says("plain", "off"), &[][..], "Intercept", "Default", Reached::Podgate),
        (says("plain", "deny"), &[], "Deny", "Pod", Reached::Nothing),
        (
            says("trusted", "off"),
            &[("podgate.dev/imds-pod-override", "true")],
            "Off",
            "Pod",
            Reached::RealService,
        ),
    ] {
        let pod = pod_of(&node, &spec, namespace)?;
        effective(&node, &pod, in_effect, reason).await?;
        assert_eq!(reached(&node, &pod).await?, expected, "{}", pod.full_name());
    }
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn in_audit_a_pod_that_the_webhook_has_changed_is_intercepted() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "audit"]).await?;
    let injected = node.lab.add_pod(&lab_node::spec("modern").with_token())?;
    effective(&node, &injected, "Intercept", "Injected").await?;
    assert_eq!(reached(&node, &injected).await?, Reached::Podgate);
    let plain = node.pod("legacy")?;
    effective(&node, &plain, "Audit", "Default").await?;
    assert_eq!(reached(&node, &plain).await?, Reached::RealService);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_network_pod_is_left_alone_unless_it_is_asked_for() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "deny", "--imds-floor", "deny"]).await?;
    let on_host = |name| PodSpec { host_network: true, ..lab_node::spec(name) };
    let silent = node.lab.add_pod(&on_host("cni"))?;
    effective(&node, &silent, "Off", "HostNetwork").await?;
    assert_eq!(reached(&node, &silent).await?, Reached::RealService);
    let asked = node.lab.add_pod(&on_host("exporter").annotation("podgate.dev/imds", "intercept"))?;
    effective(&node, &asked, "Intercept", "Pod").await?;
    assert_eq!(reached(&node, &asked).await?, Reached::Podgate);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_annotation_that_cannot_be_read_makes_strict_and_is_reported() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "audit"]).await?;
    let of_pod = node.lab.add_pod(&lab_node::spec("typo").annotation("podgate.dev/imds", "of"))?;
    let of_namespace = pod_of(&node, &spec("vague", "web"), &[("podgate.dev/imds", "sometimes")])?;
    for pod in [&of_pod, &of_namespace] {
        effective(&node, pod, "Intercept", "Unreadable").await?;
        assert_eq!(reached(&node, pod).await?, Reached::Podgate, "{}", pod.full_name());
    }
    let log = node.agent.log_text()?;
    for [whose, value] in [["shop/typo", "\\\"of\\\""], ["vague", "\\\"sometimes\\\""]] {
        let reported = |line: &&str| {
            line.contains("WARN") && [whose, "podgate.dev/imds", value].iter().all(|word| line.contains(word))
        };
        assert!(log.lines().any(|line| reported(&line)), "{whose} {value}: {log}");
    }
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_allows_imdsv1_and_calls_without_a_token() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let lax = [("podgate.dev/imds-v1", "allow"), ("podgate.dev/tokenless", "allow")];
    let pod = pod_of(&node, &spec("old", "web").with_token(), &lax)?;
    let url = format!("{ROLES}web-role");
    let deadline = Instant::now() + SOON;
    let answer = loop {
        let answer = node.curl(&pod, &[&url]).await?;
        if answer.status == 200 || Instant::now() > deadline {
            break answer;
        }
    };
    node.assert_own_role(&pod, &answer);
    node.assert_own_role(&pod, &node.curl(&pod, &[POD_IDENTITY]).await?);
    let strict = node.lab.add_pod(&lab_node::spec("web").with_token())?;
    node.curl(&strict, &[&url]).await?.assert_refused(401, &["podgate.dev/imds-v1"]);
    let refusal = node.curl(&strict, &[POD_IDENTITY]).await?;
    assert!((400..500).contains(&refusal.status), "{refusal:?}");
    assert_eq!(refusal.access_key_id(), None, "{refusal:?}");
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_pod_identity_off_the_eks_agent_answers() -> anyhow::Result<()> {
    let lab = lab_node::lab()?;
    let address = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(169, 254, 170, 23)), 80);
    add_address(&lab.node.netns, address.ip())?;
    answer_as_the_eks_agent(lab.node.netns.listen(address)?);
    // The EKS Pod Identity Agent has its address, and podgate one of its own.
    let agent = lab.start_agent(&lab_node::agent(&["--imds", "intercept", "--target", "own"])?).await?;
    let node = Node { lab, agent };

    let moved = node.pod("moved")?;
    node.assert_own_role(&moved, &node.curl(&moved, &[POD_IDENTITY]).await?);
    let off = ("podgate.dev/pod-identity", "off");
    let by_pod = node.lab.add_pod(&lab_node::spec("waits").annotation(off.0, off.1))?;
    let by_namespace = pod_of(&node, &spec("later", "web"), &[off])?;
    for pod in [&by_pod, &by_namespace] {
        effective(&node, pod, "Intercept", "Default").await?;
        wait_for_eks_agent(&node, pod).await?;
        assert_eq!(reached(&node, pod).await?, Reached::Podgate, "IMDS is another matter");
    }
    // Where the namespace says `on`, a pod cannot leave.
    let held = spec("strict", "web").annotation(off.0, off.1);
    let held = pod_of(&node, &held, &[("podgate.dev/pod-identity", "on")])?;
    let is_held = |line: &Value| line["pod.uid"] == held.uid.as_str() && line["pod_identity"] == true;
    let begun = Instant::now();
    while last_policy(&node.agent.log, is_held)?.is_none() {
        assert!(begun.elapsed() < SOON, "{}", node.agent.log_tail());
        sleep(Duration::from_millis(5)).await;
    }
    node.assert_own_role(&held, &node.curl(&held, &[POD_IDENTITY]).await?);
    node.down().await
}

async fn wait_for_eks_agent(node: &Node, pod: &Pod) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let answer = node.curl(pod, &[POD_IDENTITY]).await?;
        if answer.body == "eks-agent" {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "{}: {answer:?}", pod.full_name());
    }
}

fn add_address(netns: &NetNs, address: IpAddr) -> anyhow::Result<()> {
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            Ok(handle.address().add(LO, address, 32).execute().await?)
        })
    })
}

fn answer_as_the_eks_agent(listener: TcpListener) {
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            // A head as short as curl's comes in one piece.
            let _ = stream.read(&mut [0; 4096]);
            let _ = stream
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\nconnection: close\r\n\r\neks-agent");
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn audit_counts_connections_and_off_does_not() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "audit"]).await?;
    let audited = node.pod("counted")?;
    effective(&node, &audited, "Audit", "Default").await?;
    let before = audits(&node).await?;
    assert_eq!(reached(&node, &audited).await?, Reached::RealService);
    assert_eq!(audits(&node).await?, before + 1);
    let off = pod_of(&node, &spec("quiet", "web"), &[("podgate.dev/imds", "off")])?;
    effective(&node, &off, "Off", "Namespace").await?;
    assert_eq!(reached(&node, &off).await?, Reached::RealService);
    assert_eq!(audits(&node).await?, before + 1);
    node.down().await
}

/// Connections in `audit` so far.
async fn audits(node: &Node) -> anyhow::Result<u64> {
    let metrics = node.lab.node.get(ADMIN, "/metrics").await?.body;
    let line = metrics.lines().find(|line| line.contains("event=\"audited\"")).context("no such counter")?;
    Ok(line.rsplit(' ').next().context("a metric without a number")?.parse()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_annotation_is_in_effect_within_a_second() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "audit"]).await?;
    let pod = node.pod("steady")?;
    effective(&node, &pod, "Audit", "Default").await?;
    // Connects without a pause until one is refused, and says when that was. One that is under way then loses its packets.
    let program = "import socket, time
while True:
    try: socket.create_connection(('169.254.169.254', 80), 0.2).close()
    except PermissionError: break
    except TimeoutError: pass
    time.sleep(0.001)
print(time.time())";
    let annotate = async {
        sleep(Duration::from_millis(300)).await;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        node.lab.cluster.annotate_namespace("shop", "podgate.dev/imds", Some("deny"));
        anyhow::Ok(now)
    };
    let (refused, annotated) = tokio::join!(node.python(&pod, program), annotate);
    let took = refused?.parse::<f64>()? - annotated?;
    println!("from a namespace's annotation to the first connection that meets it: {:.1} ms", took * 1000.0);
    assert!((0.0..1.0).contains(&took), "{took} s");
    node.down().await
}

/// Starts a pod that the API server does not show, and finds out how its connection to IMDS ends.
async fn reached_by_unknown(node: &Node, name: &str) -> anyhow::Result<String> {
    let pod = node.lab.start_unannounced(&lab_node::spec(name))?;
    let program = "import errno, socket
try: socket.create_connection(('169.254.169.254', 80), 5); print('connected')
except OSError as error: print(errno.errorcode[error.errno])";
    let end = node.python(&pod, program).await?;
    if end != "connected" {
        return Ok(end);
    }
    let answer = node.curl(&pod, &[ROLES]).await?;
    // An agent that has not seen the pod asks for patience.
    Ok(if answer.body == NODE_ROLE { NODE_ROLE.to_owned() } else { answer.status.to_string() })
}

#[tokio::test(flavor = "multi_thread")]
async fn in_audit_a_pod_that_nobody_knows_gets_no_imds_but_podgates() -> anyhow::Result<()> {
    // The setting, and what IMDS is for such a pod with an agent, with one whose watch hangs, and without.
    for (flags, alive, hanging, dead) in [
        (&["--imds", "audit"][..], "503", "503", "EPERM"),
        (&["--imds", "audit", "--imds-unknown", "as-known"], NODE_ROLE, NODE_ROLE, NODE_ROLE),
        (&["--imds", "off"], NODE_ROLE, NODE_ROLE, NODE_ROLE),
    ] {
        let mut node = Node::with_flags(flags).await?;
        let known = node.pod("known")?;
        let reason = "Default";
        effective(&node, &known, if flags[1] == "off" { "Off" } else { "Audit" }, reason).await?;
        assert_eq!(reached_by_unknown(&node, "early").await?, alive, "{flags:?}");
        node.lab.faults.set(Service::KubeApi, Fault::Hang);
        assert_eq!(reached_by_unknown(&node, "unseen").await?, hanging, "{flags:?}");
        assert_eq!(reached(&node, &known).await?, Reached::RealService, "{flags:?}");
        node.agent.kill().await?;
        sleep(STALE).await;
        assert_eq!(reached_by_unknown(&node, "late").await?, dead, "{flags:?}");
        assert_eq!(reached(&node, &known).await?, Reached::RealService, "{flags:?}");
        node.lab.down()?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_static_pod_has_its_mirror_pods_policy_and_no_credentials() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "audit"]).await?;
    let started = node.lab.start_unannounced(&PodSpec::new("kube-system", "proxy"))?;
    let cgroup = node.lab.node.place.cgroups.pod(Qos::Burstable, CONFIG_HASH);
    let container = node.lab.node.place.cgroups.container(&cgroup, &"5".repeat(64));
    cgroupfs::create(&container)?;
    // The sandbox, too: whose the network is shows by its process.
    let sandbox = node.lab.node.place.cgroups.container(&cgroup, &"6".repeat(64));
    cgroupfs::create(&sandbox)?;
    cgroupfs::join(&sandbox, started.sandbox.pid)?;
    let pod = Pod { cgroup, container, ..started };
    let is_static = ["static pod"];
    node.curl(&pod, &[ROLES]).await?.assert_refused(403, &is_static);
    node.lab.cluster.add_pod(&cluster::PodSpec {
        namespace: "kube-system".to_owned(),
        name: "proxy-mirror".to_owned(),
        service_account: "default".to_owned(),
        node: NODE_NAME.to_owned(),
        mirror_of: Some(CONFIG_HASH.to_owned()),
        ..cluster::PodSpec::default()
    });
    until(&node, &pod, |answer| answer.body == NODE_ROLE).await?;
    node.curl(&pod, &[POD_IDENTITY]).await?.assert_refused(403, &is_static);
    node.lab.cluster.annotate_namespace("kube-system", "podgate.dev/imds", Some("intercept"));
    until(&node, &pod, |answer| answer.status == 403).await?;
    node.down().await
}

/// Asks IMDS until the answer is as it is to be.
async fn until(node: &Node, pod: &Pod, is_it: impl Fn(&Answer) -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let answer = node.curl(pod, &[ROLES]).await?;
        if is_it(&answer) {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "{answer:?}");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_is_in_the_map_before_the_first_container_runs() -> anyhow::Result<()> {
    let node = Node::with_flags(&["--imds", "audit"]).await?;
    let strict = |name: &str| lab_node::spec(name).annotation("podgate.dev/imds", "intercept");
    // While anybody is intercepted, so are those of whom nothing is known yet.
    effective(&node, &node.lab.add_pod(&strict("neighbor"))?, "Intercept", "Pod").await?;
    let mut times = Vec::new();
    for number in 0..5 {
        let name = format!("early-{number}");
        let appeared = watch_for_cgroup(&node.lab)?;
        let (log, pod_name) = (node.agent.log.clone(), format!("shop/{name}"));
        let in_map = thread::spawn(move || {
            poll(|| {
                let policy = last_policy(&log, |line| line["pod.name"] == pod_name.as_str()).ok().flatten();
                policy.map(|_| Instant::now())
            })
        });
        let pod = node.lab.add_pod(&strict(&name))?;
        // The lab starts containers at once, faster than any kubelet.
        assert_eq!(reached(&node, &pod).await?, Reached::Podgate, "{name}");
        let appeared = appeared.join().ok().flatten().context("the pod's cgroup never appeared")?;
        let in_map = in_map.join().ok().flatten().context("the agent never said that it has a policy")?;
        times.push(in_map.saturating_duration_since(appeared));
    }
    println!("from a pod's cgroup to its policy in the map: {times:.1?}");
    assert!(times.iter().all(|time| *time < TO_FIRST_CONTAINER), "{times:?}");
    node.down().await
}

/// Watches for the next pod's cgroup and says when it appeared.
fn watch_for_cgroup(lab: &Lab) -> anyhow::Result<thread::JoinHandle<Option<Instant>>> {
    let pod = lab.node.place.cgroups.pod(Qos::default(), "any");
    let parent = pod.parent().context("a pod's cgroup has a parent")?.to_owned();
    let count = move || fs::read_dir(&parent).map(Iterator::count).unwrap_or_default();
    let before = count();
    Ok(thread::spawn(move || poll(|| (count() > before).then(Instant::now))))
}

/// Asks again and again, for as long as a pod may take to start.
fn poll(ask: impl Fn() -> Option<Instant>) -> Option<Instant> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if let Some(found) = ask() {
            return Some(found);
        }
        thread::sleep(Duration::from_micros(200));
    }
    None
}
