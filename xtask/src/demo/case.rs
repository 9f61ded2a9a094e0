//! One row of the demo: what was expected, what the client got, and the verdict.
//!
//! Owns the verdict, a pure function of the client's access key and what the simulated AWS side recorded.

use lab::{NODE_ACCESS_KEY_ID, NODE_ROLE, Pod, eks_auth_server::Issued};
use serde::Serialize;

use super::attempt::{Attempt, Source};

/// What a client should get.
#[derive(Debug)]
pub(super) enum Expected {
    /// The role of its pod's service account.
    OwnRole,
    /// No credentials, but a reason.
    Refusal {
        /// What the reason must name.
        naming: Vec<String>,
        /// Milliseconds it may take.
        within: Option<f64>,
    },
    /// No connection, within so many milliseconds.
    NoConnection {
        /// Milliseconds it may take.
        within: f64,
    },
    /// The node's role, from the real metadata service.
    NodeRole,
}

/// Who asks what, how.
#[derive(Debug)]
pub(super) struct Case<'a> {
    number: &'static str,
    pub(super) source: Source<'a>,
    original_destination: &'static str,
    dialect: &'static str,
    expected: Expected,
}

/// What the simulated AWS side recorded.
#[derive(Debug)]
pub(super) struct Found {
    /// What EKS Auth handed out under the client's access key.
    pub(super) issued: Option<Issued>,
    /// How often the node's credentials were read during the attempt.
    pub(super) node_reads: u64,
}

/// One row.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) number: &'static str,
    pub(super) pod: String,
    pub(super) service_account: String,
    pub(super) client: String,
    pub(super) original_destination: &'static str,
    pub(super) dialect: &'static str,
    pub(super) role: Option<String>,
    pub(super) access_key_id: Option<String>,
    pub(super) milliseconds: f64,
    pub(super) expected: bool,
    pub(super) verdict: String,
}

// === impl Case ===

impl<'a> Case<'a> {
    pub(super) fn new(
        number: &'static str,
        source: Source<'a>,
        original_destination: &'static str,
        dialect: &'static str,
        expected: Expected,
    ) -> Self {
        Self { number, source, original_destination, dialect, expected }
    }
}

// === impl Row ===

impl Row {
    pub(super) fn new(case: &Case<'_>, attempt: Attempt, found: &Found) -> Self {
        let (expected, verdict) = match judge(case, &attempt, found) {
            Ok(verdict) => (true, verdict),
            Err(verdict) => (false, verdict),
        };
        let (pod, service_account) = match case.source {
            Source::Pod(pod) => (pod.full_name(), format!("{}/{}", pod.namespace, pod.service_account)),
            Source::Node => ("(the node)".to_owned(), "-".to_owned()),
        };
        Self {
            number: case.number,
            pod,
            service_account,
            client: attempt.version.unwrap_or_default(),
            original_destination: case.original_destination,
            dialect: case.dialect,
            role: role(attempt.access_key_id.as_deref(), found),
            access_key_id: attempt.access_key_id,
            milliseconds: attempt.milliseconds,
            expected,
            verdict,
        }
    }

    pub(super) fn is_expected(&self) -> bool {
        self.expected
    }
}

/// Whether the attempt is as the case expects; either way the reason.
fn judge(case: &Case<'_>, attempt: &Attempt, found: &Found) -> Result<String, String> {
    let is_node_key = attempt.access_key_id.as_deref() == Some(NODE_ACCESS_KEY_ID);
    match (&case.expected, case.source) {
        (Expected::NodeRole, _) if is_node_key && found.node_reads == 1 => Ok("untouched".to_owned()),
        (Expected::NodeRole, _) => Err(format!("does not see the real IMDS: {}", attempt.message)),
        _ if is_node_key || found.node_reads > 0 => Err("the node's role was handed out".to_owned()),
        (Expected::OwnRole, Source::Pod(pod)) => own_role(pod, attempt, found.issued.as_ref()),
        (Expected::OwnRole, Source::Node) => Err("BUG: the node has no role of its own here".to_owned()),
        (Expected::NoConnection { within }, _) => no_connection(*within, attempt),
        (Expected::Refusal { naming, within }, _) => refusal(naming, *within, attempt),
    }
}

fn own_role(pod: &Pod, attempt: &Attempt, issued: Option<&Issued>) -> Result<String, String> {
    let Some(key) = &attempt.access_key_id else {
        return Err(format!("no credentials: {}", attempt.message));
    };
    let Some(issued) = issued else { return Err(format!("EKS Auth never handed out {key}")) };
    let own = issued.pod_uid == pod.uid
        && issued.namespace == pod.namespace
        && issued.service_account == pod.service_account
        && Some(&issued.role_name) == pod.role.as_ref();
    if own {
        Ok("its own role".to_owned())
    } else {
        Err(format!("the role of {}/{}", issued.namespace, issued.service_account))
    }
}

fn no_connection(within: f64, attempt: &Attempt) -> Result<String, String> {
    match attempt.status {
        Some(0) if attempt.milliseconds <= within => Ok("refused at once by the kernel".to_owned()),
        Some(0) => Err(format!("refused, but not within {within} ms: {}", attempt.message)),
        status => Err(format!("status {status:?}: {}", attempt.message)),
    }
}

fn refusal(naming: &[String], within: Option<f64>, attempt: &Attempt) -> Result<String, String> {
    if let Some(key) = &attempt.access_key_id {
        return Err(format!("got the credentials {key}"));
    }
    // An SDK keeps the status to itself; that it ended without credentials is what counts.
    let Some(status) = attempt.status else { return Ok("no credentials, and not the node's".to_owned()) };
    if !(400..500).contains(&status) {
        return Err(format!("status {status}: {}", attempt.message));
    }
    if let Some(missing) = naming.iter().find(|name| !attempt.message.contains(*name)) {
        return Err(format!("refused without naming {missing}: {}", attempt.message));
    }
    match within {
        Some(limit) if attempt.milliseconds > limit => Err(format!("refused, but not within {limit} ms")),
        _ => Ok(format!("refused ({status}), naming {}", naming.join(" and "))),
    }
}

fn role(access_key_id: Option<&str>, found: &Found) -> Option<String> {
    match access_key_id {
        Some(NODE_ACCESS_KEY_ID) => Some(format!("{NODE_ROLE} (the node's)")),
        _ => found.issued.as_ref().map(|issued| issued.role_name.clone()),
    }
}
