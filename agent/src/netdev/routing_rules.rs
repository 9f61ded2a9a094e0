//! `ip rule`s that let pods reach the target where their packets are routed before the local table is looked up.
//!
//! Owns the rules with podgate's protocol number and no other; adds no route to any table. In the strict mode of security
//! groups for pods, the VPC CNI routes whatever comes from such a pod by a table of the pod's own (`iif vlan… lookup 101`,
//! at preference 10; the local table's rule moves to 20). Two kinds of rules make the target reachable again: one to the
//! target by the local table, and one per pod for the responses, since only the pod's table has a route to it. Nodes without
//! such rules get none.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use futures::{Stream, StreamExt as _, TryStreamExt as _};
use rtnetlink::{
    Error as NetlinkError, Handle, IpVersion, MulticastGroup, RouteMessageBuilder, new_multicast_connection,
    packet_route::{
        AddressFamily,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol},
        rule::{RuleAction, RuleAttribute, RuleMessage},
    },
};
use rustix::io::Errno;
use tokio::{sync::Mutex, task::JoinHandle, time::timeout};
use tracing::{info, warn};

use super::{Error, kernel_error};

/// Marks a rule as podgate's (`ip rule` shows it as `proto 80`): a number that neither `include/uapi/linux/rtnetlink.h` nor
/// iproute2's `rt_protos` assigns.
const PROTOCOL: u8 = 80;
/// Before the VPC CNI's rules for pods with security groups (its `VlanRulePriority` is 10).
const PREFERENCE: u32 = 9;
/// `RT_TABLE_LOCAL` of `include/uapi/linux/rtnetlink.h`.
const LOCAL: u32 = 255;
/// How stale the rules may get when the kernel drops a notification, as it does when they come too fast.
const RESYNC: Duration = Duration::from_secs(30);

/// Keeps the rules current until it is dropped.
#[derive(Debug)]
pub(super) struct Rules {
    handle: Handle,
    /// Locked while rules are changed.
    targets: Arc<Mutex<BTreeSet<IpAddr>>>,
    follower: AbortOnDrop,
}

/// One of podgate's rules: from `source`, or from anywhere, to `destination` by `table`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rule {
    source: Option<IpAddr>,
    destination: IpAddr,
    table: u32,
}

// === impl Rules ===

impl Rules {
    /// Follows the node's rules from now on, with no targets yet.
    pub(super) fn follow(handle: Handle) -> Self {
        let targets = Arc::<Mutex<BTreeSet<IpAddr>>>::default();
        let follower = AbortOnDrop(tokio::spawn(follow(Arc::clone(&targets))));
        Self { handle, targets, follower }
    }

    /// Adds the rules that one more target needs, and adopts those that a predecessor left.
    pub(super) async fn add(&self, target: IpAddr) -> Result<(), Error> {
        let mut targets = self.targets.lock().await;
        reconcile(&self.handle, target).await.map_err(|error| refused(&error))?;
        if targets.insert(target) {
            report_too_early(&self.handle, target).await.map_err(|error| refused(&error))?;
        }
        Ok(())
    }

    /// Removes the rules of every other target, those of a predecessor too.
    pub(super) async fn keep_only(&self, kept: &[IpAddr]) -> Result<(), Error> {
        let mut targets = self.targets.lock().await;
        targets.retain(|target| kept.contains(target));
        for rule in all(&self.handle).await?.into_iter().filter(|rule| !kept.contains(&rule.target())) {
            rule.remove(&self.handle).await.map_err(|error| refused(&error))?;
        }
        Ok(())
    }

    /// Stops following: no rule is changed after this.
    pub(super) async fn stop(mut self) {
        self.follower.0.abort();
        // It ends only by being aborted.
        let _ = (&mut self.follower.0).await;
    }
}

/// Every one of podgate's rules on the node.
pub(super) async fn all(handle: &Handle) -> Result<BTreeSet<Rule>, Error> {
    let mut all = BTreeSet::new();
    for family in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)] {
        all.extend(own(&rules(handle, family).await.map_err(|error| refused(&error))?));
    }
    Ok(all)
}

