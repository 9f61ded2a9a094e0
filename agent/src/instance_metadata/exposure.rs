//! What keeps pods from the node's IMDS at AWS itself, besides podgate: that it requires tokens, and how far these travel.
//!
//! Owns the measurement and what is said of it. The session token that it asks for is good for a second. The hop limit
//! is the TTL of the response that has the token, and of nothing else:
//! <https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html>

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    time::Duration,
};

use agent_common::net::{HTTP_PORT, IMDS_V4};
use http_body_util::Empty;
use hyper::{Method, Request, StatusCode, body::Bytes, client::conn::http1::handshake, header};
use hyper_util::rt::TokioIo;
use socket2::{SockFilter, SockRef};
use tokio::{net::TcpStream, pin, time::timeout};
use tracing::info;

const IMDS: SocketAddr = SocketAddr::new(IpAddr::V4(IMDS_V4), HTTP_PORT);
/// It is on the instance's own link, and answers within a millisecond.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);
/// In which a server sends again what has not been acknowledged, some times over.
const RETRANSMISSION_TIMEOUT: Duration = Duration::from_secs(5);
/// Leaves a socket only what would go on by one more hop: packets with a TTL of 2 or more. The network header is at
/// `SKF_NET_OFF` of `include/uapi/linux/filter.h`, and the TTL is its byte 8.
const MORE_HOPS: [(u16, u8, u8, u32); 4] = [
    (0x30, 0, 0, (-0x10_0000_i32 + 8).cast_unsigned()), // BPF_LD | BPF_B | BPF_ABS
    (0x35, 0, 1, 2),                                    // BPF_JMP | BPF_JGE | BPF_K
    (0x06, 0, 0, u32::MAX),                             // BPF_RET: all of it
    (0x06, 0, 0, 0),                                    // BPF_RET: nothing
];

/// How the node's IMDS is open to pods that nothing on the node keeps from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exposure {
    /// It answers IMDSv1: `HttpTokens` is `optional`.
    answers_v1: bool,
    /// Its tokens get further than the node: the hop limit is 2 or more.
    tokens_travel: bool,
}

// === impl Exposure ===

impl Exposure {
    /// Measures both.
    ///
    /// # Errors
    /// When IMDS does not answer in time, or in another way than EC2's.
    pub(super) async fn measure() -> io::Result<Self> {
        Ok(Self { answers_v1: answers_v1().await?, tokens_travel: tokens_travel().await? })
    }

    /// Says what is missing.
    pub(super) fn say(self, instance: Option<&str>) {
        let Self { answers_v1, tokens_travel } = self;
        if answers_v1 || tokens_travel {
            let id = instance.unwrap_or("ID");
            info!(
                answers_v1,
                tokens_travel,
                "AWS itself does not keep pods from the node's IMDS, with which podgate's programs are alone; once no pod needs \
                 it: aws ec2 modify-instance-metadata-options --instance-id {id} --http-tokens required \
                 --http-put-response-hop-limit 1"
            );
        } else {
            info!(
                "AWS itself keeps pods behind the node from its IMDS: tokens are required, and travel one hop"
            );
        }
    }
}

async fn answers_v1() -> io::Result<bool> {
    let request = request(Method::GET, "/latest/meta-data/instance-id")?;
    match timeout(ANSWER_TIMEOUT, ask(connect().await?, request)).await?? {
        StatusCode::OK => Ok(true),
        StatusCode::UNAUTHORIZED => Ok(false),
        other => Err(io::Error::other(format!("status {other}"))),
    }
}

async fn tokens_travel() -> io::Result<bool> {
    let stream = connect().await?;
    let socket = stream.as_fd().try_clone_to_owned()?;
    let filter = MORE_HOPS.map(|(code, jt, jf, k)| SockFilter::new(code, jt, jf, k));
    SockRef::from(&socket).attach_filter(&filter)?;
    let mut request = request(Method::PUT, "/latest/api/token")?;
    request.headers_mut().insert("x-aws-ec2-metadata-token-ttl-seconds", header::HeaderValue::from(1));
    let answer = ask(stream, request);
    pin!(answer);
    if let Ok(answer) = timeout(ANSWER_TIMEOUT, &mut answer).await {
        answer?;
        return Ok(true);
    }
    // It must be the filter that kept it away.
    SockRef::from(&socket).detach_filter()?;
    timeout(RETRANSMISSION_TIMEOUT, answer).await??;
    Ok(false)
}

async fn connect() -> io::Result<TcpStream> {
    timeout(ANSWER_TIMEOUT, TcpStream::connect(IMDS)).await?
}

fn request(method: Method, path: &str) -> io::Result<Request<Empty<Bytes>>> {
    let request = Request::builder().method(method).uri(path).header(header::HOST, IMDS.ip().to_string());
    request.body(Empty::new()).map_err(io::Error::other)
}

async fn ask(stream: TcpStream, request: Request<Empty<Bytes>>) -> io::Result<StatusCode> {
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await.map_err(io::Error::other)?;
    Ok(response.status())
}
