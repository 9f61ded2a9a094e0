//! Impersonation: the constrained kind, and the older unconstrained kind as a fallback.
//!
//! Owns the headers and the modes. A UID or an extra value to act with is not served: no mode then applies but the
//! unconstrained one.

use hyper::HeaderMap;

use super::{
    attributes::Attributes,
    authorize::Rules,
    status::Status,
    user::{User, node_of_name, service_account_of_name},
};
use crate::cluster::Cluster;

/// The user that the headers ask to impersonate.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    name: String,
    groups: Vec<String>,
    only_name: bool,
}

/// Reads the headers.
pub(super) fn wanted(headers: &HeaderMap) -> Result<Option<Wanted>, Status> {
    let values = |name: &str| -> Vec<String> {
        let values = headers.get_all(name).iter();
        values.filter_map(|value| value.to_str().ok()).map(str::to_owned).collect()
    };
    let name = values("impersonate-user").into_iter().next().unwrap_or_default();
    let others = headers
        .keys()
        .any(|key| key.as_str().starts_with("impersonate-") && key.as_str() != "impersonate-user");
    if name.is_empty() && others {
        return Err(Status::bad_request(
            "requested impersonation without impersonating a user name".to_owned(),
        ));
    }
    let wanted = Wanted { name, groups: values("impersonate-group"), only_name: !others };
    Ok(Some(wanted).filter(|wanted| !wanted.name.is_empty()))
}

/// The user to go on as, if the requestor may act as that user for this very request.
pub(super) fn check(
    rules: &Rules,
    cluster: &Cluster,
    requestor: &User,
    wanted: &Wanted,
    attributes: &Attributes,
) -> Result<User, Status> {
    let mut first = None;
    for mode in modes(requestor, wanted) {
        match check_mode(rules, cluster, requestor, wanted, attributes, mode) {
            Ok(user) => return Ok(user),
            Err(status) => first = first.or(Some(status)),
        }
    }
    check_unconstrained(rules, cluster, requestor, wanted).map_err(|status| first.unwrap_or(status))
}

/// The constrained modes that apply, in the server's order.
fn modes(requestor: &User, wanted: &Wanted) -> Vec<&'static str> {
    let node = node_of_name(&wanted.name);
    let account = service_account_of_name(&wanted.name);
    let own_node = node.is_some() && node == requestor.associated_node();
    [
        ("associated-node", wanted.only_name && own_node),
        ("arbitrary-node", wanted.only_name && node.is_some()),
        ("serviceaccount", wanted.only_name && account.is_some()),
        ("user-info", wanted.only_name && node.is_none() && account.is_none()),
    ]
    .into_iter()
    .filter_map(|(mode, applies)| applies.then_some(mode))
    .collect()
}

fn check_mode(
    rules: &Rules,
    cluster: &Cluster,
    requestor: &User,
    wanted: &Wanted,
    attributes: &Attributes,
    mode: &str,
) -> Result<User, Status> {
    let on = Attributes { verb: format!("impersonate-on:{mode}:{}", attributes.verb), ..attributes.clone() };
    rules.check(cluster, requestor, &on)?;
    let mut target = target(wanted, "authentication.k8s.io", format!("impersonate:{mode}"));
    if mode == "associated-node" {
        // One decision serves every node of a service account, so none is named.
        "*".clone_into(&mut target.name);
    }
    rules.check(cluster, requestor, &target)?;
    Ok(user(wanted))
}

fn check_unconstrained(
    rules: &Rules,
    cluster: &Cluster,
    requestor: &User,
    wanted: &Wanted,
) -> Result<User, Status> {
    let mut target = target(wanted, "", "impersonate".to_owned());
    if target.resource == "nodes" {
        (target.resource, target.name) = ("users".to_owned(), wanted.name.clone());
    }
    rules.check(cluster, requestor, &target)?;
    for group in &wanted.groups {
        let target = Attributes { resource: "groups".to_owned(), name: group.clone(), ..target.clone() };
        rules.check(cluster, requestor, &target)?;
    }
    let mut user = user(wanted);
    if !wanted.groups.is_empty() {
        user.groups.clone_from(&wanted.groups);
    }
    Ok(user)
}

/// The object that stands for the wanted user.
fn target(wanted: &Wanted, group: &str, verb: String) -> Attributes {
    let (resource, namespace, name) =
        match (node_of_name(&wanted.name), service_account_of_name(&wanted.name)) {
            (Some(node), _) => ("nodes", "", node),
            (_, Some((namespace, name))) => ("serviceaccounts", namespace, name),
            _ => ("users", "", wanted.name.as_str()),
        };
    Attributes {
        verb,
        group: group.to_owned(),
        version: "v1".to_owned(),
        resource: resource.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        ..Attributes::default()
    }
}

/// The wanted user with the groups that the server gives.
fn user(wanted: &Wanted) -> User {
    match (node_of_name(&wanted.name), service_account_of_name(&wanted.name)) {
        (Some(node), _) => User::node(node),
        (_, Some((namespace, name))) => User::service_account(namespace, name),
        _ => User::new(&wanted.name, &[super::user::AUTHENTICATED]),
    }
}
