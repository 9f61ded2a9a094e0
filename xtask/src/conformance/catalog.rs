//! The clients: what each is, and what it was seen to do when there is nothing for it.
//!
//! Owns what is expected of each. A client is a program in `xtask/clients/NAME` that resolves credentials through the
//! unmodified default chain of its SDK; its manifest there pins the SDK's version.

use super::column::Column;

/// A client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) name: &'static str,
    pub(super) language: Language,
    /// The client whose program this one shares, with another version of the SDK.
    pub(super) like: Option<&'static str>,
    /// Seconds it was seen to take until it gave up: told that there is no role, and where no connection could be made.
    pub(super) gives_up: GivesUp,
    /// Whether it shows what the container's endpoint says in a refusal.
    pub(super) shows_reason: bool,
    /// Whether its program can ask the same provider again, so that the SDK itself decides when to refresh.
    pub(super) keeps: bool,
    /// What it cannot do, and why.
    cannot: &'static [(Column, &'static str)],
}

/// What a client is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Language {
    Go,
    Java,
    Node,
    Python,
    Ruby,
    Rust,
    Shell,
}

/// Seconds, as measured against endpoints that refuse.
#[derive(Debug)]
pub(super) struct GivesUp {
    /// After "no role", from the slower of IMDS and the container's endpoint.
    pub(super) refused: f64,
    /// After failed connections, the same.
    pub(super) down: f64,
}

const V1_ONLY: &str = "speaks IMDSv1 only";
const OLD: &str = "older than Pod Identity: takes no such host, and stops";
const IMDS_V4_ONLY: &str = "connects to IMDS over IPv4 only";
const GOES_ON_V4: &str = "takes no such host, and goes on to IMDS over IPv4";
const GOES_ON: &str = "older than Pod Identity: goes on to IMDS, where the driver has no role";
const ONLY_WITH_FILE: &str = "takes no such host, and stops, unless there is a token file";

/// All of them.
pub(super) static CLIENTS: &[Client] = &[
    Client { shows_reason: true, ..Client::new("curl", Language::Shell, 0.1, 0.1) },
    Client { shows_reason: true, keeps: true, ..Client::new("py-boto3", Language::Python, 3.1, 3.1) },
    Client {
        like: Some("py-boto3"),
        cannot: &[(Column::Webhook, OLD), (Column::NoToken, OLD), (Column::PodIdentity6, OLD)],
        ..Client::new("py-boto3-1.28", Language::Python, 0.1, 0.1)
    },
    Client {
        like: Some("py-boto3"),
        cannot: &[
            (Column::ImdsV2, V1_ONLY),
            (Column::Webhook, OLD),
            (Column::NoToken, OLD),
            (Column::Imds6, IMDS_V4_ONLY),
            (Column::PodIdentity6, OLD),
        ],
        ..Client::new("py-boto3-1.9", Language::Python, 0.1, 0.1)
    },
    Client { shows_reason: true, ..Client::new("py-awscli1", Language::Python, 3.9, 4.3) },
    Client::new("py-awscrt", Language::Python, 0.2, 2.4),
    Client { keeps: true, ..Client::new("js-sdk3", Language::Node, 3.1, 3.1) },
    Client {
        like: Some("js-sdk3"),
        cannot: &[(Column::Webhook, OLD), (Column::NoToken, OLD), (Column::PodIdentity6, OLD)],
        ..Client::new("js-sdk3-old", Language::Node, 0.1, 0.1)
    },
    Client {
        cannot: &[(Column::PodIdentity6, GOES_ON_V4)],
        ..Client::new("js-sdk2", Language::Node, 0.1, 0.1)
    },
    Client {
        like: Some("js-sdk2"),
        cannot: &[
            (Column::ImdsV2, V1_ONLY),
            (Column::Imds6, IMDS_V4_ONLY),
            (Column::PodIdentity6, GOES_ON_V4),
            (Column::Delegate, GOES_ON),
        ],
        ..Client::new("js-sdk2-old", Language::Node, 0.1, 0.1)
    },
    Client { shows_reason: true, keeps: true, ..Client::new("go-sdk2", Language::Go, 0.1, 4.1) },
    Client { keeps: true, ..Client::new("go-sdk1", Language::Go, 0.4, 0.6) },
    Client {
        like: Some("go-sdk1"),
        cannot: &[
            (Column::ImdsV2, V1_ONLY),
            (Column::Webhook, OLD),
            (Column::NoToken, OLD),
            (Column::Imds6, IMDS_V4_ONLY),
            (Column::PodIdentity6, OLD),
        ],
        ..Client::new("go-sdk1-old", Language::Go, 0.1, 0.4)
    },
    Client {
        cannot: &[
            (Column::NoToken, ONLY_WITH_FILE),
            (Column::Imds6, IMDS_V4_ONLY),
            (Column::Delegate, ONLY_WITH_FILE),
        ],
        ..Client::new("go-minio", Language::Go, 0.1, 0.1)
    },
    Client { keeps: true, ..Client::new("java-sdk2", Language::Java, 0.5, 1.4) },
    Client {
        keeps: true,
        cannot: &[
            (Column::Imds6, IMDS_V4_ONLY),
            (Column::PodIdentity6, "takes no IPv6 address in the URI, and stops"),
        ],
        ..Client::new("java-sdk1", Language::Java, 1.3, 0.8)
    },
    Client::new("rust-aws-config", Language::Rust, 0.1, 1.2),
    Client {
        cannot: &[
            (Column::ImdsV2, V1_ONLY),
            (Column::Imds6, IMDS_V4_ONLY),
            (Column::PodIdentity6, GOES_ON_V4),
        ],
        ..Client::new("rust-rusoto", Language::Rust, 0.1, 0.1)
    },
    Client {
        cannot: &[
            (Column::Imds6, IMDS_V4_ONLY),
            (
                Column::Delegate,
                "takes no token but from a file: goes on to IMDS, where the driver has no role",
            ),
        ],
        ..Client::new("rust-object-store", Language::Rust, 0.5, 4.1)
    },
    Client {
        cannot: &[(Column::PodIdentity6, GOES_ON_V4), (Column::Delegate, GOES_ON)],
        ..Client::new("ruby-sdk3", Language::Ruby, 0.1, 0.1)
    },
];

// === impl Client ===

impl Client {
    const fn new(name: &'static str, language: Language, refused: f64, down: f64) -> Self {
        Self {
            name,
            language,
            like: None,
            gives_up: GivesUp { refused, down },
            shows_reason: false,
            keeps: false,
            cannot: &[],
        }
    }

    /// The situations that it is put in.
    pub(super) fn columns(&self) -> impl Iterator<Item = Column> {
        Column::ALL.into_iter().filter(|column| self.keeps || *column != Column::Refresh)
    }

    /// Why it cannot do what the column asks, if so.
    pub(super) fn cannot(&self, column: Column) -> Option<&'static str> {
        let is_it = |other| other == column || other == column.same_way_as();
        self.cannot.iter().find(|(other, _)| is_it(*other)).map(|(_, why)| *why)
    }
}
