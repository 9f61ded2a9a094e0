//! EKS Auth as the AWS SDK meets it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{net::TcpListener, time::Duration};

use aws_sdk_eksauth::{
    Client,
    config::{BehaviorVersion, Credentials, Region, retry::RetryConfig},
    error::ProvideErrorMetadata as _,
    operation::assume_role_for_pod_identity::AssumeRoleForPodIdentityOutput,
};
use lab::{
    cluster::{Cluster, PodSpec},
    eks_auth_server::{EksAuth, EksAuthConfig, NodeCredentials},
    fault_injection::{Fault, Faults, Service},
};

const EKS: &str = "pods.eks.amazonaws.com";
const HOUR: Duration = Duration::from_hours(1);

struct Fixture {
    eks_auth: EksAuth,
    cluster: Cluster,
    faults: Faults,
}

impl Fixture {
    fn start() -> Self {
        let (cluster, faults) = (Cluster::new("https://oidc.test.invalid/id/TEST"), Faults::default());
        cluster.add_node("n1");
        for (name, service_account) in [("web-1", "web"), ("idle-1", "idle")] {
            cluster.add_service_account("app", service_account);
            cluster.add_pod(&PodSpec {
                namespace: "app".into(),
                name: name.into(),
                service_account: service_account.into(),
                node: "n1".into(),
                ..PodSpec::default()
            });
        }
        let config = EksAuthConfig {
            cluster_name: "lab".into(),
            region: "eu-west-1".into(),
            account: "111122223333".into(),
            node: node(),
            session: 6 * HOUR,
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let eks_auth = EksAuth::serve(listener, config, cluster.clone(), faults.clone()).unwrap();
        eks_auth.associate("app", "web", "web-role");
        Self { eks_auth, cluster, faults }
    }

    fn token(&self, pod: &str) -> String {
        self.cluster.mint_pod_token("app", pod, &[EKS], HOUR)
    }

    fn client(&self, credentials: NodeCredentials, region: &'static str) -> Client {
        let NodeCredentials { access_key_id, secret_access_key, session_token } = credentials;
        let session_token = Some(session_token).filter(|token| !token.is_empty());
        let credentials = Credentials::new(access_key_id, secret_access_key, session_token, None, "test");
        let config = aws_sdk_eksauth::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .credentials_provider(credentials)
            .endpoint_url(self.eks_auth.url())
            .region(Region::new(region))
            .retry_config(RetryConfig::disabled());
        Client::from_conf(config.build())
    }

    /// A call of the node; the error is its code and message.
    async fn call(&self, token: &str) -> Result<AssumeRoleForPodIdentityOutput, (String, String)> {
        assume(&self.client(node(), "eu-west-1"), "lab", token).await
    }
}

fn node() -> NodeCredentials {
    NodeCredentials {
        access_key_id: "ASIANODE".into(),
        secret_access_key: "node-secret".into(),
        session_token: "node-session".into(),
    }
}

async fn assume(
    client: &Client,
    cluster: &str,
    token: &str,
) -> Result<AssumeRoleForPodIdentityOutput, (String, String)> {
    let call = client.assume_role_for_pod_identity().cluster_name(cluster).token(token).send().await;
    call.map_err(|error| {
        let part = |part: Option<&str>| part.unwrap_or("none").to_owned();
        (part(error.code()), part(error.message()))
    })
}

#[tokio::test]
async fn a_good_call_gets_credentials_of_the_associated_role() {
    let fixture = Fixture::start();
    let answer = fixture.call(&fixture.token("web-1")).await.unwrap();
    let credentials = answer.credentials().unwrap();
    let issued = fixture.eks_auth.issued(credentials.access_key_id()).unwrap();
    assert_eq!(issued.role_arn, "arn:aws:iam::111122223333:role/web-role");
    assert_eq!((issued.pod_name.as_str(), issued.service_account.as_str()), ("web-1", "web"));
    assert_eq!(credentials.expiration().secs(), issued.expiration.as_second());
    assert_eq!(answer.subject().unwrap().namespace(), "app");
    let role = answer.assumed_role_user().unwrap().arn();
    assert!(role.starts_with("arn:aws:sts::111122223333:assumed-role/web-role/eks-lab-web-1-"), "{role}");

    let again = fixture.call(&fixture.token("web-1")).await.unwrap();
    assert_ne!(again.credentials().unwrap().access_key_id(), credentials.access_key_id());
    assert_eq!((fixture.eks_auth.calls(), fixture.eks_auth.accepted_calls()), (2, 2));
}

#[tokio::test]
async fn a_call_that_is_not_signed_by_the_node_is_refused() {
    let fixture = Fixture::start();
    let token = fixture.token("web-1");
    let changed = |change: fn(&mut NodeCredentials)| {
        let mut credentials = node();
        change(&mut credentials);
        credentials
    };
    for (case, credentials, region, code) in [
        (
            "wrong secret",
            changed(|c| c.secret_access_key = "guess".into()),
            "eu-west-1",
            "InvalidSignatureException",
        ),
        (
            "no session token",
            changed(|c| c.session_token.clear()),
            "eu-west-1",
            "UnrecognizedClientException",
        ),
        (
            "old session token",
            changed(|c| c.session_token = "old".into()),
            "eu-west-1",
            "UnrecognizedClientException",
        ),
        (
            "unknown key",
            changed(|c| c.access_key_id = "ASIAOTHER".into()),
            "eu-west-1",
            "UnrecognizedClientException",
        ),
        ("another region", node(), "us-east-1", "InvalidSignatureException"),
    ] {
        let (found, message) = assume(&fixture.client(credentials, region), "lab", &token).await.unwrap_err();
        assert_eq!(found, code, "{case}: {message}");
    }
    assert_eq!((fixture.eks_auth.calls(), fixture.eks_auth.accepted_calls()), (5, 0));
    assert_eq!(fixture.eks_auth.refusals().len(), 5);
}

#[tokio::test]
async fn a_token_that_is_not_good_is_refused() {
    let fixture = Fixture::start();
    let cluster = &fixture.cluster;
    let claims = || cluster.pod_claims("app", "web-1", &[EKS], HOUR);
    let signed = |change: fn(&mut lab::jwt::Claims)| {
        let mut claims = claims();
        change(&mut claims);
        cluster.sign(&claims)
    };
    let invalid = "InvalidTokenException";
    for (case, token, code, text) in [
        ("forged", cluster.signing_key().forge().sign(&claims()), invalid, "signature"),
        ("another cluster's", lab::jwt::SigningKey::generate().sign(&claims()), invalid, "signing key"),
        (
            "another audience",
            cluster.mint_pod_token("app", "web-1", &["sts.amazonaws.com"], HOUR),
            invalid,
            "audience",
        ),
        ("another issuer", signed(|claims| claims.iss = "https://evil.invalid".into()), invalid, "issuer"),
        (
            "expired",
            signed(|claims| claims.exp = claims.iat - 1),
            "ExpiredTokenException",
            "is expired: current date",
        ),
        ("early", signed(|claims| claims.nbf += 600), invalid, "not valid yet"),
        ("unbound", signed(|claims| claims.kubernetes.pod = None), invalid, "not bound"),
        ("garbage", "a.b.c".to_owned(), invalid, "not a JSON web token"),
    ] {
        let (found, message) = fixture.call(&token).await.unwrap_err();
        assert_eq!(found, code, "{case}: {message}");
        assert!(message.contains(text), "{case}: {message}");
    }
    let token = fixture.token("web-1");
    cluster.delete_pod("app", "web-1");
    assert_eq!(fixture.call(&token).await.unwrap_err().0, invalid, "its pod is deleted");
    assert_eq!(fixture.eks_auth.accepted_calls(), 0);
}

#[tokio::test]
async fn tokens_of_an_older_key_are_good_until_it_is_retired() {
    let fixture = Fixture::start();
    let old = fixture.token("web-1");
    fixture.cluster.rotate_signing_key();
    let new = fixture.token("web-1");
    assert_eq!(fixture.cluster.jwks()["keys"].as_array().unwrap().len(), 2);
    for token in [&old, &new] {
        fixture.call(token).await.unwrap();
    }
    fixture.cluster.retire_old_keys();
    fixture.call(&new).await.unwrap();
    let (code, message) = fixture.call(&old).await.unwrap_err();
    assert_eq!(code, "InvalidTokenException");
    assert!(message.contains("signing key"), "{message}");
}

#[tokio::test]
async fn without_an_association_there_are_no_credentials() {
    let fixture = Fixture::start();
    let (code, message) = fixture.call(&fixture.token("idle-1")).await.unwrap_err();
    assert_eq!(code, "ResourceNotFoundException");
    assert!(message.starts_with("No association exists"), "{message}");

    fixture.eks_auth.associate("app", "idle", "idle-role");
    let answer = fixture.call(&fixture.token("idle-1")).await.unwrap();
    let issued = fixture.eks_auth.issued(answer.credentials().unwrap().access_key_id()).unwrap();
    assert_eq!(issued.role_name, "idle-role");

    fixture.eks_auth.dissociate("app", "idle");
    assert_eq!(fixture.call(&fixture.token("idle-1")).await.unwrap_err().0, "ResourceNotFoundException");
    let client = fixture.client(node(), "eu-west-1");
    let error = assume(&client, "other", &fixture.token("web-1")).await.unwrap_err();
    assert_eq!(error.0, "ResourceNotFoundException");
}

#[tokio::test]
async fn a_fault_arrives_as_the_service_words_it() {
    let fixture = Fixture::start();
    let token = fixture.token("web-1");
    let set = |fault| fixture.faults.set(Service::EksAuth, fault);
    set(Fault::Throttle { retry_after: Some(Duration::from_secs(1)) });
    assert_eq!(fixture.call(&token).await.unwrap_err().0, "ThrottlingException");
    set(Fault::Error { status: 400, code: "AccessDeniedException".into(), message: "no".into() });
    assert_eq!(fixture.call(&token).await.unwrap_err(), ("AccessDeniedException".into(), "no".into()));
    set(Fault::Drop);
    assert_eq!(fixture.call(&token).await.unwrap_err().0, "none");
    set(Fault::Hang);
    tokio::time::timeout(Duration::from_millis(200), fixture.call(&token)).await.unwrap_err();
    fixture.faults.clear(Service::EksAuth);
    set(Fault::Latency(Duration::from_millis(200)));
    let before = std::time::Instant::now();
    fixture.call(&token).await.unwrap();
    assert!(before.elapsed() >= Duration::from_millis(200));
    assert_eq!((fixture.eks_auth.calls(), fixture.eks_auth.accepted_calls()), (5, 1));
}
