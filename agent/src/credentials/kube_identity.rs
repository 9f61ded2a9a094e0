//! Who the agent is at the API server.
//!
//! Owns how the client is made; never asks the server anything itself.

use std::time::Duration;

use kube::{Client, Config};

use crate::config::KubeIdentity;

/// kube's watches last 290 s at most.
const READ_TIMEOUT: Duration = Duration::from_mins(5);

/// Why there is no client for the API server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a kubeconfig nor a service account.
    #[error("no way to the API server: set KUBECONFIG, or run in a pod with a service account's token: {0}")]
    Infer(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The configuration found cannot be used.
    #[error("the API server's configuration cannot be used: {0}")]
    Client(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A client that acts as `identity` says.
///
/// As its associated node (KEP-5284, on by default from Kubernetes 1.36) the agent needs no right of its own on
/// pods and tokens, and the Node authorizer limits it to the pods of its node.
pub async fn client(identity: KubeIdentity, node_name: &str) -> Result<Client, Error> {
    let mut config = Config::infer().await.map_err(|error| Error::Infer(error.into()))?;
    // The client would try again for minutes; the watch backs off by itself, and a pod waits for a token.
    config.default_retry = false;
    // Longer than the server ends a watch by itself: only a server that hangs is given up.
    config.read_timeout = Some(READ_TIMEOUT);
    if identity == KubeIdentity::AssociatedNode {
        config.auth_info.impersonate = Some(format!("system:node:{node_name}"));
    }
    Client::try_from(config).map_err(|error| Error::Client(error.into()))
}
