//! What the agent checks before it starts.

use std::{fs, process::Stdio};

use lab::cgroupfs;
use tokio::process::Command;

use crate::lab_node;

/// Exit status and standard error.
async fn refusal(mut command: Command) -> anyhow::Result<(Option<i32>, String)> {
    let output = command.stdin(Stdio::null()).output().await?;
    Ok((output.status.code(), String::from_utf8(output.stderr)?))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_missing_precondition_is_named_at_once_with_exit_status_2() -> anyhow::Result<()> {
    let lab = lab_node::lab()?;
    // Where any user may run it.
    let binary = lab.node.place.directory.join("podgate");
    fs::copy(lab_node::agent_binary()?, &binary)?;
    // In a mount namespace without cgroup2, as a user without capabilities.
    let script = format!(
        "umount -l {} && exec setpriv --reuid 65534 --clear-groups {} run --node-name n --cluster-name c",
        cgroupfs::mount_point()?.display(),
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
async fn without_certificates_of_authorities_the_agent_says_what_to_install() -> anyhow::Result<()> {
    let lab = lab_node::lab()?;
    let mut spec = lab_node::agent(&[])?;
    spec.env.insert("SSL_CERT_FILE".into(), "/dev/null".into());
    let error = format!("{:#}", lab.start_agent(&spec).await.unwrap_err());
    assert!(error.contains("ca-certificates") && !error.contains("panic"), "{error}");
    lab.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bad_value_of_the_configuration_is_named_with_exit_status_2() -> anyhow::Result<()> {
    let lab = lab_node::lab()?;
    let bad = ["--imds", "sometimes", "--imds-v1", "perhaps", "--target-v4", "nowhere", "--admin", "here"];
    let arguments = [&["run", "--node-name", "n", "--cluster-name", "c"], &bad[..]].concat();
    let (code, said) = refusal(lab.agent_tool(&lab_node::agent_binary()?, &arguments)?).await?;
    assert_eq!(code, Some(2), "{said}");
    for word in bad {
        assert!(said.contains(word.trim_start_matches("--")), "{word}: {said}");
    }
    lab.down()
}
