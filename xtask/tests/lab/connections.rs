//! Clients that misbehave: only their own connection ends.

use crate::lab_node::{Node, POD_IDENTITY};

/// Sends `bytes` (a Python expression), then reads until the agent closes; prints what came, and `closed`.
fn connect_and_send(bytes: &str) -> String {
    format!(
        "import socket\n\
         s = socket.create_connection(('169.254.170.23', 80), timeout=30)\n\
         try:\n\
         \x20   s.sendall({bytes})\n\
         \x20   while chunk := s.recv(65536):\n\
         \x20       print(chunk.decode())\n\
         except ConnectionError:\n\
         \x20   pass\n\
         print('closed')\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_http_ends_its_own_connection_only() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let pod = node.pod("noisy")?;
    let cases = [
        ("garbage", r"bytes(range(256)) * 8 + b'\r\n\r\n'"),
        ("a TLS hello", r"b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + bytes(500)"),
        (
            "a 100 kB header",
            r"b'GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nX-Big: ' + b'a' * 102400 + b'\r\n\r\n'",
        ),
    ];
    for (what, bytes) in cases {
        let said = node.python(&pod, &connect_and_send(bytes)).await?;
        assert!(said.ends_with("closed"), "{what}: {said}");
        assert!(!said.contains("AccessKeyId"), "{what}: {said}");
        // The same pod, the next connection.
        let answer = node.curl(&pod, &[POD_IDENTITY]).await?;
        node.assert_own_role(&pod, &answer);
    }
    node.down().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_one_byte_and_waits_is_closed() -> anyhow::Result<()> {
    let node = Node::intercepting().await?;
    let slow = node.pod("slow")?;
    let other = node.pod("other")?;
    let program = connect_and_send("b'G'");
    let waiting = node.python(&slow, &program);
    let serving = async {
        for _ in 0..5 {
            let answer = node.curl(&other, &[POD_IDENTITY]).await?;
            node.assert_own_role(&other, &answer);
        }
        anyhow::Ok(())
    };
    let (waited, served) = tokio::join!(waiting, serving);
    served?;
    assert!(waited?.ends_with("closed"));
    node.down().await
}
