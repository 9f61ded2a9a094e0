//! The identity with which the agent calls the API server.
//!
//! Owns the configuration of its clients; never makes a call itself.

use std::time::Duration;

use kube::{Client, Config};

use crate::config::KubeIdentity;

/// The API server sends a bookmark on each watch about once a minute.
const READ_TIMEOUT: Duration = Duration::from_secs(90);

/// Why there is no client for the API server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither a kubeconfig nor a service account.
    #[error("no API server configured: set KUBECONFIG, or run in a pod with a service account's token: {0}")]
    Infer(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The configuration found cannot be used.
    #[error("the API server's configuration cannot be used: {0}")]
    Client(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The agent's clients.
#[derive(Clone)]
pub struct Clients {
    /// For the node's pods and their tokens: acts as `--kube-identity` says.
    pub node: Client,
    /// For everything else: acts as the agent's own service account.
    pub own: Client,
}

/// Clients for the API server.
///
/// As its associated node (KEP-5284, on by default from Kubernetes 1.36) the agent needs no right of its own on
/// pods and tokens, and the Node authorizer limits it to the pods of its node.
pub async fn clients(identity: KubeIdentity, node_name: &str) -> Result<Clients, Error> {
    let mut config = Config::infer().await.map_err(|error| Error::Infer(error.into()))?;
    // The client would retry for minutes; the watch backs off by itself, and a pod waits for a token.
    config.default_retry = false;
    // Gives up on a server that hangs, and on a dead connection.
    config.read_timeout = Some(READ_TIMEOUT);
    let own = client(config.clone())?;
    if identity == KubeIdentity::AssociatedNode {
        config.auth_info.impersonate = Some(format!("system:node:{node_name}"));
    }
    Ok(Clients { node: client(config)?, own })
}

fn client(config: Config) -> Result<Client, Error> {
    Client::try_from(config).map_err(|error| Error::Client(error.into()))
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clients").finish_non_exhaustive()
    }
}