/// Removes all of podgate's rules.
pub(super) async fn remove_all(handle: &Handle) -> Result<(), Error> {
    for rule in all(handle).await? {
        rule.remove(handle).await.map_err(|error| refused(&error))?;
    }
    Ok(())
}

// === impl Rule ===

impl Rule {
    /// Parses a rule with podgate's protocol number.
    fn read(message: &RuleMessage) -> Option<Self> {
        let mut source = None;
        let mut destination = None;
        for attribute in &message.attributes {
            match attribute {
                RuleAttribute::Source(address) => source = Some(*address),
                RuleAttribute::Destination(address) => destination = Some(*address),
                _ => {}
            }
        }
        Some(Self { source, destination: destination?, table: table_of(message) })
    }

    /// The address of podgate that it is for.
    fn target(&self) -> IpAddr {
        self.source.unwrap_or(self.destination)
    }

    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        let bits = if self.destination.is_ipv4() { 32 } else { 128 };
        message.header.family =
            if self.destination.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.action = RuleAction::ToTable;
        message.header.dst_len = bits;
        message.attributes = vec![
            RuleAttribute::Destination(self.destination),
            RuleAttribute::Table(self.table),
            RuleAttribute::Priority(PREFERENCE),
            RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)),
        ];
        if let Some(source) = self.source {
            message.header.src_len = bits;
            message.attributes.push(RuleAttribute::Source(source));
        }
        message
    }

    async fn add(&self, handle: &Handle) -> Result<(), NetlinkError> {
        let mut request = handle.rule().add();
        *request.message_mut() = self.message();
        unless(Errno::EXIST, request.execute().await)
    }

    async fn remove(&self, handle: &Handle) -> Result<(), NetlinkError> {
        unless(Errno::NOENT, handle.rule().del(self.message()).execute().await)
    }
}

impl fmt::Display for Rule {
    /// As `ip rule` prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.source {
            Some(source) => write!(f, "from {source} ")?,
            None => write!(f, "from all ")?,
        }
        write!(f, "to {} lookup {} proto {PROTOCOL}", self.destination, self.table)
    }
}

/// Ignores the error which says that another generation has done the same meanwhile.
fn unless(done: Errno, result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match result {
        Err(error) if kernel_error(&error).raw_os_error() == Some(done.raw_os_error()) => Ok(()),
        result => result,
    }
}

/// Keeps the rules current until shutdown.
async fn follow(targets: Arc<Mutex<BTreeSet<IpAddr>>>) {
    loop {
        if let Err(error) = follow_until_lost(&targets).await {
            warn!(%error, "pods with security groups of their own may not reach podgate; retrying");
        }
        tokio::time::sleep(RESYNC).await;
    }
}

/// Keeps the rules current until the kernel refuses a change or stops sending notifications.
async fn follow_until_lost(targets: &Mutex<BTreeSet<IpAddr>>) -> Result<(), Error> {
    let groups = [MulticastGroup::Ipv4Rule, MulticastGroup::Ipv6Rule];
    let (connection, handle, mut notifications) = new_multicast_connection(&groups).map_err(Error::Socket)?;
    let _connection = AbortOnDrop(tokio::spawn(connection));
    loop {
        for &target in targets.lock().await.iter() {
            reconcile(&handle, target).await.map_err(|error| refused(&error))?;
        }
        // A notification only says when to read the rules, not what changed.
        if let Ok(None) = timeout(RESYNC, notifications.next()).await {
            return Ok(());
        }
    }
}

/// Aborts a task with its owner.
#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Makes podgate's rules for a target match what the node's other rules require.
async fn reconcile(handle: &Handle, target: IpAddr) -> Result<(), NetlinkError> {
    let rules = rules(handle, target).await?;
    let mut present = own(&rules);
    present.retain(|rule| rule.target() == target);
    let tables = tables_before_local(&rules);
    let wanted = if tables.is_empty() {
        BTreeSet::new()
    } else {
        wanted(target, &tables, &routes(handle, target).await?)
    };
    for rule in present.difference(&wanted) {
        rule.remove(handle).await?;
    }
    for rule in wanted.difference(&present) {
        rule.add(handle).await?;
    }
    if present != wanted {
        info!(%target, tables = ?tables, rules = wanted.len(), "changed the rules for pods that are routed before the local table");
    }
    Ok(())
}

