//! How the agent itself speaks to AWS: region, endpoint and the node's own credentials.
//!
//! Owns the credential chain, which has no container provider in it: that would lead back to podgate itself.

use std::time::Duration;

use aws_config::{
    BehaviorVersion, SdkConfig, environment::EnvironmentVariableCredentialsProvider,
    imds::credentials::ImdsCredentialsProvider, meta::credentials::CredentialsProviderChain,
    profile::ProfileFileCredentialsProvider, retry::RetryConfig, timeout::TimeoutConfig,
    web_identity_token::WebIdentityTokenCredentialsProvider,
};
use aws_credential_types::provider::ProvideCredentials as _;
use tracing::warn;

use crate::error::chain;

/// A connection takes a millisecond within a region.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A whole call. Callers are answered sooner; this bounds the call that goes on without them.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The configuration of every AWS client of the agent. The region is `AWS_REGION`'s, the shared
/// configuration's, or the instance's.
pub async fn config() -> SdkConfig {
    let timeouts =
        TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).operation_timeout(CALL_TIMEOUT).build();
    aws_config::defaults(BehaviorVersion::latest())
        .credentials_provider(node_credentials())
        .timeout_config(timeouts)
        // Whoever asked asks again, and shares the call with the other callers of its pod.
        .retry_config(RetryConfig::disabled())
        .load()
        .await
}

/// Asks once for what every call needs, and says what is missing: better now than to the first pod. What is
/// missing may come later, so the agent goes on.
pub async fn check(config: &SdkConfig) {
    if config.region().is_none() {
        warn!("no AWS region: set AWS_REGION, or let the agent reach the instance metadata service");
    }
    let Some(provider) = config.credentials_provider() else { return };
    match tokio::time::timeout(CALL_TIMEOUT, provider.provide_credentials()).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            warn!(error = chain(&error), "the node has no AWS credentials to call EKS Auth with");
        }
        Err(_) => warn!("the node's AWS credentials did not come in time"),
    }
}

/// The node's credentials: environment, shared files (hybrid nodes), web identity, instance role.
fn node_credentials() -> CredentialsProviderChain {
    CredentialsProviderChain::first_try("Environment", EnvironmentVariableCredentialsProvider::new())
        .or_else("Profile", ProfileFileCredentialsProvider::builder().build())
        .or_else("WebIdentityToken", WebIdentityTokenCredentialsProvider::builder().build())
        .or_else("Ec2InstanceMetadata", ImdsCredentialsProvider::builder().build())
}
