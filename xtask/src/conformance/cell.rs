//! One cell: what a client ended up with in a situation, and whether that is best for it.
//!
//! Owns the verdict, a pure function of the client's answer and of whose the access key is by the records of who issued it.

use serde::Serialize;

use super::{
    catalog::Client,
    column::{Best, Column},
    process::Answer,
};

/// A busy machine may make a client take so many times as long as it was seen to, and so many seconds more.
const SLACK: (f64, f64) = (3.0, 5.0);

/// More characters than this nobody reads below a table.
const NOTE: usize = 200;

/// A cell.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Cell {
    pub(super) client: &'static str,
    pub(super) version: Option<String>,
    #[serde(serialize_with = "title")]
    pub(super) column: Column,
    pub(super) verdict: Verdict,
    /// What is to be said about it.
    pub(super) why: Option<String>,
    /// Where the SDK says that its credentials are from.
    pub(super) source: Option<String>,
    /// Until when the SDK takes them to be good.
    pub(super) expires: Option<String>,
    pub(super) seconds: Option<f64>,
    /// Whether the client shows the reason of a refusal.
    pub(super) shows_reason: Option<bool>,
}

/// What became of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Verdict {
    /// It has its pod's own role.
    OwnRole,
    /// It has nothing, and knows it soon.
    Refused,
    /// It has the node's role, in `audit`.
    FallsThrough,
    /// It cannot do this by itself.
    Cannot,
    /// Anything else.
    Wrong,
    /// It could not be tried.
    NotRun,
}

/// Whose the access key is that a client shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// The pod's.
    Pod,
    /// The node's.
    Node,
    /// Another service account's, or nobody's.
    Other(String),
}

/// A verdict and what is to be said about it.
type Judged = (Verdict, Option<String>);

// === impl Cell ===

impl Cell {
    /// A cell of a client that has run. `owner` is whose its access key is, if it has one, and `reason` what a refusal
    /// must say.
    pub(super) fn new(
        client: &Client,
        column: Column,
        answer: &anyhow::Result<Answer>,
        owner: Option<&Owner>,
        reason: &str,
    ) -> Self {
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => return Self::failed(client.name, column, Verdict::Wrong, &format!("{error:#}")),
        };
        let said = answer.error.as_deref().unwrap_or("no error, and no access key");
        let shows_reason = said.contains(reason);
        let seconds = answer.ms / 1000.0;
        let (verdict, why) = judge(client, column, owner, (said, shows_reason), seconds);
        Self {
            client: client.name,
            version: Some(answer.version.clone()),
            column,
            verdict,
            why,
            source: answer.source.clone().filter(|_| owner.is_some()),
            expires: answer.expires.clone(),
            seconds: Some(seconds),
            shows_reason: (verdict == Verdict::Refused && column.best() == Best::Refusal)
                .then_some(shows_reason),
        }
    }

    /// A cell of a client that has shown nothing.
    pub(super) fn failed(client: &'static str, column: Column, verdict: Verdict, why: &str) -> Self {
        Self {
            client,
            version: None,
            column,
            verdict,
            why: Some(why.to_owned()),
            source: None,
            expires: None,
            seconds: None,
            shows_reason: None,
        }
    }

    /// What is to be said about it, in one line.
    pub(super) fn note(&self) -> Option<String> {
        let words = self.why.as_ref()?.split_whitespace().collect::<Vec<_>>().join(" ");
        let is_long = words.chars().count() > NOTE;
        Some(if is_long { words.chars().take(NOTE).chain(['…']).collect() } else { words })
    }

    /// What stands in the table.
    pub(super) fn text(&self) -> String {
        match self.verdict {
            Verdict::OwnRole => "own role".to_owned(),
            Verdict::Refused => format!("refused, {:.1} s", self.seconds.unwrap_or_default()),
            Verdict::FallsThrough => "falls through".to_owned(),
            Verdict::Cannot => "cannot".to_owned(),
            Verdict::Wrong => "WRONG".to_owned(),
            Verdict::NotRun => "not run".to_owned(),
        }
    }
}

// === impl Verdict ===

impl Verdict {
    /// Whether the run fails for it.
    pub(super) fn is_failure(self) -> bool {
        matches!(self, Self::Wrong | Self::NotRun)
    }
}

