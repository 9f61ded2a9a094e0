//! Labs and the machine they run on: nothing is shared, nothing is touched, nothing is left.

use std::{collections::BTreeSet, fs, path::Path, process::Stdio, time::Duration};

use anyhow::Context as _;
use futures::TryStreamExt as _;
use lab::{cgroupfs, process_id::Process, state, state::State};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::{Child, Command},
};

use crate::lab_node::{self, HELPER, Node, POD_IDENTITY};

/// The host's netdevs, addresses, routes and rules; counters and timers left out.
async fn host_network() -> anyhow::Result<BTreeSet<String>> {
    let mut facts = BTreeSet::new();
    let columns = |file: &str, count: usize| -> anyhow::Result<Vec<String>> {
        let text = fs::read_to_string(Path::new("/proc/net").join(file))?;
        Ok(text
            .lines()
            .map(|line| {
                let columns: Vec<&str> = line.split_whitespace().collect();
                let last = columns.last().copied().unwrap_or_default();
                format!("{file}: {} {last}", columns[..count.min(columns.len())].join(" "))
            })
            .collect())
    };
    facts.extend(columns("route", 4)?);
    // Source, next hop and destination; then come metric, counters and the netdev.
    facts.extend(columns("ipv6_route", 5)?);
    facts.extend(columns("if_inet6", 4)?);
    facts.extend(fs::read_to_string("/proc/net/fib_trie")?.lines().map(|line| format!("fib_trie: {line}")));
    for netdev in fs::read_dir("/sys/class/net")? {
        facts.insert(format!("netdev: {}", netdev?.file_name().display()));
    }
    let (connection, handle, _) = rtnetlink::new_connection()?;
    tokio::spawn(connection);
    for version in [rtnetlink::IpVersion::V4, rtnetlink::IpVersion::V6] {
        let rules: Vec<_> = handle.rule().get(version).execute().try_collect().await?;
        facts.extend(rules.iter().map(|rule| format!("rule: {rule:?}")));
    }
    Ok(facts)
}

/// A lab in a process of its own, with the agent, that is up.
async fn served_lab(name: &str) -> anyhow::Result<Child> {
    let mut child = Command::new(HELPER)
        .args(["lab-serve", "--name", name, "--pods", "2", "--imds", "intercept", "--agent"])
        .arg(lab_node::agent_binary()?)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = child.stdout.take().context("the lab's output is not a pipe")?;
    let line = BufReader::new(stdout).lines().next_line().await?;
    assert_eq!(line.as_deref(), Some("ready"));
    Ok(child)
}

/// Every process of the lab: sandboxes, the node's keeper, the agent.
fn processes(state: &State) -> Vec<Process> {
    let keeper = state.node.iter().map(|node| node.keeper);
    state.pods.iter().map(|pod| pod.sandbox).chain(keeper).chain(state.agent).collect()
}

fn assert_nothing_is_left(name: &str, processes: &[Process]) -> anyhow::Result<()> {
    assert!(!state::directory(name).exists());
    assert!(!state::log_file(name)?.exists());
    assert!(!cgroupfs::mount_point()?.join(format!("podgate-lab-{name}")).exists());
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    assert!(!mounts.contains(&format!("podgate-lab/{name}/")), "{mounts}");
    for process in processes {
        assert!(!process.is_running(), "{process:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_labs_do_not_see_each_other() -> anyhow::Result<()> {
    let (one, two) = (Node::intercepting().await?, Node::intercepting().await?);
    let name = "same-name";
    let first = one.lab.add_pod(&lab_node::spec(name))?;
    let second = two.lab.add_pod(&lab_node::spec(name))?;
    assert_eq!(first.addresses, second.addresses);
    let answer = one.curl(&first, &[POD_IDENTITY]).await?;
    one.assert_own_role(&first, &answer);
    assert_eq!(two.lab.eks_auth.calls(), 0);
    let answer = two.curl(&second, &[POD_IDENTITY]).await?;
    two.assert_own_role(&second, &answer);
    one.down().await?;
    // The other one's programs stay attached.
    let answer = two.curl(&second, &[POD_IDENTITY]).await?;
    two.assert_own_role(&second, &answer);
    two.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_killed_lab_left_behind_goes_with_the_next_lab_down() -> anyhow::Result<()> {
    let name = lab_node::lab_name();
    let mut owner = served_lab(&name).await?;
    let state = State::load(&name)?;
    let processes = processes(&state);
    // Two pods, the agent's pod, the node's keeper and the agent.
    assert_eq!(processes.len(), 5);
    assert!(processes.iter().all(Process::is_running));
    owner.start_kill()?;
    owner.wait().await?;
    assert!(!state.is_alive());
    assert!(state::directory(&name).exists());

    let down = Command::new(HELPER).args(["lab", "down", "--name", &name]).output().await?;
    assert!(down.status.success(), "{down:?}");
    assert_nothing_is_left(&name, &processes)
}

#[tokio::test(flavor = "multi_thread")]
async fn lab_down_asks_the_process_to_end_and_leaves_nothing() -> anyhow::Result<()> {
    let name = lab_node::lab_name();
    let mut owner = served_lab(&name).await?;
    let processes = processes(&State::load(&name)?);
    let down = Command::new(HELPER).args(["lab", "down", "--name", &name]).output();
    // Both at once: the owner is this test's child, which nobody else can reap.
    let (down, owner) = tokio::join!(down, owner.wait());
    let down = down?;
    assert!(down.status.success(), "{down:?}");
    assert!(owner?.success());
    assert_nothing_is_left(&name, &processes)
}

#[tokio::test(flavor = "multi_thread")]
async fn lab_exec_runs_in_the_pod_and_passes_the_exit_status_on() -> anyhow::Result<()> {
    let name = lab_node::lab_name();
    let mut owner = served_lab(&name).await?;
    let exec = async |environment: &str, pod: &str, script: &str| {
        let arguments = ["lab", "exec", "--name", &name, "--env", environment, pod, "--", "sh", "-c", script];
        Command::new(HELPER).args(arguments).env("AWS_PROFILE", "the-developer-s").output().await
    };
    let output = exec("none", "shop/app-1", "env; grep '^0::' /proc/self/cgroup; exit 3").await?;
    let said = String::from_utf8(output.stdout)?;
    assert_eq!(output.status.code(), Some(3));
    assert!(said.contains(&format!("0::/podgate-lab-{name}/kubepods.slice/")), "{said}");
    assert!(!said.contains("AWS_"), "{said}");
    let output = exec("webhook", "app-2", "test -s $AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE").await?;
    assert!(output.status.success(), "{output:?}");
    let pid = owner.id().context("the lab has ended")?;
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM)?;
    tokio::time::timeout(Duration::from_secs(30), owner.wait()).await??;
    assert_nothing_is_left(&name, &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_network_is_as_it_was_while_a_lab_is_up_and_after() -> anyhow::Result<()> {
    let before = host_network().await?;
    assert!(before.len() > 10, "{before:?}");
    let node = Node::intercepting().await?;
    let pod = node.pod("somebody")?;
    node.assert_own_role(&pod, &node.curl(&pod, &[POD_IDENTITY]).await?);
    assert_eq!(host_network().await?, before);
    node.down().await?;
    assert_eq!(host_network().await?, before);
    Ok(())
}
