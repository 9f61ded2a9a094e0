//! Who may do what: RBAC, the Node authorizer, and the audience rule of `NodeRestriction`.
//!
//! Owns the rules effective. Never changes the cluster.

use anyhow::Context as _;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding};
use serde_json::Value;

use super::{
    attributes::Attributes,
    status::Status,
    user::{AUTHENTICATED, MASTERS, NODES, SERVICE_ACCOUNTS, User},
};
use crate::cluster::{Cluster, POD_IDENTITY_AUDIENCE, store::Kind};

const AUTHENTICATION: &str = "authentication.k8s.io";
const REQUEST_AUDIENCE: &str = "request-serviceaccounts-token-audience";

/// Where the keys of tokens are.
const ISSUER: [&str; 2] = ["/openid/v1/jwks", "/.well-known/openid-configuration"];

/// What nodes may do without a check of the single object by the Node authorizer, as far as the lab serves it.
const NODE_RULES: &[(&[&str], &str, &[&str])] =
    &[(&["create"], AUTHENTICATION, &["tokenreviews"]), (&["create", "update", "patch"], "", &["events"])];

/// The RBAC rules effective.
#[derive(Debug)]
pub(super) struct Rules {
    rules: Vec<Rule>,
}

#[derive(Debug, PartialEq, Eq)]
struct Rule {
    /// A user's name, or a group's.
    subject: String,
    verbs: Vec<String>,
    group: String,
    /// Resources with their subresource, or paths.
    resources: Vec<String>,
}

// === impl Rules ===

impl Rules {
    /// What every cluster has, and the audience rule for nodes.
    pub(super) fn new() -> Self {
        let mut rules = Self { rules: Vec::new() };
        let anybody = &["/healthz", "/livez", "/readyz", "/version"];
        rules.grant("system:unauthenticated", &["get"], "", anybody);
        rules.grant(AUTHENTICATED, &["get"], "", anybody);
        rules.grant(AUTHENTICATED, &["create"], AUTHENTICATION, &["selfsubjectreviews"]);
        rules.allow_issuer_discovery(true);
        rules.allow_node_audience(true);
        rules
    }

