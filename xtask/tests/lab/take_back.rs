//! An agent of another ABI takes over and dies: the one before it is in charge again.

use std::time::{Duration, Instant};

use agent_common::abi::{ABI_VERSION, PIN_DIRECTORY};
use lab::AgentSpec;
use tokio::time::sleep;

use crate::node::{self, IMDS, Node, ROLES};

const OTHER_ABI: u32 = ABI_VERSION + 1;
/// From the death of an agent until the one before it serves: a second of silence, and room for a slow machine.
const TAKEN_BACK: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_another_abi_that_dies_at_once_is_succeeded_by_the_one_before_it() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("web")?;
    let session = node.session(&pod, IMDS, &[]).await?;
    let other_pod = node.lab.add_agent_pod("podgate-other")?;
    let mut other = AgentSpec::new(node::undefended_binary()?, &["--imds", "intercept"]);
    other.env.insert("PODGATE_ABI".to_owned(), OTHER_ABI.to_string());
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
        assert!(!pins.join(format!("v{OTHER_ABI}")).exists(), "two generations would fight");
    }
    node.down().await
}
