//! The columns: the situations that every client is put in.
//!
//! Owns what a client finds in each: its pod, its environment, and what is best for it there. Never runs anything.

use lab::{EnvKind, PodSpec};

const FULL_URI: &str = "AWS_CONTAINER_CREDENTIALS_FULL_URI=http://169.254.170.23/v1/credentials";

/// The same as an author of a chart may write it, which is no spelling that the webhook has.
const URI_BY_HAND: &str = "http://169.254.170.23:80/v1/credentials";
const FULL_URI_BY_HAND: &str = "AWS_CONTAINER_CREDENTIALS_FULL_URI=http://169.254.170.23:80/v1/credentials";

/// A situation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Column {
    /// Nothing injected, IMDSv1 not allowed.
    ImdsV2,
    /// Nothing injected, IMDSv1 allowed.
    ImdsV1,
    /// What the EKS webhook injects.
    Webhook,
    /// The URI that it injects, without the token.
    NoToken,
    /// A URI that somebody has put into the pod's spec by hand, spelled otherwise, on a node in `audit`.
    ByHand,
    /// What ECS injects.
    Ecs,
    /// Nothing injected, on a node whose pods have IPv6 only.
    Imds6,
    /// What the webhook injects there.
    PodIdentity6,
    /// What a CSI driver does: a pod that may presents another pod's token.
    Delegate,
    /// Nothing injected; one agent takes over from another between two resolutions.
    Restart,
    /// Credentials near their end; the client must have fresh ones all the time.
    Refresh,
    /// No association, nothing injected.
    UnassociatedImds,
    /// No association, what the webhook injects.
    UnassociatedWebhook,
    /// The agent is killed, the pod in `intercept`; nothing injected.
    KilledImds,
    /// The same with what the webhook injects.
    KilledWebhook,
    /// The agent is killed, the pod in `audit`; nothing injected.
    AuditImds,
    /// The same with what the webhook injects.
    AuditWebhook,
}

/// What is best for a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Best {
    /// Its pod's own role.
    OwnRole,
    /// To be told soon that there is none.
    Refusal,
    /// To find out soon that nothing answers.
    NoConnection,
    /// The node's role, since podgate is not to touch IMDS; or no connection where podgate is asked.
    Untouched,
}

/// The pods that a client has on the main node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum PodKind {
    /// A plain one.
    Plain,
    /// One in which IMDSv1 is allowed, as in all that follow.
    V1,
    /// One that the webhook has changed.
    Injected,
    /// The same in `audit`.
    Audited,
    /// One with a URI by hand.
    ByHand,
    /// The same as injected, but without an association.
    Unassociated,
}

// === impl Column ===

impl Column {
    pub(super) const ALL: [Self; 17] = [
        Self::ImdsV2,
        Self::ImdsV1,
        Self::Webhook,
        Self::NoToken,
        Self::ByHand,
        Self::Ecs,
        Self::Imds6,
        Self::PodIdentity6,
        Self::Delegate,
        Self::Restart,
        Self::Refresh,
        Self::UnassociatedImds,
        Self::UnassociatedWebhook,
        Self::KilledImds,
        Self::KilledWebhook,
        Self::AuditImds,
        Self::AuditWebhook,
    ];

