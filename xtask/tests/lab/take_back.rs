//! An agent of another ABI takes over and dies: its predecessor is active again.

use std::time::{Duration, Instant};

use agent_common::abi::{ABI_VERSION, PIN_DIRECTORY};
use lab::AgentSpec;
use tokio::time::sleep;

use crate::lab_node::{self, IMDS, Node, ROLES};

/// From the death of an agent until its predecessor serves: a second of silence, and room for a slow machine.
const TAKEN_BACK: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread")]
async fn a_predecessor_takes_back_from_a_dead_agent_of_another_abi() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("web")?;
    let session = node.session(&pod, IMDS, &[]).await?;
    let other_pod = node.lab.add_agent_pod("podgate-other")?;
    let other = AgentSpec::new(lab_node::undefended_binary()?, &["--imds", "intercept"]).of_next_abi();
    for _ in 0..2 {
        let mut successor = node.lab.start_agent_in(&other_pod, &other).await?;
        successor.kill().await?;
        let died = Instant::now();
        let mut refused = 0;
        while node.curl(&pod, &["-H", &session, ROLES]).await?.status != 200 {
            assert!(died.elapsed() < TAKEN_BACK, "{}", node.agent.log_tail());
            refused += 1;
            sleep(Duration::from_millis(50)).await;
        }
        println!(
            "an agent of another ABI killed: {refused} requests refused, served after {:?}",
            died.elapsed()
        );
        node.assert_own_role(&pod, &node.imds_v2(&pod, IMDS, &[]).await?);
        let pins = node.lab.node.place.bpffs().join(PIN_DIRECTORY);
        assert!(pins.join(format!("v{ABI_VERSION}/links/connect4")).exists());
        assert!(!pins.join(format!("v{}", AgentSpec::NEXT_ABI)).exists(), "two generations would fight");
    }
    node.down().await
}
