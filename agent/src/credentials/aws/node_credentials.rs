//! The node's own AWS credentials, which sign the calls of EKS Auth.
//!
//! Owns their sources, none of which leads back to podgate itself: no container provider, nor a profile that names one.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use aws_config::{
    Region, environment::EnvironmentVariableCredentialsProvider, imds::credentials::ImdsCredentialsProvider,
    meta::credentials::CredentialsProviderChain, profile::ProfileFileCredentialsProvider,
    provider_config::ProviderConfig, web_identity_token::WebIdentityTokenCredentialsProvider,
};
use aws_credential_types::provider::{
    self, ProvideCredentials, error::CredentialsError, future::ProvideCredentials as Provided,
};
use aws_smithy_http_client::pool::Client;

use crate::instance_metadata;

/// Static keys have no expiration: changes to their file take effect after this time.
const STATIC_KEYS_TTL: Duration = Duration::from_mins(1);

/// The first that exists of: environment, shared files (hybrid nodes), web identity, instance role.
#[derive(Debug)]
pub(super) struct NodeCredentials {
    region: Option<Region>,
    http_client: Client,
    /// A single provider, which goes on serving what it has while IMDS is unavailable.
    instance_role: Arc<dyn ProvideCredentials>,
}

/// Refuses profiles that want credentials from a container endpoint.
#[derive(Debug)]
struct RefuseContainer;

// === impl NodeCredentials ===

impl NodeCredentials {
    /// Calls STS in `region` with `http_client`; the instance role bypasses it, since the node's IMDS is not behind a proxy.
    pub(super) fn new(region: Option<Region>, http_client: Client) -> Self {
        let instance_role =
            ImdsCredentialsProvider::builder().configure(&instance_metadata::directly()).build();
        Self { region, http_client, instance_role: Arc::new(instance_role) }
    }

    /// Reads the files anew each time: the SDK's own provider reads them, and its configuration, only once.
    async fn load(&self) -> provider::Result {
        let sts = ProviderConfig::without_region()
            .with_region(self.region.clone())
            .with_http_client(self.http_client.clone());
        let profile = ProfileFileCredentialsProvider::builder()
            .configure(&sts)
            .with_custom_provider("EcsContainer", RefuseContainer)
            // The SDK's own would use the same connections as STS.
            .with_custom_provider("Ec2InstanceMetadata", Arc::clone(&self.instance_role));
        let web_identity = WebIdentityTokenCredentialsProvider::builder().configure(&sts);
        let chain =
            CredentialsProviderChain::first_try("Environment", EnvironmentVariableCredentialsProvider::new())
                .or_else("Profile", profile.build())
                .or_else("WebIdentityToken", web_identity.build())
                .or_else("Ec2InstanceMetadata", Arc::clone(&self.instance_role));
        let mut credentials = chain.provide_credentials().await?;
        credentials.expiry_mut().get_or_insert_with(|| SystemTime::now() + STATIC_KEYS_TTL);
        Ok(credentials)
    }
}

impl ProvideCredentials for NodeCredentials {
    fn provide_credentials<'a>(&'a self) -> Provided<'a>
    where
        Self: 'a,
    {
        Provided::new(self.load())
    }
}

// === impl RefuseContainer ===

impl ProvideCredentials for RefuseContainer {
    fn provide_credentials<'a>(&'a self) -> Provided<'a>
    where
        Self: 'a,
    {
        let reason = "the profile has credential_source = EcsContainer, which is podgate itself";
        let refused: provider::Result = Err(CredentialsError::invalid_configuration(reason));
        Provided::ready(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::chain;

    #[tokio::test]
    async fn a_profile_that_leads_back_to_podgate_is_refused() {
        let refused = RefuseContainer.provide_credentials().await.unwrap_err();
        assert!(chain(&refused).contains("podgate itself"), "{refused:?}");
    }
}
