//! Users of the API as its filters see them.
//!
//! Owns names and groups. Never decides anything.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::jwt::Claims;

pub(super) const MASTERS: &str = "system:masters";
pub(super) const NODES: &str = "system:nodes";
pub(super) const AUTHENTICATED: &str = "system:authenticated";
pub(super) const SERVICE_ACCOUNTS: &str = "system:serviceaccounts";
const NODE_PREFIX: &str = "system:node:";
const SERVICE_ACCOUNT_PREFIX: &str = "system:serviceaccount:";
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// A user, real or impersonated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) uid: String,
    pub(super) groups: Vec<String>,
    pub(super) extra: BTreeMap<&'static str, String>,
}

// === impl User ===

impl User {
    pub(super) fn new(name: &str, groups: &[&str]) -> Self {
        let groups = groups.iter().map(|&group| group.to_owned()).collect();
        Self { name: name.to_owned(), groups, ..Self::default() }
    }

    pub(super) fn anonymous() -> Self {
        Self::new("system:anonymous", &["system:unauthenticated"])
    }

    pub(super) fn admin() -> Self {
        Self::new("admin", &[MASTERS, AUTHENTICATED])
    }

    pub(super) fn node(name: &str) -> Self {
        Self::new(&format!("{NODE_PREFIX}{name}"), &[NODES, AUTHENTICATED])
    }

    /// A service account without a token, as it is when impersonated.
    pub(super) fn service_account(namespace: &str, name: &str) -> Self {
        let of_namespace = format!("{SERVICE_ACCOUNTS}:{namespace}");
        let groups = [SERVICE_ACCOUNTS, &of_namespace, AUTHENTICATED];
        Self::new(&Self::service_account_name(namespace, name), &groups)
    }

    /// The user behind a service-account token.
    pub(super) fn of_token(claims: &Claims) -> Self {
        let kubernetes = &claims.kubernetes;
        let mut user = Self::service_account(&kubernetes.namespace, &kubernetes.serviceaccount.name);
        user.uid.clone_from(&kubernetes.serviceaccount.uid);
        user.extra.insert("authentication.kubernetes.io/credential-id", format!("JTI={}", claims.jti));
        if let Some(pod) = &kubernetes.pod {
            user.extra.insert("authentication.kubernetes.io/pod-name", pod.name.clone());
            user.extra.insert("authentication.kubernetes.io/pod-uid", pod.uid.clone());
        }
        if let Some(node) = &kubernetes.node {
            user.extra.insert(NODE_NAME, node.name.clone());
            user.extra.insert("authentication.kubernetes.io/node-uid", node.uid.clone());
        }
        user
    }

    pub(super) fn service_account_name(namespace: &str, name: &str) -> String {
        format!("{SERVICE_ACCOUNT_PREFIX}{namespace}:{name}")
    }

    pub(super) fn is_in(&self, group: &str) -> bool {
        self.groups.iter().any(|own| own == group)
    }

    /// The node that this user is.
    pub(super) fn node_identity(&self) -> Option<&str> {
        if self.is_in(NODES) { node_of_name(&self.name) } else { None }
    }

    /// The node that the service account's token is bound to.
    pub(super) fn associated_node(&self) -> Option<&str> {
        service_account_of_name(&self.name)?;
        self.extra.get(NODE_NAME).map(String::as_str)
    }

    /// `UserInfo` as reviews show it.
    pub(super) fn info(&self) -> Value {
        let extra: BTreeMap<_, _> = self.extra.iter().map(|(key, value)| (*key, [value])).collect();
        let mut info = json!({"username": self.name, "groups": self.groups});
        if !self.uid.is_empty() {
            info["uid"] = json!(self.uid);
        }
        if !extra.is_empty() {
            info["extra"] = json!(extra);
        }
        info
    }

    /// The answer to `SelfSubjectReview`.
    pub(super) fn self_review(&self) -> Value {
        json!({
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "SelfSubjectReview",
            "metadata": {},
            "status": {"userInfo": self.info()},
        })
    }
}

/// The node in a user name.
pub(super) fn node_of_name(user: &str) -> Option<&str> {
    user.strip_prefix(NODE_PREFIX).filter(|name| !name.is_empty())
}

/// Namespace and name of the service account in a user name.
pub(super) fn service_account_of_name(user: &str) -> Option<(&str, &str)> {
    user.strip_prefix(SERVICE_ACCOUNT_PREFIX)?.split_once(':')
}
