//! Counts requests.
//!
//! Owns the labels, which are closed sets or names of what runs on this node; never takes a label from a request.

use hyper::StatusCode;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};

use crate::{dialect::Dialect, identity::ServiceAccountRef};

/// Counts requests, and connections that were refused.
#[derive(Clone, Debug, Default)]
pub struct RequestMetrics {
    requests: Family<RequestLabels, Counter>,
    imds_v1: Family<AnswerLabels, Counter>,
    delegated: Family<AnswerLabels, Counter>,
    mismatched_tokens: Family<AccountLabels, Counter>,
    tokenless: Family<AccountLabels, Counter>,
    abandoned: Family<DialectLabels, Counter>,
    /// Connections past what a caller may have open.
    pub(super) refused_connections: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    dialect: &'static str,
    status: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DialectLabels {
    dialect: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AccountLabels {
    namespace: String,
    service_account: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AnswerLabels {
    namespace: String,
    service_account: String,
    answer: &'static str,
}

// === impl RequestMetrics ===

impl RequestMetrics {
    /// Registers its counters with `registry`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("podgate_requests", "Requests answered (unstable)", metrics.requests.clone());
        registry.register(
            "podgate_imds_v1_requests",
            "IMDSv1 requests, by the service account that has yet to move to IMDSv2 (unstable)",
            metrics.imds_v1.clone(),
        );
        registry.register(
            "podgate_delegated_requests",
            "Requests with another pod's token, by the delegate that may present it (unstable)",
            metrics.delegated.clone(),
        );
        registry.register(
            "podgate_mismatched_tokens",
            "Requests with another pod's token, by the service account that may not present it (unstable)",
            metrics.mismatched_tokens.clone(),
        );
        registry.register(
            "podgate_tokenless_requests",
            "Requests to the container endpoints that were served without a token, by service account (unstable)",
            metrics.tokenless.clone(),
        );
        registry.register(
            "podgate_abandoned_requests",
            "Requests whose caller hung up before the answer (unstable)",
            metrics.abandoned.clone(),
        );
        registry.register(
            "podgate_refused_connections",
            "Connections past what a caller may have open (unstable)",
            metrics.refused_connections.clone(),
        );
        metrics
    }

    /// Counts one response.
    pub(super) fn count(&self, dialect: Dialect, status: StatusCode) {
        let labels = RequestLabels { dialect: dialect.label(), status: status.as_u16() };
        self.requests.get_or_create(&labels).inc();
    }

    /// Counts one use of IMDSv1.
    pub(super) fn count_v1(&self, account: &ServiceAccountRef, is_served: bool) {
        self.imds_v1.get_or_create(&AnswerLabels::new(account, is_served)).inc();
    }

    /// Counts one token of another pod, presented by a delegate.
    pub(super) fn count_delegated(&self, delegate: &ServiceAccountRef, is_served: bool) {
        self.delegated.get_or_create(&AnswerLabels::new(delegate, is_served)).inc();
    }

    /// Counts one token of another pod, presented by a caller that may not.
    pub(super) fn count_mismatched_token(&self, account: &ServiceAccountRef) {
        self.mismatched_tokens.get_or_create(&AccountLabels::new(account)).inc();
    }

    /// Counts one response of a container endpoint to a pod that sent no token.
    pub(super) fn count_tokenless(&self, account: &ServiceAccountRef) {
        self.tokenless.get_or_create(&AccountLabels::new(account)).inc();
    }

    /// Counts one caller that hung up before the response.
    pub(super) fn count_abandoned(&self, dialect: Dialect) {
        self.abandoned.get_or_create(&DialectLabels { dialect: dialect.label() }).inc();
    }
}

// === impl AccountLabels ===

impl AccountLabels {
    fn new(account: &ServiceAccountRef) -> Self {
        Self { namespace: account.namespace.clone(), service_account: account.name.clone() }
    }
}

// === impl AnswerLabels ===

impl AnswerLabels {
    fn new(account: &ServiceAccountRef, is_served: bool) -> Self {
        Self {
            namespace: account.namespace.clone(),
            service_account: account.name.clone(),
            answer: if is_served { "served" } else { "refused" },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imds_v1_is_counted_by_service_account() {
        let mut registry = Registry::default();
        let metrics = RequestMetrics::register(&mut registry);
        let account_of = |name: &str| ServiceAccountRef { namespace: "app".into(), name: name.into() };
        for (name, is_served) in [("web", false), ("web", false), ("web", true), ("old", true)] {
            metrics.count_v1(&account_of(name), is_served);
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for (name, answer, count) in [("web", "refused", 2), ("web", "served", 1), ("old", "served", 1)] {
            let line = format!(
                "podgate_imds_v1_requests_total{{namespace=\"app\",service_account=\"{name}\",answer=\"{answer}\"}} {count}"
            );
            assert!(text.contains(&line), "{line} is not in {text}");
        }
    }
}
