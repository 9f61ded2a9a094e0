//! The node's own credentials, by which EKS Auth is asked.
//!
//! Owns their sources, in which nothing leads back to podgate itself: no container provider, nor a profile that names one.

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

/// Static keys do not say when they end: whoever puts others in their file is heard after this time.
const READ_EVERY: Duration = Duration::from_mins(1);

/// Environment, shared files (hybrid nodes), web identity, instance role: the first that is there.
#[derive(Debug)]
pub(super) struct NodeCredentials {
    region: Option<Region>,
    http_client: Client,
    /// One for good: while IMDS is away it goes on with what it had.
    instance_role: Arc<dyn ProvideCredentials>,
}

/// What a profile gets that wants credentials from a container's endpoint.
#[derive(Debug)]
struct NotFromContainer;

// === impl NodeCredentials ===

impl NodeCredentials {
    /// STS is asked in `region` over `http_client`'s connections. The instance's role never is: no proxy is on the way to
    /// the node's own IMDS.
    pub(super) fn new(region: Option<Region>, http_client: Client) -> Self {
        let instance_role =
            ImdsCredentialsProvider::builder().configure(&instance_metadata::directly()).build();
        Self { region, http_client, instance_role: Arc::new(instance_role) }
    }

    /// The files are read anew each time: the SDK's own provider reads them once in its life, and its configuration, too.
    async fn load(&self) -> provider::Result {
        let sts = ProviderConfig::without_region()
            .with_region(self.region.clone())
            .with_http_client(self.http_client.clone());
        let profile = ProfileFileCredentialsProvider::builder()
            .configure(&sts)
            .with_custom_provider("EcsContainer", NotFromContainer)
            // The SDK's own would be asked over the same connections as STS.
            .with_custom_provider("Ec2InstanceMetadata", Arc::clone(&self.instance_role));
        let web_identity = WebIdentityTokenCredentialsProvider::builder().configure(&sts);
        let chain =
            CredentialsProviderChain::first_try("Environment", EnvironmentVariableCredentialsProvider::new())
                .or_else("Profile", profile.build())
                .or_else("WebIdentityToken", web_identity.build())
                .or_else("Ec2InstanceMetadata", Arc::clone(&self.instance_role));
        let mut credentials = chain.provide_credentials().await?;
        credentials.expiry_mut().get_or_insert_with(|| SystemTime::now() + READ_EVERY);
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

// === impl NotFromContainer ===

impl ProvideCredentials for NotFromContainer {
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
    async fn a_profile_that_leads_back_to_podgate_gives_the_reason() {
        let refused = NotFromContainer.provide_credentials().await.unwrap_err();
        assert!(chain(&refused).contains("podgate itself"), "{refused:?}");
    }
}