/// `said` is the client's error, of which `shows_reason` tells whether it has the refusal's words.
fn judge(
    client: &Client,
    column: Column,
    owner: Option<&Owner>,
    (said, shows_reason): (&str, bool),
    seconds: f64,
) -> Judged {
    let cannot = client.cannot(column);
    let must_show = client.shows_reason && cannot.is_none() && column.is_injected();
    let wrong = |why: String| (Verdict::Wrong, Some(why));
    match (column.best(), owner) {
        (_, Some(Owner::Other(whose))) => wrong(format!("has the role of {whose}")),
        (Best::Untouched, Some(Owner::Node)) => (Verdict::FallsThrough, None),
        (_, Some(Owner::Node)) => wrong("has the node's role".to_owned()),
        (Best::OwnRole, Some(Owner::Pod)) => {
            (Verdict::OwnRole, cannot.map(|why| format!("can, although the catalog says: {why}")))
        }
        (_, Some(Owner::Pod)) => wrong("has credentials that nobody can have given it now".to_owned()),
        (Best::OwnRole, None) => match cannot {
            Some(why) => (Verdict::Cannot, Some(why.to_owned())),
            None => wrong(format!("has no credentials: {said}")),
        },
        (Best::Untouched, None) if !column.is_injected() => {
            wrong(format!("does not see the node's own IMDS: {said}"))
        }
        (Best::Refusal, None) if must_show && !shows_reason => {
            wrong(format!("does not show why it is refused: {said}"))
        }
        (_, None) => refused(client, column, cannot, seconds),
    }
}

fn refused(client: &Client, column: Column, cannot: Option<&str>, seconds: f64) -> Judged {
    let seen = match column.best() {
        Best::Refusal => client.gives_up.refused,
        _ => client.gives_up.down,
    };
    let limit = seen * SLACK.0 + SLACK.1;
    match cannot {
        _ if seconds > limit => {
            (Verdict::Wrong, Some(format!("gives up after {seconds:.1} s, usually after {seen:.1} s")))
        }
        Some(why) => (Verdict::Cannot, Some(why.to_owned())),
        None => (Verdict::Refused, None),
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn title<S: serde::Serializer>(column: &Column, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(column.title())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::catalog::CLIENTS;

    fn client(name: &str) -> &'static Client {
        CLIENTS.iter().find(|client| client.name == name).unwrap()
    }

    #[test]
    fn a_verdict_follows_from_the_owner_of_the_key() {
        let other = Owner::Other("shop/other".to_owned());
        let (pod, node, other) = (Some(&Owner::Pod), Some(&Owner::Node), Some(&other));
        let can = client("py-boto3");
        for (column, owner, verdict) in [
            (Column::ImdsV2, pod, Verdict::OwnRole),
            (Column::ImdsV2, node, Verdict::Wrong),
            (Column::ImdsV2, other, Verdict::Wrong),
            (Column::ImdsV2, None, Verdict::Wrong),
            (Column::UnassociatedImds, None, Verdict::Refused),
            (Column::UnassociatedImds, pod, Verdict::Wrong),
            (Column::UnassociatedImds, node, Verdict::Wrong),
            (Column::KilledImds, None, Verdict::Refused),
            (Column::KilledImds, node, Verdict::Wrong),
            (Column::KilledWebhook, pod, Verdict::Wrong),
            (Column::AuditImds, node, Verdict::FallsThrough),
            (Column::AuditImds, None, Verdict::Wrong),
            (Column::AuditWebhook, node, Verdict::FallsThrough),
            (Column::AuditWebhook, None, Verdict::Refused),
            (Column::AuditWebhook, other, Verdict::Wrong),
        ] {
            let judged = judge(can, column, owner, ("no", true), 0.1);
            assert_eq!(judged.0, verdict, "{column:?}, {owner:?}");
        }
    }

    #[test]
    fn a_client_that_cannot_is_no_failure_and_one_that_suddenly_can_is_told() {
        let old = client("py-boto3-1.9");
        for (column, verdict) in [
            (Column::ImdsV2, Verdict::Cannot),
            (Column::Webhook, Verdict::Cannot),
            (Column::KilledWebhook, Verdict::Cannot),
            (Column::ImdsV1, Verdict::Wrong),
        ] {
            assert_eq!(judge(old, column, None, ("no", false), 0.1).0, verdict, "{column:?}");
        }
        let (verdict, why) = judge(old, Column::Webhook, Some(&Owner::Pod), ("", false), 0.1);
        assert_eq!(verdict, Verdict::OwnRole);
        assert!(why.unwrap().contains("although"));
        let node = judge(old, Column::KilledWebhook, Some(&Owner::Node), ("", false), 0.1);
        assert_eq!(node.0, Verdict::Wrong);
    }

    #[test]
    fn a_refusal_is_right_if_it_is_in_time_and_its_reason_is_shown() {
        for (name, column, shows_reason, seconds, verdict) in [
            ("py-boto3", Column::UnassociatedWebhook, true, 3.1, Verdict::Refused),
            ("py-boto3", Column::UnassociatedWebhook, false, 3.1, Verdict::Wrong),
            ("py-boto3", Column::UnassociatedWebhook, true, 20.0, Verdict::Wrong),
            ("py-boto3", Column::UnassociatedImds, false, 0.1, Verdict::Refused),
            ("js-sdk3", Column::UnassociatedWebhook, false, 3.1, Verdict::Refused),
            ("go-sdk1-old", Column::UnassociatedWebhook, false, 60.0, Verdict::Wrong),
        ] {
            let judged = judge(client(name), column, None, ("no", shows_reason), seconds);
            assert_eq!(judged.0, verdict, "{name}, {column:?}, {seconds}");
        }
    }
}
