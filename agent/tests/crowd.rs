//! Many callers at once, over real sockets: what they see, and what EKS Auth sees of them.
#![expect(clippy::unwrap_used, reason = "test code")]

#[path = "pipeline/harness.rs"]
#[expect(dead_code, reason = "shared with the other tests of the pipeline")]
mod harness;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use agent::policy::ImdsMode;
use harness::{Node, TestPod};
use lab::{
    fault_injection::{Fault, Faults, Service},
    kube_api::KubeApi,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    sync::Mutex,
    time::{sleep, timeout},
};

const PODS: usize = 250;
const CALLERS: usize = 8;

/// These tests measure: one at a time.
static ALONE: Mutex<()> = Mutex::const_new(());

/// A pod with its token, as its containers have it.
#[derive(Clone)]
struct Caller {
    node: SocketAddr,
    /// Each pod has its own address, also on loopback.
    from: Ipv4Addr,
    name: String,
    token: String,
}

struct Connection(TcpStream);

impl Caller {
    fn new(node: &Node, number: u16, pod: &TestPod) -> Self {
        let [high, low] = (number + 1).to_be_bytes();
        let from = Ipv4Addr::new(127, 1, high, low);
        Self { node: node.address, from, name: pod.name.clone(), token: pod.token(node) }
    }

    async fn connect(&self) -> io::Result<Connection> {
        let socket = TcpSocket::new_v4()?;
        socket.bind((self.from, 0).into())?;
        Ok(Connection(socket.connect(self.node).await?))
    }

    /// On its own connection.
    async fn get(&self) -> io::Result<(u16, String)> {
        self.connect().await?.get(&self.token).await
    }

    /// As SDKs do: retries as long as it takes. Returns the number of attempts.
    async fn get_until_served(&self) -> (u32, String) {
        for attempt in 1..100 {
            match self.get().await {
                Ok((200, body)) => return (attempt, body),
                _ => sleep(Duration::from_millis(200)).await,
            }
        }
        panic!("{} was never served", self.name);
    }
}

