//! Every way in which a node may route its pods, and the pods' way to podgate in each.

use std::{collections::BTreeSet, net::IpAddr, process::Stdio, time::Duration};

use anyhow::Context as _;
use futures::TryStreamExt as _;
use lab::{EnvKind, Lab, LabSpec, Pod, simulated_network::Routing};
use rtnetlink::{
    Handle, IpVersion,
    packet_route::{
        route::RouteProtocol,
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Child,
    time::{Instant, sleep},
};

use crate::{
    death::detach,
    lab_node::{self, HELPER, IMDS, Node, POD_IDENTITY},
};

const IMDS_V6: &str = "http://[fd00:ec2::254]";
const POD_IDENTITY_V6: &str = "http://[fd00:ec2::23]/v1/credentials";
/// A port of the node's own at which nobody listens: a connection is refused at once, unless it is lost on the way.
const CONNECT_TO_THE_NODE: &str = "import socket, errno
for address in ['10.10.0.10', 'fd10::10']:
    try: socket.create_connection((address, 9), 0.3)
    except TimeoutError: print('lost')
    except OSError as error: print(errno.errorcode[error.errno])";
/// Sends half a request, and waits.
const SLOW_CLIENT: &str = "import socket, time
client = socket.create_connection(('169.254.170.23', 80))
client.send(b'GET /v1/cred')
print('begun')
time.sleep(60)";
/// The number of podgate's rules.
const PROTOCOL: RuleAttribute = RuleAttribute::Protocol(RouteProtocol::Other(80));
/// In which podgate follows the node's rules.
const SOON: Duration = Duration::from_secs(1);
/// Endpoints of the metadata service and of Pod Identity, IPv4 and IPv6.
const BOTH: [(&str, &str); 2] = [(IMDS, POD_IDENTITY), (IMDS_V6, POD_IDENTITY_V6)];

/// What a rule of podgate's matches: from whom, and to where.
type Rule = (Option<IpAddr>, Option<IpAddr>);

/// A node that routes its pods like that, with an agent that intercepts.
async fn routed(routing: Routing) -> anyhow::Result<Node> {
    let lab = Lab::up(LabSpec { routing, ..LabSpec::new(&lab_node::lab_name(), HELPER) })?;
    let agent = lab.start_agent(&lab_node::agent(&["--imds", "intercept"])?).await?;
    Ok(Node { lab, agent })
}

/// By the metadata service and by Pod Identity, the pod must get its own role.
async fn assert_served(node: &Node, pod: &Pod, endpoints: &[(&str, &str)]) -> anyhow::Result<()> {
    for (imds, pod_identity) in endpoints {
        node.assert_own_role(pod, &node.imds_v2(pod, imds, &[]).await?);
        node.assert_own_role(pod, &node.curl(pod, &[pod_identity]).await?);
    }
    Ok(())
}

/// podgate's rules on the node, each as who may send and where to.
fn own_rules(lab: &Lab) -> anyhow::Result<BTreeSet<Rule>> {
    let rules = rules(lab, async |_, rules| Ok(rules))?;
    let own = rules.iter().filter(|rule| rule.attributes.contains(&PROTOCOL));
    let own: Vec<Rule> = own
        .map(|rule| {
            let mut meaning = (None, None);
            for attribute in &rule.attributes {
                match attribute {
                    RuleAttribute::Source(address) => meaning.0 = Some(*address),
                    RuleAttribute::Destination(address) => meaning.1 = Some(*address),
                    _ => {}
                }
            }
            meaning
        })
        .collect();
    let set: BTreeSet<_> = own.iter().copied().collect();
    assert_eq!(set.len(), own.len(), "each rule once: {own:?}");
    Ok(set)
}

/// Removes those of the node's rules that have `attribute`.
fn remove_rules(lab: &Lab, attribute: &RuleAttribute) -> anyhow::Result<()> {
    rules(lab, async |handle, rules| {
        for rule in rules.into_iter().filter(|rule| rule.attributes.contains(attribute)) {
            handle.rule().del(rule).execute().await?;
        }
        Ok(())
    })
}

/// Does something with the rules of the node's namespace, in it.
fn rules<T: Send>(
    lab: &Lab,
    work: impl AsyncFnOnce(Handle, Vec<RuleMessage>) -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    lab.node.netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection()?;
            tokio::spawn(connection);
            let mut rules = Vec::new();
            for version in [IpVersion::V4, IpVersion::V6] {
                rules.extend(handle.rule().get(version).execute().try_collect::<Vec<_>>().await?);
            }
            work(handle, rules).await
        })
    })
}