/// Warns of rules that podgate cannot override: they come before its own.
async fn report_too_early(handle: &Handle, target: IpAddr) -> Result<(), NetlinkError> {
    let rules = rules(handle, target).await?;
    let too_early: BTreeSet<_> =
        by_netdev_before_local(&rules).map(preference_of).filter(|&at| at <= PREFERENCE).collect();
    if !too_early.is_empty() {
        warn!(
            %target, preferences = ?too_early,
            "pods behind interfaces that `ip rule` routes at these preferences cannot reach podgate, whose own rules \
             are at {PREFERENCE}: move them to {} or later, or before them add `ip rule add to {target} lookup \
             local` and a rule for the responses",
            PREFERENCE + 1
        );
    }
    Ok(())
}

/// The tables that pods are routed by before the local one, and that podgate's rules must come before.
fn tables_before_local(rules: &[RuleMessage]) -> BTreeSet<u32> {
    by_netdev_before_local(rules).filter(|rule| preference_of(rule) > PREFERENCE).map(table_of).collect()
}

/// The rules by which packets from certain netdevs are routed before the local table is looked up.
fn by_netdev_before_local(rules: &[RuleMessage]) -> impl Iterator<Item = &RuleMessage> {
    let others = || rules.iter().filter(|rule| !is_own(rule) && rule.header.action == RuleAction::ToTable);
    let local = others().filter(|rule| table_of(rule) == LOCAL).map(preference_of).min();
    others()
        .filter(move |rule| local.is_none_or(|local| preference_of(rule) < local))
        .filter(|rule| rule.attributes.iter().any(|attribute| matches!(attribute, RuleAttribute::Iifname(_))))
}

/// The rules for `target` where pods are routed by `tables`.
fn wanted(target: IpAddr, tables: &BTreeSet<u32>, routes: &[RouteMessage]) -> BTreeSet<Rule> {
    let mut wanted = BTreeSet::from([Rule { source: None, destination: target, table: LOCAL }]);
    for &table in tables {
        let routes = || routes.iter().filter(move |route| route_table(route) == table);
        // The netdev to the VPC has the default route, and a host route to its gateway, which is no pod.
        let uplinks: Vec<_> = routes().filter(|route| destination(route).is_none()).map(netdev_of).collect();
        let pods = routes().filter(|route| !uplinks.contains(&netdev_of(route))).filter_map(destination);
        wanted.extend(pods.map(|pod| Rule { source: Some(target), destination: pod, table }));
    }
    wanted
}

fn own(rules: &[RuleMessage]) -> BTreeSet<Rule> {
    rules.iter().filter(|rule| is_own(rule)).filter_map(Rule::read).collect()
}

fn is_own(rule: &RuleMessage) -> bool {
    rule.attributes.contains(&RuleAttribute::Protocol(RouteProtocol::Other(PROTOCOL)))
}

/// A rule without the attribute has preference 0.
fn preference_of(rule: &RuleMessage) -> u32 {
    let preference = |attribute: &_| match attribute {
        RuleAttribute::Priority(preference) => Some(*preference),
        _ => None,
    };
    rule.attributes.iter().find_map(preference).unwrap_or(0)
}

/// The header has room for the first 255 tables.
fn table_of(rule: &RuleMessage) -> u32 {
    let table = |attribute: &_| match attribute {
        RuleAttribute::Table(table) => Some(*table),
        _ => None,
    };
    rule.attributes.iter().find_map(table).unwrap_or_else(|| rule.header.table.into())
}

/// The header has room for the first 255 tables.
fn route_table(route: &RouteMessage) -> u32 {
    let table = |attribute: &_| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    };
    route.attributes.iter().find_map(table).unwrap_or_else(|| route.header.table.into())
}

fn netdev_of(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(netdev) => Some(*netdev),
        _ => None,
    })
}

/// Where a route leads; a default route has none.
fn destination(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
        RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
        _ => None,
    })
}

/// Every rule of the target's family.
async fn rules(handle: &Handle, target: IpAddr) -> Result<Vec<RuleMessage>, NetlinkError> {
    let version = if target.is_ipv4() { IpVersion::V4 } else { IpVersion::V6 };
    collect(handle.rule().get(version).execute()).await
}