    /// Grants what the cluster roles and bindings of a manifest grant, and nothing else.
    pub(super) fn apply(&mut self, manifest: &str) -> anyhow::Result<()> {
        let documents: Vec<Value> = serde_saphyr::from_multiple(manifest)?;
        let of_kind = |kind: &'static str| documents.iter().filter(move |document| document["kind"] == kind);
        for binding in of_kind("ClusterRoleBinding") {
            let ClusterRoleBinding { role_ref, subjects, .. } = serde_json::from_value(binding.clone())?;
            let role = of_kind("ClusterRole").find(|role| role["metadata"]["name"] == role_ref.name);
            let role = role.with_context(|| format!("there is no cluster role {}", role_ref.name))?;
            let ClusterRole { rules, .. } = serde_json::from_value(role.clone())?;
            for subject in subjects.iter().flatten() {
                let subject = match &subject.namespace {
                    Some(namespace) => User::service_account_name(namespace, &subject.name),
                    None => subject.name.clone(),
                };
                for rule in rules.iter().flatten() {
                    for group in rule.api_groups.iter().flatten() {
                        self.grant(
                            &subject,
                            &rule.verbs,
                            group,
                            rule.resources.as_deref().unwrap_or_default(),
                        );
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn allow_impersonation(&mut self, subject: &str) {
        self.grant(subject, &["impersonate:associated-node"], AUTHENTICATION, &["nodes"]);
        let read = &[
            "impersonate-on:associated-node:list",
            "impersonate-on:associated-node:watch",
            "impersonate-on:associated-node:get",
        ];
        self.grant(subject, read, "", &["pods"]);
        self.grant(subject, &["impersonate-on:associated-node:get"], "", &["serviceaccounts"]);
        self.grant(subject, &["impersonate-on:associated-node:create"], "", &["serviceaccounts/token"]);
        self.grant_own(subject);
    }

    pub(super) fn grant_plain_rbac(&mut self, subject: &str) {
        self.grant(subject, &["get", "list", "watch"], "", &["pods", "serviceaccounts"]);
        self.grant(subject, &["create"], "", &["serviceaccounts/token"]);
        self.grant_own(subject);
    }

    /// What `system:service-account-issuer-discovery` grants, unless an administrator has removed its binding.
    pub(super) fn allow_issuer_discovery(&mut self, allow: bool) {
        self.rules.retain(|rule| rule.resources != ISSUER);
        if allow {
            self.grant(SERVICE_ACCOUNTS, &["get"], "", &ISSUER);
        }
    }

    pub(super) fn allow_node_audience(&mut self, allow: bool) {
        self.rules.retain(|rule| rule.verbs != [REQUEST_AUDIENCE]);
        if allow {
            // The audience stands in the place of the resource.
            self.grant(NODES, &[REQUEST_AUDIENCE], "", &[POD_IDENTITY_AUDIENCE]);
        }
    }

    /// Refuses what no authorizer allows.
    pub(super) fn check(
        &self,
        cluster: &Cluster,
        user: &User,
        attributes: &Attributes,
    ) -> Result<(), Status> {
        let reason = match user.node_identity() {
            _ if self.allows(user, attributes) => return Ok(()),
            None => String::new(),
            Some(node) => match check_node(cluster, node, attributes) {
                Ok(()) => return Ok(()),
                Err(reason) => reason,
            },
        };
        Err(Status::forbidden(user, attributes, &reason))
    }

    /// Whether RBAC gives a node the right to a token for this audience.
    pub(super) fn allows_audience(&self, node: &User, attributes: &Attributes, audience: &str) -> bool {
        let verb = REQUEST_AUDIENCE.to_owned();
        let (resource, subresource) = (audience.to_owned(), String::new());
        self.allows(node, &Attributes { verb, resource, subresource, ..attributes.clone() })
    }

    pub(super) fn allows(&self, user: &User, attributes: &Attributes) -> bool {
        let resource = attributes.full_resource();
        let applies = |rule: &Rule| {
            (rule.subject == user.name || user.is_in(&rule.subject))
                && rule.group == attributes.group
                && rule.verbs.contains(&attributes.verb)
                && rule.resources.contains(&resource)
        };
        user.is_in(MASTERS) || self.rules.iter().any(applies)
    }

    /// What an agent does as itself, without impersonation.
    fn grant_own(&mut self, subject: &str) {
        self.grant(subject, &["get", "list", "watch"], "", &["namespaces"]);
        self.grant(subject, &["create"], "", &["events"]);
    }

    fn grant(&mut self, subject: &str, verbs: &[impl ToString], group: &str, resources: &[impl ToString]) {
        let rule = Rule {
            subject: subject.to_owned(),
            verbs: verbs.iter().map(ToString::to_string).collect(),
            group: group.to_owned(),
            resources: resources.iter().map(ToString::to_string).collect(),
        };
        if !self.rules.contains(&rule) {
            self.rules.push(rule);
        }
    }
}

/// The Node authorizer; the error is its reason, which may be empty.
fn check_node(cluster: &Cluster, node: &str, attributes: &Attributes) -> Result<(), String> {
    let Attributes { verb, group, name, namespace, .. } = attributes;
    let related = |kind| {
        if cluster.related(node, kind, namespace, name) {
            return Ok(());
        }
        Err(format!("no relationship found between node '{node}' and this object"))
    };
    let refuse = |reason: &str| Err(reason.to_owned());
    let resource = attributes.full_resource();
    match (group.as_str(), resource.as_str(), verb.as_str()) {
        ("", "pods", "get") => related(Kind::Pod),
        ("", "pods", "list" | "watch") if attributes.field("spec.nodeName") == Some(node) => Ok(()),
        ("", "pods", "list" | "watch") if !name.is_empty() => related(Kind::Pod),
        ("", "pods", "list" | "watch") => {
            refuse("can only list/watch pods with spec.nodeName field selector")
        }
        ("", "nodes", "get" | "list" | "watch") => match name.as_str() {
            name if name == node => Ok(()),
            "" => Err(format!("node '{node}' cannot read all nodes, only its own Node object")),
            name => Err(format!("node '{node}' cannot read '{name}', only its own Node object")),
        },
        ("", "serviceaccounts", "get") => related(Kind::ServiceAccount),
        ("", "serviceaccounts" | "serviceaccounts/token", _) => {
            if verb != "create" || name.is_empty() {
                return refuse("can only create tokens for individual service accounts");
            }
            if attributes.subresource != "token" {
                return refuse("can only create token subresource of serviceaccount");
            }
            related(Kind::ServiceAccount)
        }
        (group, resource, verb) => {
            let applies = |(verbs, of, resources): &(&[&str], &str, &[&str])| {
                *of == group && verbs.contains(&verb) && resources.contains(&resource)
            };
            if NODE_RULES.iter().any(applies) { Ok(()) } else { refuse("") }
        }
    }
}