/// Waits until podgate's rules are these.
async fn assert_soon(lab: &Lab, expected: &BTreeSet<Rule>) -> anyhow::Result<()> {
    let deadline = Instant::now() + SOON;
    loop {
        let found = own_rules(lab)?;
        if found == *expected {
            return Ok(());
        }
        assert!(Instant::now() < deadline, "{found:?} instead of {expected:?}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// The rules that these pods need for podgate's addresses: EKS Pod Identity's and its own.
fn rules_for(pods: &[&Pod]) -> anyhow::Result<BTreeSet<Rule>> {
    let mut rules = BTreeSet::new();
    for target in ["169.254.170.23", "169.254.175.1", "fd00:ec2::23", "fd70:6f64:6761:7465::1"] {
        let target: IpAddr = target.parse()?;
        rules.insert((None, Some(target)));
        let addresses = pods.iter().flat_map(|pod| pod.addresses.list());
        let of_family = addresses.filter(|address| address.is_ipv4() == target.is_ipv4());
        rules.extend(of_family.map(|address| (Some(target), Some(address))));
    }
    Ok(rules)
}

#[tokio::test(flavor = "multi_thread")]
async fn routed_as_by_the_vpc_cni_a_pod_gets_its_own_role_and_the_node_no_rule() -> anyhow::Result<()> {
    let node = routed(Routing::VpcCni).await?;
    let pod = node.pod("plain")?;
    assert_eq!(node.python(&pod, CONNECT_TO_THE_NODE).await?, "ECONNREFUSED\nECONNREFUSED");
    assert_served(&node, &pod, &BOTH).await?;
    assert_eq!(own_rules(&node.lab)?, BTreeSet::new());
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_strict_security_groups_gets_its_own_role() -> anyhow::Result<()> {
    let node = routed(Routing::StrictSecurityGroups).await?;
    let before = node.pod("first")?;
    assert_served(&node, &before, &BOTH).await?;
    let after = node.pod("second")?;
    // The security groups are effective: the node itself is not to be reached past the VPC.
    assert_eq!(node.python(&after, CONNECT_TO_THE_NODE).await?, "lost\nlost");
    assert_served(&node, &after, &BOTH).await?;
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_for_strict_security_groups_follow_the_pods() -> anyhow::Result<()> {
    let Node { lab, mut agent } = routed(Routing::StrictSecurityGroups).await?;
    let pods = [lab.add_pod(&lab_node::spec("stays"))?, lab.add_pod(&lab_node::spec("goes"))?];
    assert_soon(&lab, &rules_for(&[&pods[0], &pods[1]])?).await?;

    // As the CNI does when a pod ends. The agent's pod is the node's first, and this one the third.
    remove_rules(&lab, &RuleAttribute::Table(103))?;
    assert_soon(&lab, &rules_for(&[&pods[0]])?).await?;

    // Somebody cleans up too much.
    remove_rules(&lab, &PROTOCOL)?;
    assert_soon(&lab, &rules_for(&[&pods[0]])?).await?;

    agent.kill().await?;
    assert_eq!(own_rules(&lab)?, rules_for(&[&pods[0]])?, "a killed agent leaves its rules");
    let agent = lab.start_agent(&lab_node::agent(&["--imds", "intercept"])?).await?;
    assert_eq!(own_rules(&lab)?, rules_for(&[&pods[0]])?, "its successor adopts them");
    assert!(agent.stop().await?.success());
    assert_eq!(own_rules(&lab)?, rules_for(&[&pods[0]])?, "as its programs stay");
    assert!(detach(&lab, &[]).await?.contains("removing the rule"));
    assert_eq!(own_rules(&lab)?, BTreeSet::new());
    lab.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_stay_away_after_detach_though_agents_still_finish_what_they_have() -> anyhow::Result<()> {
    let Node { lab, mut agent } = routed(Routing::StrictSecurityGroups).await?;
    let pod = lab.add_pod(&lab_node::spec("slow"))?;
    let other = lab.add_agent_pod("podgate-other")?;
    let slow = begin_request(&lab, &pod).await?;
    let mut successor = lab.start_agent_in(&other, &lab_node::agent(&["--imds", "intercept"])?).await?;
    let slow = [slow, begin_request(&lab, &pod).await?];
    assert!(!own_rules(&lab)?.is_empty());

    detach(&lab, &[]).await?;
    assert_eq!(own_rules(&lab)?, BTreeSet::new());
    for agent in [&mut agent, &mut successor] {
        assert!(!agent.wait().await?.success());
        assert!(agent.log_text()?.contains("podgate detach"), "{}", agent.log_tail());
    }
    sleep(SOON).await;
    assert_eq!(own_rules(&lab)?, BTreeSet::new());
    drop(slow);
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
async fn a_rule_that_podgate_cannot_come_before_is_named_with_the_remedy() -> anyhow::Result<()> {
    let lab = Lab::up(LabSpec {
        routing: Routing::StrictSecurityGroups,
        ..LabSpec::new(&lab_node::lab_name(), HELPER)
    })?;
    rules(&lab, async |handle, _| {
        let early = handle.rule().add().v4().input_interface("vlan5").table_id(105).priority(5);
        Ok(early.action(RuleAction::ToTable).execute().await?)
    })?;
    let agent = lab.start_agent(&lab_node::agent(&["--imds", "intercept"])?).await?;
    let log = agent.log_text()?;
    let said = |line: &str| ["WARN", "{5}", "ip rule add to 169.254.170.23"].iter().all(|w| line.contains(w));
    assert!(log.lines().any(said), "{log}");
    assert!(agent.stop().await?.success());
    lab.down()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_with_ipv6_alone_gets_its_own_role() -> anyhow::Result<()> {
    let node = routed(Routing::Ipv6Only).await?;
    let pod = node.pod("modern")?;
    // Also at the IPv4 addresses, which SDKs ask by default: the loopback needs no route.
    assert_served(&node, &pod, &[(IMDS_V6, POD_IDENTITY_V6), (IMDS, POD_IDENTITY)]).await?;

    let injected = node.lab.add_pod(&lab_node::spec("injected").with_token())?;
    let ask = r#"curl -gs -w '\n%{http_code}' -H "Authorization: $(cat $AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE)" $AWS_CONTAINER_CREDENTIALS_FULL_URI"#;
    let output = lab_node::text(node.lab.exec(&injected, EnvKind::Webhook, &["sh", "-c", ask])?).await?;
    let (body, status) = output.rsplit_once('\n').unwrap_or_default();
    let answer = lab_node::Answer { status: status.parse()?, body: body.to_owned(), milliseconds: 0.0 };
    node.assert_own_role(&injected, &answer);
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_allows_what_the_eks_agent_needs_is_enough() -> anyhow::Result<()> {
    let node = routed(Routing::DefaultDenyEgress).await?;
    let pod = node.pod("confined")?;
    assert_eq!(node.python(&pod, CONNECT_TO_THE_NODE).await?, "lost\nlost");
    assert_served(&node, &pod, &BOTH).await?;
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropping_input_chain_needs_only_the_exception_for_the_eks_agent() -> anyhow::Result<()> {
    let node = routed(Routing::DroppingInput).await?;
    let pod = node.pod("guest")?;
    assert_eq!(node.python(&pod, CONNECT_TO_THE_NODE).await?, "lost\nlost");
    assert_served(&node, &pod, &BOTH).await?;
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_connection_is_logged_with_the_pod_and_a_remedy() -> anyhow::Result<()> {
    // Other addresses than those that everybody allows.
    let target = ["--target", "own"];
    let lab =
        Lab::up(LabSpec { routing: Routing::DroppingInput, ..LabSpec::new(&lab_node::lab_name(), HELPER) })?;
    let pod = lab.add_pod(&lab_node::spec("shut-out"))?;
    let closed = lab.exec(&pod, EnvKind::None, &["ip", "link", "set", "lo", "down"])?.status().await?;
    assert!(closed.success(), "ip: {closed}");
    let flags = [&["--imds", "intercept"][..], &target].concat();
    let agent = lab.start_agent(&lab_node::agent(&flags)?).await?;
    let node = Node { lab, agent };
    // The control: in its own network a pod is served all the same.
    let open = node.pod("open")?;
    node.assert_own_role(&open, &node.curl(&open, &[POD_IDENTITY]).await?);
    let answer = node.curl(&pod, &["--connect-timeout", "1", POD_IDENTITY]).await?;
    assert_eq!(answer.status, 0, "{answer:?}");

    let said = |line: &str| {
        ["WARN", "nothing answered", "shop/shut-out", "curl", "allow 169.254.175.1 port 80"]
            .iter()
            .all(|words| line.contains(words))
    };
    let deadline = Instant::now() + SOON;
    while !node.agent.log_text()?.lines().any(said) {
        assert!(Instant::now() < deadline, "{}", node.agent.log_tail());
        sleep(Duration::from_millis(10)).await;
    }
    node.down().await
}
