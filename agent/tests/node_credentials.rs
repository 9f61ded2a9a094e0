//! The node's own credentials from each of their sources: each test runs in its own process, to have its own environment.
#![expect(clippy::unwrap_used, reason = "test code")]

use std::{
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, SystemTime},
};

use agent::{
    credentials::aws,
    instance_metadata::{self, Instance},
};
use lab::{
    fault_injection::{Fault, Faults, Service},
    imds_server::{Imds, ImdsConfig, NodeCredentials},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::{mpsc, watch},
};

/// Set in the process that asks for credentials.
const CHILD: &str = "PODGATE_TEST_ASKS";

/// A process that reports on request which access key it finds in its environment, or why none.
struct Asker {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Asker {
    /// An empty variable is not set.
    fn start(test: &str, variables: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture"]);
        let foreign = |name: &str| {
            name.starts_with("AWS_") || name.to_lowercase().ends_with("_proxy") || name == "HOME"
        };
        for (inherited, _) in env::vars().filter(|(name, _)| foreign(name)) {
            command.env_remove(inherited);
        }
        command.env(CHILD, "1").env("HOME", "/nonexistent").env("AWS_REGION", "us-west-2");
        for (name, value) in variables {
            if value.is_empty() {
                command.env_remove(name)
            } else {
                command.env(name, value)
            };
        }
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, from) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Self { process, to, from: BufReader::new(from) }
    }

    /// Asks once, and returns the answer.
    fn ask(&mut self) -> String {
        writeln!(self.to, "ask").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.from.read_line(&mut line).unwrap() > 0, "it has ended");
            if let Some((_, answer)) = line.split_once("answer: ") {
                return answer.trim_end().to_owned();
            }
        }
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The process: it answers each line.
async fn answer() {
    let (config, _) = aws::config().await.unwrap();
    let provider = config.credentials_provider().unwrap();
    for _ in std::io::stdin().lines() {
        use aws_credential_types::provider::ProvideCredentials as _;
        match provider.provide_credentials().await {
            Ok(credentials) => {
                let left = credentials.expiry().unwrap().duration_since(SystemTime::now()).unwrap();
                println!("answer: {} for {} s", credentials.access_key_id(), left.as_secs());
            }
            Err(error) => println!("answer: {}", agent::error::chain(&error)),
        }
    }
}

fn write_keys(file: &Path, key: &str) {
    let keys = format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n");
    fs::write(file, keys).unwrap();
}

