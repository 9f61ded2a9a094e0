//! What the agent checks before it starts, and what it takes away when it ends.

use std::{fs, process::Stdio};

use anyhow::Context as _;
use lab::{cgroup, netns::NetNs};
use tokio::process::Command;

use crate::node::{self, Node};

/// The interface and both addresses of the agent's target, as `/proc/net` shows them.
const LINK: &str = "podgate0";
const TARGET_V4: &str = "169.254.170.23";
const TARGET_V6: &str = "fd000ec2000000000000000000000023";

/// Exit status and standard error.
async fn refusal(mut command: Command) -> anyhow::Result<(Option<i32>, String)> {
    let output = command.stdin(Stdio::null()).output().await?;
    Ok((output.status.code(), String::from_utf8(output.stderr)?))
}

fn target_is_up(netns: &NetNs) -> anyhow::Result<[bool; 3]> {
    netns.run(|| {
        let read = |file: &str| {
            fs::read_to_string(format!("/proc/thread-self/net/{file}"))
                .with_context(|| format!("cannot read {file}"))
        };
        Ok([
            read("dev")?.contains(LINK),
            read("fib_trie")?.contains(TARGET_V4),
            read("if_inet6")?.contains(TARGET_V6),
        ])
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn every_missing_precondition_is_named_at_once_with_exit_status_2() -> anyhow::Result<()> {
    let lab = node::lab()?;
    // Where any user may run it.
    let binary = lab.node.place.directory.join("podgate");
    fs::copy(node::agent_binary()?, &binary)?;
    // In a mount namespace without cgroup2, as a user without capabilities.
    let script = format!(
        "umount -l {} && exec setpriv --reuid 65534 --clear-groups {} run --node-name n --cluster-name c",
        cgroup::mount_point()?.display(),
        binary.display()
    );
    let command = ["unshare", "--mount", "sh", "-c", &script];
    let (code, said) = refusal(lab.agent_tool(command[0].as_ref(), &command[1..])?).await?;
    assert_eq!(code, Some(2), "{said}");
    for word in ["root", "CAP_BPF", "CAP_NET_ADMIN", "cgroup2", "bpf"] {
        assert!(said.contains(word), "{word}: {said}");
    }
    lab.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_value_of_the_configuration_is_named_with_exit_status_2() -> anyhow::Result<()> {
    let lab = node::lab()?;
    let bad = ["--imds", "sometimes", "--imds-v1", "perhaps", "--target-v4", "nowhere", "--admin", "here"];
    let arguments = [&["run", "--node-name", "n", "--cluster-name", "c"], &bad[..]].concat();
    let (code, said) = refusal(lab.agent_tool(&node::agent_binary()?, &arguments)?).await?;
    assert_eq!(code, Some(2), "{said}");
    for word in bad {
        assert!(said.contains(word.trim_start_matches("--")), "{word}: {said}");
    }
    lab.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_s_link_and_addresses_go_when_it_ends() -> anyhow::Result<()> {
    let Node { lab, agent } = Node::intercepting().await?;
    assert_eq!(target_is_up(&lab.node.netns)?, [true; 3]);
    assert!(agent.stop().await?.success());
    assert_eq!(target_is_up(&lab.node.netns)?, [false; 3]);
    lab.down()
}
