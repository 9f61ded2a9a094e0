//! How the agent reaches EKS Auth, with settings from the environment: each test runs in its own process, to have its own
//! environment.
#![expect(clippy::unwrap_used, reason = "test code")]

use std::{env, io::Write as _, process::Command, sync::Arc, time::Duration};

use agent::{
    credentials::{Error, aws, aws::eks_auth::EksAuth},
    instance_metadata::Instance,
    secret::Secret,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
};
use tokio_rustls::{TlsAcceptor, rustls};

/// Set in the process that makes the calls.
const CHILD: &str = "PODGATE_TEST_CALLS";

/// Set in it if it keeps a connection warm.
const WARM: &str = "PODGATE_TEST_WARM";
/// Set in it to the region that its instance learns after the first call.
const LATER: &str = "PODGATE_TEST_REGION";
/// How long the proxy keeps an idle connection open.
const IDLE: Duration = Duration::from_secs(1);

/// Makes two calls with this process's environment, and prints their outcomes.
async fn calls() {
    let (config, mut connections) = match aws::config().await {
        Ok(config) => config,
        Err(error) => return println!("outcome: {error}"),
    };
    let (tell, instance) = watch::channel(Instance::default());
    let eks_auth = EksAuth::new(&config, "lab", "n1", instance);
    let warm = env::var_os(WARM).is_some();
    if warm {
        tokio::spawn(eks_auth.clone().keep_warm(connections.clone(), Duration::from_millis(50)));
    }
    for _ in 0..2 {
        if warm {
            // The previous one was closed, and there is another.
            connections.wait_for(|open| *open == 1).await.unwrap();
            connections.wait_for(|open| *open == 0).await.unwrap();
            connections.wait_for(|open| *open == 1).await.unwrap();
            tokio::time::sleep(IDLE / 10).await;
        }
        match eks_auth.assume_role(&Secret::from("a.b.c")).await {
            Err(Error::Service(error)) => println!("outcome: {error}"),
            Err(error) => println!("outcome: {error}"),
            Ok(_) => println!("outcome: credentials"),
        }
        tell.send_replace(Instance::in_region(env::var(LATER).ok()));
        // A connection is free for the next call once its answer has been read to the end.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Runs this very test again in a process with only these AWS variables, and returns the outcomes of its calls.
async fn outcomes(test: &'static str, variables: &[(&str, &str)]) -> Vec<String> {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]);
    let foreign =
        |name: &str| name.starts_with("AWS_") || name.to_lowercase().ends_with("_proxy") || name == "HOME";
    for (inherited, _) in env::vars().filter(|(name, _)| foreign(name)) {
        command.env_remove(inherited);
    }
    command.env(CHILD, "1").env("HOME", "/nonexistent").env("AWS_REGION", "us-west-2");
    command.env("AWS_EC2_METADATA_DISABLED", "true");
    command.envs(variables.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let printed = String::from_utf8(output.stdout).unwrap();
    let outcomes = printed.split("outcome: ").skip(1).map(|rest| rest.lines().next().unwrap().to_owned());
    outcomes.collect()
}

const STATIC: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "ASIANODE"), ("AWS_SECRET_ACCESS_KEY", "secret")];

/// A proxy that also plays every host behind it, with certificates of its own CA. It answers each request with an error,
/// and reports each `CONNECT`.
struct Proxy {
    url: String,
    authority: tempfile::NamedTempFile,
    connects: mpsc::UnboundedReceiver<String>,
    /// For each request: how many preceded it on its connection, and its method.
    requests: mpsc::UnboundedReceiver<(usize, String)>,
}

impl Proxy {
    async fn start() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::new([]).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let mut authority = tempfile::NamedTempFile::new().unwrap();
        authority.write_all(parameters.self_signed(&key).unwrap().pem().as_bytes()).unwrap();
        let issuer = Arc::new(rcgen::Issuer::new(parameters, key));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (tell, connects) = mpsc::unbounded_channel();
        let (tell_request, requests) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (issuer, tell, tell_request) = (Arc::clone(&issuer), tell.clone(), tell_request.clone());
                tokio::spawn(Self::serve(stream, issuer, tell, tell_request));
            }
        });
        Self { url, authority, connects, requests }
    }

    async fn serve(
        stream: TcpStream,
        issuer: Arc<rcgen::Issuer<'static, KeyPair>>,
        tell: mpsc::UnboundedSender<String>,
        tell_request: mpsc::UnboundedSender<(usize, String)>,
    ) {
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        stream.read_line(&mut line).await.unwrap();
        let host = line.split(' ').nth(1).unwrap().to_owned();
        while line != "\r\n" {
            line.clear();
            stream.read_line(&mut line).await.unwrap();
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        tell.send(host.clone()).unwrap();
        let key = KeyPair::generate().unwrap();
        let name = host.split(':').next().unwrap().to_owned();
        let certificate = CertificateParams::new([name]).unwrap().signed_by(&key, &issuer).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(
            rustls::crypto::aws_lc_rs::default_provider(),
        ));
        let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        let key = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let config = config.with_single_cert(vec![certificate.der().clone()], key).unwrap();
        // A client that does not trust the certificate ends here.
        let Ok(mut tls) = TlsAcceptor::from(Arc::new(config)).accept(stream).await else { return };
        let mut buffer = [0; 4096];
        let body = r#"{"__type":"ResourceNotFoundException","message":"none"}"#;
        for number in 0.. {
            let Ok(Ok(read @ 1..)) = tokio::time::timeout(IDLE, tls.read(&mut buffer)).await else { break };
            let method = String::from_utf8_lossy(&buffer[..read]).split(' ').next().unwrap().to_owned();
            let body = if method == "HEAD" { "" } else { body };
            let answer = format!("HTTP/1.1 404 Not Found\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            tls.write_all(answer.as_bytes()).await.unwrap();
            tell_request.send((number, method)).unwrap();
        }
        let _ = tls.shutdown().await;
    }

    fn connects(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.connects.try_recv().ok()).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_sets_the_proxy_the_ca_bundle_and_the_endpoint() {
    const TEST: &str = "the_operator_sets_the_proxy_the_ca_bundle_and_the_endpoint";
    if env::var_os(CHILD).is_some() {
        return calls().await;
    }
    let mut proxy = Proxy::start().await;
    let bundle = proxy.authority.path().to_str().unwrap().to_owned();
    let url = proxy.url.clone();
    let through = [&STATIC[..], &[("HTTPS_PROXY", &*url), ("AWS_CA_BUNDLE", &*bundle)]].concat();
    let fips = [("AWS_USE_FIPS_ENDPOINT", "true")];
    let own = [("AWS_ENDPOINT_URL_EKS_AUTH", "https://vpce-1.example.internal")];
    let dual = [("AWS_USE_DUALSTACK_ENDPOINT", "true"), ("AWS_REGION", "cn-north-1")];
    for (more, host) in [
        (&[][..], "eks-auth.us-west-2.api.aws:443"),
        (&fips[..], "eks-auth-fips.us-west-2.api.aws:443"),
        (&dual[..], "eks-auth.cn-north-1.api.amazonwebservices.com.cn:443"),
        (&own[..], "vpce-1.example.internal:443"),
    ] {
        let outcomes = outcomes(TEST, &[&through, more].concat()).await;
        assert_eq!(outcomes, ["ResourceNotFoundException: none"; 2], "{host}");
        assert_eq!(proxy.connects(), [host], "two calls, one connection");
    }
    let untrusted = outcomes(TEST, &[&STATIC[..], &[("HTTPS_PROXY", &*url)]].concat()).await;
    assert!(untrusted.iter().all(|outcome| outcome.contains("cannot be reached")), "{untrusted:?}");
    assert!(!proxy.connects().is_empty());
    let around = [("NO_PROXY", "eks-auth.us-west-2.api.aws"), ("AWS_ENDPOINT_URL_EKS_AUTH", "")];
    outcomes(TEST, &[&through, &around[..1]].concat()).await;
    assert!(proxy.connects().is_empty(), "NO_PROXY");
    let missing = outcomes(TEST, &[("AWS_CA_BUNDLE", "/nonexistent/ca.pem")]).await;
    assert!(missing[0].contains("/nonexistent/ca.pem, which AWS_CA_BUNDLE names"), "{missing:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_learned_late_from_imds_is_used_if_none_is_configured() {
    const TEST: &str = "a_region_learned_late_from_imds_is_used_if_none_is_configured";
    if env::var_os(CHILD).is_some() {
        return calls().await;
    }
    let mut proxy = Proxy::start().await;
    let (url, bundle) = (proxy.url.clone(), proxy.authority.path().to_str().unwrap().to_owned());
    let late = [("HTTPS_PROXY", &*url), ("AWS_CA_BUNDLE", &*bundle), (LATER, "eu-west-1")];
    let unset = outcomes(TEST, &[&STATIC[..], &late, &[("AWS_REGION", "")]].concat()).await;
    assert!(unset[0].to_lowercase().contains("region"), "{unset:?}");
    assert_eq!(unset[1], "ResourceNotFoundException: none");
    assert_eq!(proxy.connects(), ["eks-auth.eu-west-1.api.aws:443"]);
    let set = outcomes(TEST, &[&STATIC[..], &late].concat()).await;
    assert_eq!(set, ["ResourceNotFoundException: none"; 2]);
    assert_eq!(proxy.connects(), ["eks-auth.us-west-2.api.aws:443"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_call_waits_for_a_handshake_after_the_server_has_closed() {
    const TEST: &str = "no_call_waits_for_a_handshake_after_the_server_has_closed";
    if env::var_os(CHILD).is_some() {
        return calls().await;
    }
    let mut proxy = Proxy::start().await;
    let (url, bundle) = (proxy.url.clone(), proxy.authority.path().to_str().unwrap().to_owned());
    let through = [&STATIC[..], &[("HTTPS_PROXY", &*url), ("AWS_CA_BUNDLE", &*bundle), (WARM, "1")]].concat();
    let outcomes = outcomes(TEST, &through).await;
    assert_eq!(outcomes, ["ResourceNotFoundException: none"; 2]);
    let requests: Vec<_> = std::iter::from_fn(|| proxy.requests.try_recv().ok()).collect();
    let handshakes = proxy.connects().len();
    println!("{handshakes} handshakes; requests by their place on a connection: {requests:?}");
    let calls: Vec<_> = requests.iter().filter(|(_, method)| method == "POST").collect();
    assert!(calls.len() == 2 && calls.iter().all(|(place, _)| *place > 0), "{requests:?}");
    assert!(requests.iter().all(|(place, method)| (*place == 0) == (method == "HEAD")), "{requests:?}");
    assert!(handshakes >= 3, "connections were closed in between");
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_node_credentials_are_named_and_none_come_from_podgate_itself() {
    const TEST: &str = "missing_node_credentials_are_named_and_none_come_from_podgate_itself";
    if env::var_os(CHILD).is_some() {
        return calls().await;
    }
    let itself = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("http://{}/v1/credentials", itself.local_addr().unwrap());
    let mut profile = tempfile::NamedTempFile::new().unwrap();
    let text = "[profile p]\nrole_arn = arn:aws:iam::1:role/r\ncredential_source = EcsContainer\n";
    profile.write_all(text.as_bytes()).unwrap();
    let profile = profile.path().to_str().unwrap().to_owned();
    let leads_back = [("AWS_CONTAINER_CREDENTIALS_FULL_URI", &*uri)];
    let by_profile = [("AWS_CONFIG_FILE", &*profile), ("AWS_PROFILE", "p")];
    let endpoint = [("AWS_ENDPOINT_URL_EKS_AUTH", "http://127.0.0.1:9")];
    for variables in [&[][..], &leads_back[..], &[&leads_back[..], &by_profile].concat()] {
        let outcomes = outcomes(TEST, &[&endpoint[..], variables].concat()).await;
        for outcome in &outcomes {
            assert!(outcome.contains("the node has no AWS credentials"), "{variables:?}: {outcome}");
        }
        assert_eq!(outcomes.len(), 2);
    }
    let connected = tokio::time::timeout(Duration::from_millis(100), itself.accept()).await;
    assert!(connected.is_err(), "podgate was asked for its own credentials");
}

/// A server that answers every request with an HTML page and this status. Returns its URL.
async fn page(status: u16) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let body = "<html>not allowed</html>";
    let head = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: text/html\r\nContent-Length: {}\r\nConnection: close",
        body.len()
    );
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut buffer = [0; 8192];
            let _ = stream.read(&mut buffer).await;
            let _ = stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes()).await;
        }
    });
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn an_html_page_is_no_answer_of_eks_auth_whatever_its_status() {
    const TEST: &str = "an_html_page_is_no_answer_of_eks_auth_whatever_its_status";
    if env::var_os(CHILD).is_some() {
        return calls().await;
    }
    for (status, kind) in [
        (200, "EKS Auth's answer cannot be used"),
        (403, "EKS Auth's answer cannot be used"),
        (407, "EKS Auth's answer cannot be used"),
        (502, "UnknownError"),
    ] {
        let url = page(status).await;
        let endpoint = [("AWS_ENDPOINT_URL_EKS_AUTH", &*url)];
        for outcome in outcomes(TEST, &[&STATIC[..], &endpoint].concat()).await {
            let says = format!(
                "EKS Auth answered {status} with text/html, and not as EKS Auth does (a proxy between?)"
            );
            assert!(outcome.contains(&says) && outcome.starts_with(kind), "{outcome}");
        }
    }
}
