//! When the agent is gone or hangs: its pods are refused at once, and served when it is back.

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use futures::TryStreamExt as _;
use lab::{EnvKind, Lab, NODE_ROLE, Pod, simulated_network::NetNs};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Child,
    time::sleep,
};

use crate::lab_node::{self, IMDS, Node, POD_IDENTITY, ROLES};

/// More than the programs wait for a heartbeat.
const STALE: Duration = Duration::from_millis(2300);
/// Less than any request takes that is not the first.
const MEMORY: u64 = 16 * 1024;
/// For so long clients ask an agent that has no more.
const CLIENTS: Duration = Duration::from_secs(30);
/// The netdev and both addresses of the agent's target, as `/proc/net` shows them.
const NETDEV: &str = "podgate0";
const TARGET_V4: &str = "169.254.170.23";
const TARGET_V6: &str = "fd000ec2000000000000000000000023";

/// Sends half a request, and waits.
const SLOW_CLIENT: &str = "import socket, time
client = socket.create_connection(('169.254.170.23', 80))
client.send(b'GET /v1/cred')
print('begun')
time.sleep(60)";

/// How a connection attempt ended, and after how many milliseconds.
async fn try_connect(node: &Node, pod: &Pod, address: &str) -> anyhow::Result<(String, f64)> {
    let program = format!(
        "import errno, socket, time\n\
         began = time.monotonic()\n\
         try:\n    socket.create_connection(('{address}', 80), timeout=10)\n    end = 'connected'\n\
         except TimeoutError:\n    end = 'timed out'\n\
         except OSError as error:\n    end = errno.errorcode[error.errno]\n\
         print(end, (time.monotonic() - began) * 1000)"
    );
    let text = node.python(pod, &program).await?;
    let (end, milliseconds) = text.split_once(' ').context("the client says nothing")?;
    Ok((end.to_owned(), milliseconds.parse()?))
}

const ADDRESSES: [&str; 5] =
    ["169.254.169.254", "fd00:ec2::254", "169.254.170.23", "fd00:ec2::23", "169.254.170.2"];

async fn assert_refused(node: &Node, pod: &Pod, how: &str) -> anyhow::Result<()> {
    for address in ADDRESSES {
        let (end, milliseconds) = try_connect(node, pod, address).await?;
        assert_eq!(end, how, "{address}");
        assert!(milliseconds < 100.0, "{address}: {milliseconds} ms");
    }
    Ok(())
}

fn target_is_up(netns: &NetNs) -> anyhow::Result<[bool; 3]> {
    netns.run(|| {
        let read = |file: &str| {
            fs::read_to_string(format!("/proc/thread-self/net/{file}"))
                .with_context(|| format!("cannot read {file}"))
        };
        Ok([
            read("dev")?.contains(NETDEV),
            read("fib_trie")?.contains(TARGET_V4),
            read("if_inet6")?.contains(TARGET_V6),
        ])
    })
}

/// `podgate detach`; what it prints.
pub(crate) async fn detach(lab: &Lab, more: &[&str]) -> anyhow::Result<String> {
    let (bpffs, handover) = (lab.node.place.bpffs(), lab.node.place.handover());
    let [bpffs, handover] = [bpffs.display().to_string(), handover.display().to_string()];
    let arguments = [&["detach", "--bpffs", &bpffs, "--handover-dir", &handover], more].concat();
    let mut command = lab.agent_tool(&lab_node::agent_binary()?, &arguments)?;
    let output = command.stdin(Stdio::null()).output().await?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn remove_netdev(netns: &NetNs) -> anyhow::Result<()> {
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            let mut netdevs = handle.link().get().match_name(NETDEV.to_owned()).execute();
            let netdev = netdevs.try_next().await?.context("there is no netdev")?;
            Ok(handle.link().del(netdev.header.index).execute().await?)
        })
    })
}

