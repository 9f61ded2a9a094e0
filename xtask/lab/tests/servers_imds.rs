//! The metadata service as a plain HTTP client meets it.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::TcpListener;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{HeaderMap, Request, Response};
use hyper_util::rt::TokioIo;
use lab::{
    fault_injection::{Fault, Faults, Service},
    imds_server::{Imds, ImdsConfig, NodeCredentials},
};

const ROLE: &str = "/latest/meta-data/iam/security-credentials/";
const DOCUMENT: &str = "/latest/meta-data/iam/security-credentials/node-role";
const TOKEN: &str = "/latest/api/token";

fn start(faults: &Faults) -> Imds {
    let config = ImdsConfig::new(NodeCredentials {
        access_key_id: "ASIANODE".into(),
        secret_access_key: "node-secret".into(),
        session_token: "node-session".into(),
    });
    let listeners = ["127.0.0.1:0", "127.0.0.2:0"].map(|address| TcpListener::bind(address).unwrap());
    Imds::serve(listeners.into(), config, faults.clone()).unwrap()
}

/// One request on a connection of its own.
async fn send(imds: &Imds, target: &str, headers: &[(&str, &str)]) -> Response<String> {
    let (method, path) = target.split_once(' ').unwrap();
    let stream = tokio::net::TcpStream::connect(imds.address()).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path).header("host", "169.254.169.254");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
    let (head, body) = response.into_parts();
    let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
    Response::from_parts(head, body)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn a_token_is_given_and_asked_for_as_on_ec2() {
    let imds = start(&Faults::default());
    let ttl = "x-aws-ec2-metadata-token-ttl-seconds";
    let answer = send(&imds, &format!("PUT {TOKEN}"), &[(ttl, "21600")]).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(header(answer.headers(), ttl), "21600");
    assert_eq!(header(answer.headers(), "content-type"), "text/plain");
    assert_eq!(header(answer.headers(), "server"), "EC2ws");
    let token = answer.into_body();
    assert_eq!(token.len(), 56);

    let get = format!("GET {ROLE}");
    let with = |token| [("x-aws-ec2-metadata-token", token)].to_vec();
    for (case, required, target, headers, status) in [
        ("v1", false, get.as_str(), vec![], 200),
        ("v1 where it is off", true, &get, vec![], 401),
        ("v2", true, &get, with(token.as_str()), 200),
        ("bad token", true, &get, with("INVALID"), 401),
        ("bad token where none is needed", false, &get, with("INVALID"), 401),
        ("unknown path", false, "GET /latest/meta-data/nope", vec![], 404),
        ("another role", false, "GET /latest/meta-data/iam/security-credentials/other", vec![], 404),
        ("no ttl", false, "PUT /latest/api/token", vec![], 400),
        ("ttl of 0", false, "PUT /latest/api/token", vec![(ttl, "0")], 400),
        ("ttl too long", false, "PUT /latest/api/token", vec![(ttl, "21601")], 400),
        ("ttl no number", false, "PUT /latest/api/token", vec![(ttl, "abc")], 400),
        (
            "through a proxy",
            false,
            "PUT /latest/api/token",
            vec![(ttl, "60"), ("x-forwarded-for", "1.2.3.4")],
            403,
        ),
        ("get of a token", false, "GET /latest/api/token", vec![], 405),
        ("post", false, "POST /latest/meta-data/", vec![], 405),
        ("expectation", false, &get, vec![("expect", "100-continue")], 417),
    ] {
        imds.v2_required(required);
        let answer = send(&imds, target, &headers).await;
        assert_eq!(answer.status(), status, "{case}");
        if status >= 400 {
            assert_eq!(header(answer.headers(), "connection"), "close", "{case}");
            assert!(answer.body().contains(&format!("<h1>{status} - ")), "{case}: {}", answer.body());
        }
    }
}

#[tokio::test]
async fn every_read_of_the_nodes_credentials_is_counted() {
    let imds = start(&Faults::default());
    assert_eq!(send(&imds, &format!("GET {ROLE}"), &[]).await.body(), "node-role");
    assert_eq!(imds.credential_reads(), 0);
    let document = send(&imds, &format!("GET {DOCUMENT}"), &[]).await.into_body();
    let document: serde_json::Value = serde_json::from_str(&document).unwrap();
    assert_eq!(document["AccessKeyId"], "ASIANODE");
    assert_eq!(imds.credential_reads(), 1);
    imds.v2_required(true);
    send(&imds, &format!("GET {DOCUMENT}"), &[]).await;
    assert_eq!(imds.credential_reads(), 1, "refused");
    let log = imds.requests();
    assert_eq!((log.len(), log[1].status, log[1].path.as_str(), log[2].status), (3, 200, DOCUMENT, 401));
}

#[tokio::test]
async fn a_fault_is_a_page_like_any_other_error() {
    let faults = Faults::default();
    let imds = start(&faults);
    let fault = Fault::Error { status: 500, code: String::new(), message: String::new() };
    faults.set_ratio(Service::Imds, fault, 0.5);
    let mut statuses = Vec::new();
    for _ in 0..4 {
        statuses.push(send(&imds, &format!("GET {ROLE}"), &[]).await.status().as_u16());
    }
    assert_eq!(statuses, [200, 500, 200, 500]);
}