/// Every route of the target's family, in all tables.
async fn routes(handle: &Handle, target: IpAddr) -> Result<Vec<RouteMessage>, NetlinkError> {
    let every = match target {
        IpAddr::V4(_) => RouteMessageBuilder::<Ipv4Addr>::new().build(),
        IpAddr::V6(_) => RouteMessageBuilder::<Ipv6Addr>::new().build(),
    };
    collect(handle.route().get(every).execute()).await
}

async fn collect<T>(answers: impl Stream<Item = Result<T, NetlinkError>>) -> Result<Vec<T>, NetlinkError> {
    answers.try_collect().await
}

fn refused(error: &NetlinkError) -> Error {
    Error::Rules { source: kernel_error(error) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 170, 23));
    const POD: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 7);
    const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 1);
    const UPLINK: u32 = 5;
    const VETH: u32 = 6;

    fn rule(preference: u32, table: u32, from: Option<&str>) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![RuleAttribute::Table(table)];
        if preference > 0 {
            rule.attributes.push(RuleAttribute::Priority(preference));
        }
        rule.attributes.extend(from.map(|netdev| RuleAttribute::Iifname(netdev.to_owned())));
        rule
    }

    fn route(table: u32, netdev: u32, to: Option<Ipv4Addr>) -> RouteMessage {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().table_id(table).output_interface(netdev);
        match to {
            Some(to) => route.destination_prefix(to, 32).build(),
            None => route.build(),
        }
    }

    #[test]
    fn tables_before_the_local_one_are_those_of_rules_by_netdev() {
        let strict = [
            rule(10, 101, Some("vlan.eth.1")),
            rule(10, 101, Some("vlan4f3a")),
            rule(10, 102, Some("vlan77b0")),
            rule(20, LOCAL, None),
            rule(1024, 103, Some("eth1")),
            rule(32766, 254, None),
        ];
        assert_eq!(tables_before_local(&strict), BTreeSet::from([101, 102]));
        let usual = [rule(0, LOCAL, None), rule(10, 101, Some("vlan4f3a")), rule(32766, 254, None)];
        assert_eq!(tables_before_local(&usual), BTreeSet::new());
        // Before podgate's own rules.
        let early = [rule(PREFERENCE, 101, Some("vlan4f3a")), rule(20, LOCAL, None)];
        assert_eq!(tables_before_local(&early), BTreeSet::new());
        // A mark, as some CNIs put on what their own proxies send.
        let marked = [rule(10, 2004, None), rule(100, LOCAL, None)];
        assert_eq!(tables_before_local(&marked), BTreeSet::new());
    }

    #[test]
    fn own_rules_do_not_count_as_those_of_the_node() {
        let own = Rule { source: None, destination: TARGET, table: LOCAL };
        let node = [own.message(), rule(10, 101, Some("vlan4f3a")), rule(20, LOCAL, None)];
        assert_eq!(tables_before_local(&node), BTreeSet::from([101]));
        assert_eq!(super::own(&node), BTreeSet::from([own]));
    }

    #[test]
    fn responses_go_to_the_pods_of_a_table_and_not_to_its_router() {
        let routes = [
            route(101, UPLINK, Some(ROUTER)),
            route(101, UPLINK, None),
            route(101, VETH, Some(POD)),
            route(254, VETH, Some(Ipv4Addr::new(10, 0, 1, 8))),
        ];
        let expected = BTreeSet::from([
            Rule { source: None, destination: TARGET, table: LOCAL },
            Rule { source: Some(TARGET), destination: POD.into(), table: 101 },
        ]);
        assert_eq!(wanted(TARGET, &BTreeSet::from([101]), &routes), expected);
    }

    #[test]
    fn a_rule_is_parsed_as_it_was_written() {
        for rule in [
            Rule { source: None, destination: TARGET, table: LOCAL },
            Rule { source: Some(TARGET), destination: POD.into(), table: 4321 },
            Rule { source: None, destination: "fd00:ec2::23".parse().unwrap(), table: LOCAL },
        ] {
            assert_eq!(Rule::read(&rule.message()), Some(rule));
        }
    }
}
