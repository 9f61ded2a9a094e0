//! A pod is removed while another process still holds a connection of its.
#![expect(clippy::unwrap_used, reason = "test code")]

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use super::{ECS, IMDS, ImdsMode, Node, POD_IDENTITY, ROLES, TOKEN, TTL, injected, web};

/// A connection that stays open.
struct OpenConnection(TcpStream);

impl OpenConnection {
    fn open(node: &Node) -> Self {
        let stream = TcpStream::connect(node.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        Self(stream)
    }

    /// What comes of a request, if anything: the head in small letters, and the body.
    async fn ask(&self, method: &str, host: &str, path: &str, header: (&str, &str)) -> Option<String> {
        let (name, value) = header;
        let request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{name}: {value}\r\n\r\n");
        let mut stream = self.0.try_clone().unwrap();
        let answer = tokio::task::spawn_blocking(move || {
            stream.write_all(request.as_bytes()).ok()?;
            let mut answer = String::new();
            loop {
                let mut bytes = [0; 4096];
                let length = stream.read(&mut bytes).ok().filter(|length| *length > 0)?;
                answer.push_str(&String::from_utf8_lossy(&bytes[..length]));
                let Some((head, body)) = answer.split_once("\r\n\r\n") else { continue };
                let head = head.to_lowercase();
                let (_, length) = head.split_once("content-length: ")?;
                if body.len() >= length.lines().next()?.parse().ok()? {
                    return Some(format!("{head}\r\n\r\n{body}"));
                }
            }
        });
        answer.await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_a_removed_pod_are_refused_in_every_dialect() {
    let node = Node::start(ImdsMode::Intercept).await;
    let (pod, with_token) = (web(&node), node.pod("web-1", "web", |spec| spec.token_volume = true));
    let token = with_token.token(&node);
    let (nothing, by_token) = (("Accept", "*/*"), ("Authorization", token.as_str()));
    for (pod, address, method, path, header) in [
        (&pod, POD_IDENTITY, "GET", "/v1/credentials", nothing),
        (&pod, ECS, "GET", "/v1/credentials/x", nothing),
        (&pod, IMDS, "PUT", TOKEN, TTL),
        (&with_token, POD_IDENTITY, "GET", "/v1/credentials", by_token),
    ] {
        node.connect_as(pod, address);
        let connection = OpenConnection::open(&node);
        let answer = connection.ask(method, address, path, header).await.unwrap();
        assert!(answer.starts_with("http/1.1 200"), "{answer}");

        node.remove_cgroup(pod).await;
        let answer = connection.ask(method, address, path, header).await.unwrap();
        assert!(answer.starts_with("http/1.1 403") && answer.contains("is gone"), "{answer}");
        assert!(answer.contains("connection: close"), "{answer}");
        assert!(connection.ask(method, address, path, header).await.is_none(), "it is closed");

        node.restore_cgroup(pod).await;
        let again = OpenConnection::open(&node).ask(method, address, path, header).await.unwrap();
        assert!(again.starts_with("http/1.1 200"), "its containers were started anew: {again}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_without_cgroup_gets_nothing_though_the_api_server_has_it() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = injected(&node);
    let token = pod.token(&node);
    let ask_all = async || {
        node.connect_anonymously();
        let by_token = node.get("/v1/credentials", &[("Authorization", &token)]).await;
        node.connect_as(&pod, POD_IDENTITY);
        let by_both = node.get("/v1/credentials", &[("Authorization", &token)]).await;
        node.connect_as(&pod, IMDS);
        let session = node.request("PUT", TOKEN, &[TTL]).await.body;
        let by_kernel = node.get(ROLES, &[("X-aws-ec2-metadata-token", &session)]).await;
        [by_token, by_both, by_kernel]
    };
    assert!(ask_all().await.iter().all(|answer| answer.status == 200));
    node.remove_cgroup(&pod).await;
    for answer in ask_all().await {
        assert!(answer.status == 500 && answer.body.contains("the pod is gone"), "{answer:?}");
    }
    assert_eq!(node.eks_auth.calls(), 1);
    node.restore_cgroup(&pod).await;
    assert!(ask_all().await.iter().all(|answer| answer.status == 200));
}