/// The agent is killed: its pods are refused, and served by the next one.
async fn assert_nobody_notices_the_next_agent(
    kill: impl AsyncFnOnce(&mut Node, &Pod) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let pod = node.pod("web")?;
    let session = node.session(&pod, IMDS, &[]).await?;
    node.assert_own_role(&pod, &node.imds_v2(&pod, IMDS, &[]).await?);
    kill(&mut node, &pod).await?;
    // Nobody listens any more; then the heartbeat is too old.
    assert_refused(&node, &pod, "ECONNREFUSED").await?;
    sleep(STALE).await;
    assert_refused(&node, &pod, "EPERM").await?;
    // A pod that starts now is unknown, and no less kept from the node's role.
    assert_refused(&node, &node.pod("late")?, "EPERM").await?;

    node.agent = node.lab.start_agent(&lab_node::agent(&["--imds", "intercept"])?).await?;
    node.assert_own_role(&pod, &node.imds_v2(&pod, IMDS, &[]).await?);
    let role = node.curl(&pod, &["-H", &session, ROLES]).await?;
    assert_eq!((role.status, role.body.as_str()), (200, "web-role"), "a session outlives the agent");
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_a_killed_agent_are_refused_at_once_and_served_by_the_next() -> anyhow::Result<()> {
    assert_nobody_notices_the_next_agent(async |node: &mut Node, _: &Pod| {
        node.agent.kill().await?;
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_an_agent_out_of_memory_are_refused_at_once() -> anyhow::Result<()> {
    assert_nobody_notices_the_next_agent(async |node: &mut Node, pod: &Pod| {
        let limit = node.agent.limit_memory(MEMORY)?;
        let begun = Instant::now();
        while node.agent.process().is_running() {
            ensure!(begun.elapsed() < CLIENTS, "the agent does with {MEMORY} bytes");
            node.curl(pod, &["--max-time", "1", ROLES]).await?;
        }
        assert!(limit.kills()? > 0, "the kernel has killed it for its memory");
        assert_eq!(node.agent.wait().await?.signal(), Some(9));
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_a_hung_agent_are_refused_after_two_seconds() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("web")?;
    node.assert_own_role(&pod, &node.imds_v2(&pod, IMDS, &[]).await?);
    node.agent.suspend()?;
    sleep(STALE).await;
    assert_refused(&node, &pod, "EPERM").await?;
    node.agent.resume()?;
    sleep(Duration::from_millis(500)).await;
    node.assert_own_role(&pod, &node.imds_v2(&pod, IMDS, &[]).await?);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_agent_leaves_its_pods_refused_and_others_alone() -> anyhow::Result<()> {
    let Node { lab, agent } = Node::intercepting().await?;
    let pod = lab.add_pod(&lab_node::spec("web"))?;
    assert!(agent.stop().await?.success());
    assert_eq!(target_is_up(&lab.node.netns)?, [true; 3], "connections to it are refused, and not lost");
    let agent = lab.start_agent(&lab_node::agent(&["--imds", "audit"])?).await?;
    let mut node = Node { lab, agent };
    // The default of the agent that is active now.
    assert!(node.curl(&pod, &[ROLES]).await?.body.contains(NODE_ROLE));
    node.agent.kill().await?;
    sleep(STALE).await;
    assert!(node.curl(&pod, &[ROLES]).await?.body.contains(NODE_ROLE), "audit refuses nothing");
    assert_eq!(node.curl(&pod, &[POD_IDENTITY]).await?.status, 0);
    node.lab.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn detach_leaves_the_node_as_it_was_with_and_without_an_agent() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let pod = node.pod("web")?;
    node.agent.kill().await?;
    let bpffs = node.lab.node.place.bpffs();
    let handover = node.lab.node.place.handover();

    let listed = detach(&node.lab, &["--dry-run"]).await?;
    let socket = handover.join("handover.sock");
    for thing in ["links/connect4", "maps/POLICIES", "podgate/v1", NETDEV, &socket.display().to_string()] {
        assert!(listed.contains("would remove") && listed.contains(thing), "{thing}: {listed}");
    }
    assert_refused(&node, &pod, "ECONNREFUSED").await?;
    // Half of it is missing.
    fs::remove_file(bpffs.join("podgate/v1/maps/TARGETS"))?;
    fs::remove_file(bpffs.join("podgate/v1/links/connect6"))?;
    detach(&node.lab, &[]).await?;
    assert_eq!(target_is_up(&node.lab.node.netns)?, [false; 3]);
    assert!(!bpffs.join("podgate").exists() && !handover.exists());
    assert!(node.curl(&pod, &[ROLES]).await?.body.contains(NODE_ROLE), "nothing is between the pod and IMDS");
    assert!(detach(&node.lab, &[]).await?.contains("nothing of podgate's"), "once more is fine");

    // Under a running agent as well, which an operator may do in need: it ends.
    node.agent = node.lab.start_agent(&lab_node::agent(&["--imds", "intercept"])?).await?;
    detach(&node.lab, &[]).await?;
    assert!(!node.agent.wait().await?.success());
    assert!(node.agent.log_text()?.contains("podgate detach"), "{}", node.agent.log_tail());
    assert_eq!(target_is_up(&node.lab.node.netns)?, [false; 3]);
    assert!(!handover.exists());
    assert!(node.curl(&pod, &[ROLES]).await?.body.contains(NODE_ROLE));
    node.lab.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_end_after_detach_though_requests_are_in_flight() -> anyhow::Result<()> {
    let Node { lab, mut agent } = Node::intercepting().await?;
    let pod = lab.add_pod(&lab_node::spec("slow"))?;
    let other = lab.add_agent_pod("podgate-other")?;
    let first = begin_request(&lab, &pod).await?;
    let mut successor = lab.start_agent_in(&other, &lab_node::agent(&["--imds", "intercept"])?).await?;
    let requests = [first, begin_request(&lab, &pod).await?];
    detach(&lab, &[]).await?;
    for agent in [&mut agent, &mut successor] {
        assert!(!agent.wait().await?.success());
        assert!(agent.log_text()?.contains("podgate detach"), "{}", agent.log_tail());
    }
    assert!(detach(&lab, &[]).await?.contains("nothing of podgate's"));
    drop(requests);
    lab.down()
}

/// A client that has sent half a request; killed when dropped.
async fn begin_request(lab: &Lab, pod: &Pod) -> anyhow::Result<Child> {
    let mut client = lab.exec(pod, EnvKind::None, &["python3", "-uc", SLOW_CLIENT])?;
    let mut client = client.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let stdout = client.stdout.take().context("the client's output is not a pipe")?;
    assert_eq!(BufReader::new(stdout).lines().next_line().await?.as_deref(), Some("begun"));
    Ok(client)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_become_active_exits_and_serves_when_restarted() -> anyhow::Result<()> {
    let mut node = Node::intercepting().await?;
    let pod = node.pod("web")?;
    let other = node.lab.add_agent_pod("podgate-other")?;
    let spec = lab_node::agent(&["--imds", "intercept"])?;
    let mut successor = node.lab.start_agent_in(&other, &spec).await?;
    // What the predecessor needs was removed, and its successor is dead.
    remove_netdev(&node.lab.node.netns)?;
    successor.kill().await?;
    assert!(!node.agent.wait().await?.success(), "the kubelet is to see it");
    assert!(node.agent.log_text()?.contains("fatal error"), "{}", node.agent.log_tail());
    node.agent = node.lab.start_agent(&spec).await?;
    node.assert_own_role(&pod, &node.imds_v2(&pod, IMDS, &[]).await?);
    node.down().await
}