#[tokio::test]
async fn replaced_keys_in_the_shared_file_are_used_within_a_minute() {
    if env::var_os(CHILD).is_some() {
        return answer().await;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("credentials");
    let variables =
        [("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap()), ("AWS_EC2_METADATA_DISABLED", "true")];
    let mut asker = Asker::start("replaced_keys_in_the_shared_file_are_used_within_a_minute", &variables);
    assert!(!asker.ask().contains("ASIA"), "there are none yet");
    for key in ["ASIAFIRST", "ASIASECOND"] {
        write_keys(&file, key);
        let answer = asker.ask();
        let left = answer.strip_prefix(&format!("{key} for ")).and_then(|rest| rest.strip_suffix(" s"));
        assert!((1..=60).contains(&left.unwrap_or_else(|| panic!("{answer}")).parse::<u64>().unwrap()));
    }
}

#[tokio::test]
async fn a_profile_that_is_not_there_is_named_each_time() {
    if env::var_os(CHILD).is_some() {
        return answer().await;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("credentials");
    write_keys(&file, "ASIAOTHER");
    let variables = [
        ("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap()),
        ("AWS_PROFILE", "absent"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ];
    let mut asker = Asker::start("a_profile_that_is_not_there_is_named_each_time", &variables);
    let first = asker.ask();
    assert!(!first.contains("ASIA"), "{first}");
    assert_eq!(asker.ask(), first);
}

#[tokio::test]
async fn a_web_identity_is_exchanged_at_sts() {
    if env::var_os(CHILD).is_some() {
        return answer().await;
    }
    let mut token = tempfile::NamedTempFile::new().unwrap();
    token.write_all(b"a.b.c").unwrap();
    let (endpoint, mut asked) = sts().await;
    let variables = [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", token.path().to_str().unwrap()),
        ("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/node"),
        ("AWS_ENDPOINT_URL_STS", endpoint.as_str()),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ];
    let answer = tokio::task::spawn_blocking({
        let variables = variables.map(|(name, value)| (name, value.to_owned()));
        move || {
            let variables: Vec<_> = variables.iter().map(|(name, value)| (*name, value.as_str())).collect();
            Asker::start("a_web_identity_is_exchanged_at_sts", &variables).ask()
        }
    });
    let answer = answer.await.unwrap();
    assert!(answer.starts_with("ASIAWEB for "), "{answer}");
    let asked = asked.recv().await.unwrap();
    assert!(asked.contains("AssumeRoleWithWebIdentity") && asked.contains("a.b.c"), "{asked}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_instance_role_comes_from_imds_v2_and_survives_its_outage() {
    if env::var_os(CHILD).is_some() {
        return answer().await;
    }
    let faults = Faults::default();
    let imds = imds(&faults);
    let endpoint = format!("http://{}", imds.address());
    let asking = tokio::task::spawn_blocking(move || {
        let mut asker = Asker::start(
            "the_instance_role_comes_from_imds_v2_and_survives_its_outage",
            &[("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint.as_str())],
        );
        let first = asker.ask();
        faults.set(Service::Imds, Fault::Drop);
        (first, asker.ask())
    });
    let (first, second) = asking.await.unwrap();
    for answer in [&first, &second] {
        assert!(answer.starts_with("ASIANODE for "), "{first}, {second}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_is_used_for_sts_but_not_for_imds() {
    const TEST: &str = "the_proxy_is_used_for_sts_but_not_for_imds";
    if env::var_os(CHILD).is_some() {
        let (copy, mut instance) = watch::channel(Instance::default());
        tokio::spawn(instance_metadata::follow(instance_metadata::imds(), copy));
        let known = instance.wait_for(|instance| instance.zone.is_some());
        tokio::time::timeout(Duration::from_secs(5), known).await.unwrap().unwrap();
        return answer().await;
    }
    let imds = imds(&Faults::default());
    let endpoint = format!("http://{}", imds.address());
    let (proxy, mut asked) = proxy().await;
    let mut profile = tempfile::NamedTempFile::new().unwrap();
    profile
        .write_all(
            b"[default]\nrole_arn = arn:aws:iam::123456789012:role/other\n\
            credential_source = Ec2InstanceMetadata\n",
        )
        .unwrap();
    let answer = tokio::task::spawn_blocking(move || {
        let variables = [
            ("AWS_CONFIG_FILE", profile.path().to_str().unwrap()),
            ("AWS_EC2_METADATA_SERVICE_ENDPOINT", &endpoint),
            ("AWS_ENDPOINT_URL_STS", "http://sts.test.invalid"),
            ("AWS_REGION", ""),
            ("HTTP_PROXY", &proxy),
        ];
        Asker::start(TEST, &variables).ask()
    });
    let answer = answer.await.unwrap();
    let mut through_proxy = Vec::new();
    asked.close();
    while let Some(request) = asked.recv().await {
        through_proxy.push(request);
    }
    assert!(answer.starts_with("ASIAOTHER for "), "{answer}, {through_proxy:?}");
    let sts = |request: &String| request.contains("Action=AssumeRole") && request.contains("ASIANODE");
    assert!(through_proxy.iter().all(sts), "{through_proxy:?}");
    assert_eq!(through_proxy.len(), 1);
}

/// An IMDS whose instance has a role, with IMDSv2 only.
fn imds(faults: &Faults) -> Imds {
    let credentials = NodeCredentials {
        access_key_id: "ASIANODE".into(),
        secret_access_key: "secret".into(),
        session_token: "session".into(),
    };
    let config = ImdsConfig {
        role_name: "node".into(),
        account: "123456789012".into(),
        ..ImdsConfig::new(credentials)
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let imds = Imds::serve(vec![listener], config, faults.clone()).unwrap();
    imds.v2_required(true);
    imds
}

/// A proxy with nothing but STS behind it. It reports what it was asked.
async fn proxy() -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (tell, asked) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = Vec::new();
            let is_whole = |request: &[u8]| {
                let text = String::from_utf8_lossy(request).into_owned();
                text.contains("\r\n\r\n") && (!text.starts_with("POST") || text.contains("Version="))
            };
            while !is_whole(&request) && stream.read_buf(&mut request).await.unwrap() > 0 {}
            let request = String::from_utf8_lossy(&request).into_owned();
            let body = "<AssumeRoleResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><AssumeRoleResult>\
                <Credentials><AccessKeyId>ASIAOTHER</AccessKeyId><SecretAccessKey>secret</SecretAccessKey>\
                <SessionToken>session</SessionToken><Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>\
                <AssumedRoleUser><Arn>arn:aws:sts::123456789012:assumed-role/other/n1</Arn>\
                <AssumedRoleId>AROA:n1</AssumedRoleId></AssumedRoleUser>\
                </AssumeRoleResult></AssumeRoleResponse>";
            let status = if request.starts_with("POST") { "200 OK" } else { "404 Not Found" };
            let _ = tell.send(request);
            let answer = format!(
                "HTTP/1.1 {status}\r\nContent-Type: text/xml\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (endpoint, asked)
}

/// An STS that always returns the same keys, and reports what it was asked.
async fn sts() -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (tell, asked) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 16 * 1024];
            let mut length = 0;
            while !String::from_utf8_lossy(&request[..length]).contains("a.b.c") {
                length += stream.read(&mut request[length..]).await.unwrap();
            }
            let _ = tell.send(String::from_utf8_lossy(&request[..length]).into_owned());
            let body = "<AssumeRoleWithWebIdentityResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\">\
                <AssumeRoleWithWebIdentityResult><Credentials><AccessKeyId>ASIAWEB</AccessKeyId>\
                <SecretAccessKey>secret</SecretAccessKey><SessionToken>session</SessionToken>\
                <Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>\
                <AssumedRoleUser><Arn>arn:aws:sts::123456789012:assumed-role/node/n1</Arn>\
                <AssumedRoleId>AROA:n1</AssumedRoleId></AssumedRoleUser>\
                </AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>";
            let answer = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: text/xml\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            );
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (endpoint, asked)
}
