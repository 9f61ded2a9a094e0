//! What is scheduled, how urgently, and on whose share of the budget.

use std::{fmt, net::IpAddr};

use crate::{credentials::TokenDigest, identity::PodUid};

/// What has at most one fetch at a time.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    Pod(PodUid),
    /// A token that only EKS Auth can judge.
    Token(TokenDigest),
}

/// Why something is fetched, most urgent first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Priority {
    /// A caller waits, or the cached credentials are about to expire.
    Foreground,
    /// The cached credentials are due to be replaced.
    Refresh,
    /// The pod has not asked yet.
    Prefetch,
}

/// Whose turn a fetch takes in the fair queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum FairnessKey {
    Pod(PodUid),
    /// The peer address of an anonymous caller.
    Address(IpAddr),
}

// === impl Key ===

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(uid) => uid.fmt(f),
            Self::Token(_) => f.write_str("a token"),
        }
    }
}
