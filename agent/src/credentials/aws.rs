//! The agent's own AWS clients: region, endpoint, connections and node credentials.
//!
//! Endpoints (`AWS_ENDPOINT_URL_EKS_AUTH`, FIPS, dual stack) are settings of the SDK.

use std::{env, fs, io, path::PathBuf, time::Duration};

use aws_config::{
    BehaviorVersion, Region, SdkConfig, environment::region::EnvironmentVariableRegionProvider,
    imds::region::ImdsRegionProvider, meta::region::RegionProviderChain,
    profile::region::ProfileFileRegionProvider, retry::RetryConfig, timeout::TimeoutConfig,
};
use aws_credential_types::provider::ProvideCredentials as _;
use aws_smithy_http_client::{
    pool::{Client, ConnectionEvent, ConnectionPool},
    proxy::ProxyConfig,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use tokio::sync::watch;
use tracing::warn;

pub mod eks_auth;
mod node_credentials;

use self::node_credentials::NodeCredentials;
use crate::{error::chain, instance_metadata};

/// A connection takes a millisecond within a region.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A whole call. Callers are answered sooner; this bounds the call that continues without them.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);
/// As long as EKS Auth keeps connections open: a pod's first request should not wait for a TLS handshake.
const IDLE_TIMEOUT: Duration = Duration::from_hours(1);
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Names a PEM file with the root certificates to trust instead of the system's.
const CA_BUNDLE: &str = "AWS_CA_BUNDLE";

/// Why there are no AWS clients.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The root certificates cannot be read.
    #[error("cannot read the certificates in {path}, which {CA_BUNDLE} names: {source}")]
    CaBundle {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There are no root certificates.
    #[error(
        "no root certificates to verify AWS with: install the system's (package ca-certificates, /etc/ssl/certs), or name a \
         PEM file in {CA_BUNDLE}"
    )]
    NoRootCertificates,
    /// The HTTP client cannot be built.
    #[error("cannot build an HTTPS client: {0}")]
    Client(String),
}

/// How many connections to AWS are open.
pub type Connections = watch::Receiver<usize>;

/// The configuration of all AWS clients, and how many connections they have open. The region comes from `AWS_REGION`, the
/// shared configuration, or the instance, if that is known yet.
pub async fn config() -> Result<(SdkConfig, Connections), Error> {
    let (open, connections) = watch::channel(0);
    let timeouts =
        TimeoutConfig::builder().connect_timeout(CONNECT_TIMEOUT).operation_timeout(CALL_TIMEOUT).build();
    let region = region().await;
    let config = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http_client(open)?)
        .region(region.clone())
        .credentials_provider(NodeCredentials::new(region, http_client(watch::Sender::default())?))
        .timeout_config(timeouts)
        // The cache retries, where that does no harm.
        .retry_config(RetryConfig::disabled());
    Ok((config.load().await, connections))
}

/// Checks what every call needs, and logs what is missing, before the first pod finds out. It may come later, so this is
/// no fatal error.
pub async fn check(config: &SdkConfig) {
    if config.region().is_none() {
        warn!("no AWS region: set AWS_REGION, or let the agent reach the instance metadata service");
    }
    let Some(provider) = config.credentials_provider() else { return };
    match tokio::time::timeout(CALL_TIMEOUT, provider.provide_credentials()).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            warn!(error = chain(&error), "no AWS credentials of the node to call EKS Auth with");
        }
        Err(_) => warn!("timed out getting the AWS credentials of the node"),
    }
}

/// The region, from where the SDK looks for it.
async fn region() -> Option<Region> {
    let chain = RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
        .or_else(ProfileFileRegionProvider::new())
        .or_else(ImdsRegionProvider::builder().configure(&instance_metadata::directly()).build());
    // An empty variable counts as unset.
    chain.region().await.filter(|region| !region.as_ref().is_empty())
}

/// Connects through `HTTPS_PROXY`, except for `NO_PROXY`; trusts the system's root certificates or those in
/// `AWS_CA_BUNDLE`.
fn http_client(open: watch::Sender<usize>) -> Result<Client, Error> {
    let roots = match env::var_os(CA_BUNDLE).filter(|path| !path.is_empty()) {
        // The SDK panics without any.
        None if rustls_native_certs::load_native_certs().certs.is_empty() => {
            return Err(Error::NoRootCertificates);
        }
        None => TrustStore::default(),
        Some(path) => {
            let path = PathBuf::from(path);
            let bundle = ca_bundle(&path).map_err(|source| Error::CaBundle { path, source })?;
            TrustStore::empty().with_pem_certificate(bundle)
        }
    };
    let failed = |error: &dyn std::error::Error| Error::Client(error.to_string());
    let tls = TlsContext::builder().with_trust_store(roots).build().map_err(|error| failed(&error))?;
    let pool = ConnectionPool::builder()
        .proxy_config(ProxyConfig::from_env())
        .idle_timeout(IDLE_TIMEOUT)
        .tcp_keepalive(KEEPALIVE)
        .event_listener(move |event: &ConnectionEvent<'_>| count(&open, event))
        .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
        .tls_context(tls)
        .build_https()
        .map_err(|error| failed(&error))?;
    Client::new(&pool).map_err(|error| failed(&error))
}

fn count(open: &watch::Sender<usize>, event: &ConnectionEvent<'_>) {
    match event {
        ConnectionEvent::Opened(_) => open.send_modify(|open| *open += 1),
        ConnectionEvent::LogicalClose(_) => open.send_modify(|open| *open = open.saturating_sub(1)),
        _ => {}
    }
}

/// The file, if all of it is certificates: the SDK panics otherwise.
fn ca_bundle(path: &std::path::Path) -> io::Result<Vec<u8>> {
    let pem = fs::read(path)?;
    let invalid =
        |error: &dyn std::error::Error| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        roots.add(certificate.map_err(|error| invalid(&error))?).map_err(|error| invalid(&error))?;
    }
    if roots.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it has no certificate"));
    }
    Ok(pem)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_ca_bundle_is_read_whole_or_refused() {
        let bundle = |text: &str| {
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(text.as_bytes()).unwrap();
            ca_bundle(file.path())
        };
        let pem = |name: &str| rcgen::generate_simple_self_signed([name.to_owned()]).unwrap().cert.pem();
        assert!(bundle(&(pem("a") + &pem("b"))).is_ok());
        let bad = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for text in [String::new(), "no PEM".into(), bad.into(), pem("a") + bad] {
            assert!(bundle(&text).is_err(), "{text}");
        }
    }
}
