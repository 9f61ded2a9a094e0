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

/// The node's credentials: environment, shared files (hybrid nodes), web identity, instance role.
fn node_credentials() -> CredentialsProviderChain {
    CredentialsProviderChain::first_try("Environment", EnvironmentVariableCredentialsProvider::new())
        .or_else("Profile", ProfileFileCredentialsProvider::builder().build())
        .or_else("WebIdentityToken", WebIdentityTokenCredentialsProvider::builder().build())
        .or_else("Ec2InstanceMetadata", ImdsCredentialsProvider::builder().build())
}
