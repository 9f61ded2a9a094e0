//! The cluster's certificate authority.
//!
//! Owns certificates: the server's, and the clients' with the users they stand for. Never sees a request.

use std::{collections::HashMap, fmt, net::IpAddr, sync::Arc};

use anyhow::Context as _;
use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        RootCertStore, ServerConfig, crypto::aws_lc_rs, pki_types::PrivateKeyDer,
        server::WebPkiClientVerifier,
    },
};

use super::user::{AUTHENTICATED, User};

/// An authority with one server and any number of clients.
pub(super) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    clients: Mutex<HashMap<Vec<u8>, User>>,
}

// === impl Authority ===

impl Authority {
    pub(super) fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(DnType::CommonName, "lab");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        Ok(Self { issuer, clients: Mutex::default() })
    }

    pub(super) fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// TLS for the server at this address. A client's certificate is verified where there is one.
    pub(super) fn acceptor(&self, address: IpAddr) -> anyhow::Result<TlsAcceptor> {
        let names = ["127.0.0.1", "localhost", "kubernetes.default.svc"].map(str::to_owned);
        let names: Vec<String> = names.into_iter().chain([address.to_string()]).collect();
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;

        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone())?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate.into()], PrivateKeyDer::Pkcs8(key.into()))
            .context("the server's key and certificate do not fit")?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }

    /// A new client certificate and its key, both PEM.
    ///
    /// # Panics
    /// If the random number generator fails.
    #[expect(clippy::expect_used, reason = "fails on a programming error only")]
    pub(super) fn client_certificate(&self, user: &User) -> (String, String) {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, user.name.as_str());
        if let Some(group) = user.groups.iter().find(|group| *group != AUTHENTICATED) {
            params.distinguished_name.push(DnType::OrganizationName, group.as_str());
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("BUG: the default algorithm makes keys");
        let certificate = params.signed_by(&key, &self.issuer).expect("BUG: plain parameters can be signed");
        let mut clients = self.clients.lock();
        clients.insert(certificate.der().to_vec(), user.clone());
        (certificate.pem(), key.serialize_pem())
    }

    /// The user that a verified certificate stands for. All of them were made here.
    pub(super) fn user(&self, der: &[u8]) -> Option<User> {
        self.clients.lock().get(der).cloned()
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}
