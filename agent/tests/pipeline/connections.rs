//! Connections: how long they live, and what bad clients do to them.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use rustix::net::{AddressFamily, SocketType, sockopt};

use super::{Fault, ImdsMode, Node, POD_IDENTITY, Service, web};

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_closed_after_its_request_limit() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = web(&node);
    node.connect_as(&pod, POD_IDENTITY);
    let address = node.address;
    let served = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut answer = [0; 4096];
        for served in 0_u32..2000 {
            let sent = stream.write_all(b"GET /elsewhere HTTP/1.1\r\nHost: 169.254.170.23\r\n\r\n");
            let length = sent.and_then(|()| stream.read(&mut answer)).unwrap_or(0);
            if length == 0 {
                return served;
            }
        }
        u32::MAX
    });
    assert_eq!(served.await.unwrap(), 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_never_reads_its_answers_is_disconnected() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = web(&node);
    node.connect_as(&pod, POD_IDENTITY);
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    sockopt::set_socket_recv_buffer_size(&socket, 2048).unwrap();
    rustix::net::connect(&socket, &node.address).unwrap();
    let mut stream = TcpStream::from(socket);
    let client = stream.local_addr().unwrap();
    let request = b"GET /elsewhere HTTP/1.1\r\nHost: 169.254.170.23\r\n\r\n".repeat(900);
    stream.write_all(&request).unwrap();
    // In whatever state: one that is closed with unread answers would stay for minutes. Both ends are compared: the
    // client's port alone may also be that of a connection of another test.
    let agent = node.address;
    let open = || {
        let mut sockets = procfs::net::tcp().unwrap().into_iter();
        sockets.find(|socket| socket.local_address == agent && socket.remote_address == client)
    };
    let begun = Instant::now();
    while let Some(socket) = open() {
        assert!(begun.elapsed() < Duration::from_secs(30), "it is still there: {socket:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_hangs_up_early_is_counted() {
    let node = Node::start(ImdsMode::Intercept).await;
    let pod = web(&node);
    node.faults.set(Service::EksAuth, Fault::Hang);
    node.connect_as(&pod, POD_IDENTITY);
    let mut stream = TcpStream::connect(node.address).unwrap();
    stream.write_all(b"GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\n\r\n").unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(stream);
    let line = "podgate_abandoned_requests_total{dialect=\"pod-identity\"} 1";
    node.until(|| async { node.metrics().contains(line) }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_client_harms_only_its_own_connection() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), POD_IDENTITY);
    let long =
        format!("GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nX: {}\r\n\r\n", "a".repeat(100_000));
    let (garbage, long, one_byte) = tokio::join!(
        node.raw(b"\x16\x03\x01 this is no HTTP\r\n\r\n".to_vec()),
        node.raw(long),
        // Waits for the end of the connection, which comes although nothing more is sent.
        tokio::time::timeout(Duration::from_secs(9), node.raw("G"))
    );
    for answer in [garbage, long, one_byte.expect("the connection is closed")].into_iter().flatten() {
        assert!((400..500).contains(&answer.status), "{answer:?}");
    }
    assert_eq!(node.get("/v1/credentials", &[]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_body_is_never_taken_for_another_request() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), POD_IDENTITY);
    let inner = "GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\n\r\n";
    let outer =
        format!("POST /v1/credentials HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{inner}", inner.len());
    let answer = node.raw(outer).await.unwrap();
    assert_eq!(answer.status, 405, "{answer:?}");
    assert!(!answer.body.contains("AccessKeyId"), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_flight_is_finished_before_shutdown() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), POD_IDENTITY);
    node.faults.set(Service::EksAuth, Fault::Latency(Duration::from_millis(400)));
    let address = node.address;
    let request = tokio::task::spawn_blocking(move || {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    });
    tokio::time::sleep(Duration::from_millis(150)).await;
    node.stop().await;
    assert!(request.await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(std::net::TcpStream::connect(address).is_err(), "the listener is closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_there_at_shutdown_has_its_first_request_answered() {
    let node = Node::start(ImdsMode::Intercept).await;
    node.connect_as(&web(&node), POD_IDENTITY);
    let address = node.address;
    let mut late = TcpStream::connect(address).unwrap();
    let silent = TcpStream::connect(address).unwrap();
    tokio::time::sleep(Duration::from_millis(150)).await;
    let stopping = tokio::spawn(node.stop());
    tokio::time::sleep(Duration::from_millis(150)).await;
    let answer = tokio::task::spawn_blocking(move || {
        late.write_all(b"GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\n\r\n").unwrap();
        let mut answer = String::new();
        late.read_to_string(&mut answer).unwrap();
        answer
    });
    let answer = answer.await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?}");
    let begun = Instant::now();
    stopping.await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(3), "who says nothing does not hold the agent");
    drop(silent);
}