impl Connection {
    async fn get(&mut self, token: &str) -> io::Result<(u16, String)> {
        let request =
            format!("GET /v1/credentials HTTP/1.1\r\nHost: 169.254.170.23\r\nAuthorization: {token}\r\n\r\n");
        self.0.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&answer).into_owned();
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.lines().find_map(|line| {
                    let (name, value) = line.split_once(": ")?;
                    name.eq_ignore_ascii_case("content-length").then(|| value.parse().ok())?
                });
                if body.len() >= length.unwrap_or(0_usize) {
                    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
                    return Ok((status.ok_or(io::ErrorKind::InvalidData)?, body.to_owned()));
                }
            }
            if self.0.read_buf(&mut answer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

async fn cold_node(pods: usize) -> (Node, Vec<Caller>) {
    crowd(Node::start(ImdsMode::Intercept).await, pods)
}

fn crowd(node: Node, pods: usize) -> (Node, Vec<Caller>) {
    node.connect_anonymously();
    node.eks_auth.associate("app", "web", "web-role");
    let pods = (0..pods).map(|n| node.pod(&format!("web-{n}"), "web", |spec| spec.token_volume = true));
    let callers = (0..).zip(pods).map(|(n, pod)| Caller::new(&node, n, &pod)).collect();
    (node, callers)
}

/// The pod that these credentials are for.
fn owner(node: &Node, body: &str) -> String {
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    node.eks_auth.issued(body["AccessKeyId"].as_str().unwrap()).unwrap().pod_name
}

async fn everybody_at_once(node: &Node, callers: &[Caller]) -> (usize, Duration) {
    let begun = Instant::now();
    let crowd = callers.iter().flat_map(|caller| std::iter::repeat_n(caller.clone(), CALLERS));
    let crowd: Vec<_> = crowd
        .map(|caller| tokio::spawn(async move { (caller.get_until_served().await, caller.name) }))
        .collect();
    let mut at_once = 0;
    for asked in crowd {
        let ((attempts, body), name) = asked.await.unwrap();
        assert_eq!(owner(node, &body), name, "another pod's credentials");
        at_once += usize::from(attempts == 1);
    }
    (at_once, begun.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_node_makes_one_call_a_pod_however_many_ask() {
    let _alone = ALONE.lock().await;
    for (what, error_ratio) in [("healthy", 0.0), ("5 % errors", 0.05)] {
        let (node, callers) = cold_node(PODS).await;
        node.faults.set(Service::EksAuth, Fault::Latency(Duration::from_millis(50)));
        let error = Fault::Error { status: 500, code: "InternalServerException".into(), message: "x".into() };
        node.faults.set_ratio(Service::EksAuth, error, error_ratio);
        let (at_once, took) = everybody_at_once(&node, &callers).await;
        let (calls, errors) = (node.eks_auth.calls(), node.eks_auth.refusals().len() as u64);
        println!(
            "{PODS} pods x {CALLERS} callers, {what}: all served after {took:?}, {at_once} at their first attempt; \
             {calls} calls, {errors} of them errors"
        );
        assert_eq!(calls - errors, PODS as u64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_that_hang_up_leave_their_call_to_the_next_ones() {
    let _alone = ALONE.lock().await;
    let (node, callers) = cold_node(PODS).await;
    node.faults.set(Service::EksAuth, Fault::Latency(Duration::from_millis(300)));
    let crowd = callers.iter().flat_map(|caller| std::iter::repeat_n(caller.clone(), CALLERS));
    let crowd = crowd
        .map(|caller| tokio::spawn(async move { timeout(Duration::from_millis(100), caller.get()).await }));
    let hung_up = futures::future::join_all(crowd.collect::<Vec<_>>()).await;
    let hung_up = hung_up.iter().filter(|asked| asked.as_ref().unwrap().is_err()).count();
    let (_, took) = everybody_at_once(&node, &callers).await;
    println!(
        "{hung_up} of {} callers hung up after 100 of 300 ms; all served {took:?} later, {} calls",
        PODS * CALLERS,
        node.eks_auth.calls()
    );
    assert!(hung_up >= PODS * CALLERS / 2, "too few hung up to show anything");
    assert_eq!(node.eks_auth.calls(), PODS as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_retries_is_served_by_its_first_slow_call() {
    let _alone = ALONE.lock().await;
    let (node, callers) = cold_node(1).await;
    node.faults.set(Service::EksAuth, Fault::Latency(Duration::from_secs(3)));
    let begun = Instant::now();
    let (attempts, _) = callers[0].get_until_served().await;
    println!(
        "upstream takes 3 s: served after {:?} at attempt {attempts}, {} call",
        begun.elapsed(),
        node.eks_auth.calls()
    );
    assert!(attempts > 1);
    assert_eq!(node.eks_auth.calls(), 1);
}

/// The 99th percentile of everybody's requests, one every 20 ms on a connection each.
async fn p99(callers: &[Caller]) -> Duration {
    let work = callers.iter().cloned().map(|caller| {
        tokio::spawn(async move {
            let mut connection = caller.connect().await.unwrap();
            let mut times = Vec::new();
            for _ in 0..100 {
                let begun = Instant::now();
                assert_eq!(connection.get(&caller.token).await.unwrap().0, 200);
                times.push(begun.elapsed());
                sleep(Duration::from_millis(20)).await;
            }
            times
        })
    });
    let times = futures::future::join_all(work.collect::<Vec<_>>()).await;
    let mut times: Vec<_> = times.into_iter().flat_map(Result::unwrap).collect();
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_noisy_pod_without_association_is_not_noticed_by_others() {
    let _alone = ALONE.lock().await;
    let (node, callers) = cold_node(50).await;
    let lonely = node.pod("lonely-0", "lonely", |spec| spec.token_volume = true);
    let lonely = Caller::new(&node, 9000, &lonely);
    everybody_at_once(&node, &callers).await;
    let quiet = p99(&callers).await;
    let noise = Arc::new(AtomicU32::new(0));
    // A thousand a second, on as many connections as there may be pending answers.
    let talkers: Vec<_> = (0..40)
        .map(|_| {
            let (lonely, noise) = (lonely.clone(), Arc::clone(&noise));
            tokio::spawn(async move {
                let mut connection = lonely.connect().await.unwrap();
                let mut pace = tokio::time::interval(Duration::from_millis(40));
                loop {
                    pace.tick().await;
                    assert_eq!(connection.get(&lonely.token).await.unwrap().0, 404);
                    noise.fetch_add(1, Relaxed);
                }
            })
        })
        .collect();
    let begun = Instant::now();
    let loud = p99(&callers).await;
    let rate = f64::from(noise.load(Relaxed)) / begun.elapsed().as_secs_f64();
    talkers.iter().for_each(tokio::task::JoinHandle::abort);
    let calls = node.eks_auth.refusals().len();
    println!(
        "{rate:.0} requests a second without association: {calls} calls; the 50 others' p99 {quiet:?} before, {loud:?} \
         meanwhile: {:.1} times",
        loud.as_secs_f64() / quiet.as_secs_f64()
    );
    assert!(calls <= 3, "{calls}");
    assert!(rate > 500.0, "{rate:.0} a second are not noise enough to show anything");
    assert!(loud < (quiet * 20).max(Duration::from_millis(200)));
}

#[tokio::test(flavor = "multi_thread")]
async fn unverifiable_tokens_by_the_thousand_leave_the_others_their_turn() {
    let _alone = ALONE.lock().await;
    // Without the cluster's keys only EKS Auth can verify tokens.
    let deny = |kube_api: &KubeApi| kube_api.allow_issuer_discovery(false);
    let (node, callers) = crowd(Node::start_where(ImdsMode::Intercept, Faults::default(), deny).await, 20);
    let (signed, _) = callers[0].token.rsplit_once('.').unwrap();
    let forger = Caller { from: Ipv4Addr::new(127, 2, 0, 1), ..callers[0].clone() };
    let attempts = (0..1000_u32).map(|n| {
        let token = format!("{signed}.{}", format!("{n:04}").repeat(86));
        let forger = Caller { token, ..forger.clone() };
        tokio::spawn(async move { forger.get().await })
    });
    let attempts: Vec<_> = attempts.collect();
    let begun = Instant::now();
    for caller in &callers {
        let (_, body) = caller.get_until_served().await;
        assert_eq!(owner(&node, &body), caller.name);
    }
    let took = begun.elapsed();
    let mut statuses = std::collections::BTreeMap::<_, usize>::new();
    for asked in attempts {
        *statuses.entry(asked.await.unwrap().map(|(status, _)| status).ok()).or_default() += 1;
    }
    println!(
        "1000 unverifiable forged tokens at once: answered {statuses:?}, {} calls; 20 others served in {took:?}",
        node.eks_auth.calls()
    );
    assert!(!statuses.contains_key(&Some(200)));
    assert!(took < Duration::from_secs(15));
    // Four at once, and one more after each pause.
    let in_vain = node.eks_auth.calls() - callers.len() as u64;
    assert!((1..=8).contains(&in_vain), "{in_vain}");
}

#[tokio::test(flavor = "multi_thread")]
async fn known_pods_need_no_api_server_and_new_ones_wait_for_it() {
    let _alone = ALONE.lock().await;
    let node = Node::start(ImdsMode::Intercept).await;
    node.eks_auth.associate("app", "web", "web-role");
    let get = async |pod: &TestPod| {
        node.connect_as(pod, "169.254.170.23");
        node.get("/v1/credentials", &[]).await
    };
    let known = node.pod("known-0", "web", |_| {});
    assert_eq!(get(&known).await.status, 200);
    node.faults.set(Service::KubeApi, Fault::Drop);
    let new = node.pod("new-0", "web", |_| {});
    let outage = Instant::now();
    let mut refused = 0;
    while outage.elapsed() < Duration::from_secs(5) {
        assert_eq!(get(&known).await.status, 200);
        let answer = get(&new).await;
        assert!(answer.status >= 500, "retryable: {answer:?}");
        refused += 1;
    }
    // The watch cannot resume: 410 Gone.
    node.cluster.compact();
    node.faults.clear(Service::KubeApi);
    let back = Instant::now();
    while get(&new).await.status != 200 {
        assert!(back.elapsed() < Duration::from_mins(1), "never again");
    }
    println!(
        "API server unavailable for 5 s: the known pod served, the new one refused {refused} times; served {:?} after its return",
        back.elapsed()
    );
}