    /// What stands above the column.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::ImdsV2 => "IMDSv2 required",
            Self::ImdsV1 => "IMDSv1 allowed",
            Self::Webhook => "webhook",
            Self::NoToken => "no token",
            Self::ByHand => "by hand, audit",
            Self::Ecs => "ECS",
            Self::Imds6 => "IMDS, IPv6",
            Self::PodIdentity6 => "webhook, IPv6",
            Self::Delegate => "as CSI driver",
            Self::Restart => "agent upgraded",
            Self::Refresh => "refresh",
            Self::UnassociatedImds => "no role, IMDS",
            Self::UnassociatedWebhook => "no role, webhook",
            Self::KilledImds => "killed, IMDS",
            Self::KilledWebhook => "killed, webhook",
            Self::AuditImds => "killed, audit, IMDS",
            Self::AuditWebhook => "killed, audit, webhook",
        }
    }

    pub(super) const fn best(self) -> Best {
        match self {
            Self::UnassociatedImds | Self::UnassociatedWebhook => Best::Refusal,
            Self::KilledImds | Self::KilledWebhook => Best::NoConnection,
            Self::AuditImds | Self::AuditWebhook => Best::Untouched,
            _ => Best::OwnRole,
        }
    }

    /// The column where a client is asked the same way, and first.
    pub(super) const fn same_way_as(self) -> Self {
        match self {
            Self::UnassociatedWebhook
            | Self::KilledWebhook
            | Self::AuditWebhook
            | Self::Refresh
            | Self::Delegate => Self::Webhook,
            Self::Restart | Self::UnassociatedImds | Self::KilledImds | Self::AuditImds => Self::ImdsV1,
            Self::ByHand => Self::NoToken,
            other => other,
        }
    }

    /// Whether clients go to the container's endpoint, with a token.
    pub(super) const fn is_injected(self) -> bool {
        matches!(self.same_way_as(), Self::Webhook | Self::PodIdentity6)
    }

    /// For which of its pods a client asks.
    pub(super) const fn pod(self) -> PodKind {
        match self {
            Self::ImdsV2 => PodKind::Plain,
            Self::ImdsV1 | Self::NoToken | Self::Ecs | Self::Imds6 | Self::Restart | Self::KilledImds => {
                PodKind::V1
            }
            Self::Webhook | Self::PodIdentity6 | Self::KilledWebhook | Self::Refresh | Self::Delegate => {
                PodKind::Injected
            }
            Self::UnassociatedImds | Self::UnassociatedWebhook => PodKind::Unassociated,
            Self::AuditImds | Self::AuditWebhook => PodKind::Audited,
            Self::ByHand => PodKind::ByHand,
        }
    }

    /// What is injected, and what else is in the environment.
    pub(super) const fn environment(self) -> (EnvKind, &'static [&'static str]) {
        match self {
            // The token is another pod's.
            Self::Delegate => return (EnvKind::None, &[FULL_URI]),
            Self::ByHand => return (EnvKind::None, &[FULL_URI_BY_HAND]),
            _ => {}
        }
        match self.same_way_as() {
            Self::NoToken => (EnvKind::None, &[FULL_URI]),
            Self::Webhook | Self::PodIdentity6 => (EnvKind::Webhook, &[]),
            Self::Ecs => (EnvKind::Ecs, &[]),
            Self::Imds6 => (EnvKind::None, &["AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6"]),
            // For curl, which would use the newer one.
            Self::ImdsV1 => (EnvKind::None, &["IMDS=v1"]),
            _ => (EnvKind::None, &[]),
        }
    }
}

// === impl PodKind ===

impl PodKind {
    /// Those on the main node.
    pub(super) const MAIN: [Self; 5] =
        [Self::Plain, Self::V1, Self::Injected, Self::Audited, Self::Unassociated];

    /// Such a pod of the client called `name`.
    pub(super) fn spec(self, client: &str) -> PodSpec {
        let (namespace, suffix) = match self {
            Self::Plain => ("shop", "plain"),
            Self::V1 => ("shop", "v1"),
            Self::Injected => ("shop", "injected"),
            Self::Audited => ("audited", "audited"),
            Self::ByHand => ("shop", "by-hand"),
            Self::Unassociated => ("shop", "unassociated"),
        };
        let name = format!("{}-{suffix}", client.replace('.', "-"));
        let mut spec = PodSpec::new(namespace, &name);
        if self != Self::Unassociated {
            spec = spec.role(&format!("{name}-role"));
        }
        if self != Self::Plain {
            spec = spec.annotation("podgate.dev/imds-v1", "allow");
        }
        if self == Self::ByHand {
            spec.credentials_uri = Some(URI_BY_HAND.to_owned());
        }
        if matches!(self, Self::Injected | Self::Audited | Self::Unassociated) {
            spec.with_token()
        } else {
            spec
        }
    }
}
