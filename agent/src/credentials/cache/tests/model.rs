//! The engine against a model of what it promises, whatever happens in whatever order; and the model against bugs that are
//! planted in the engine.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::atomic::{AtomicI64, Ordering::SeqCst},
};

use proptest::{
    collection::vec,
    test_runner::{Config, RngSeed, TestCaseError, TestRunner},
};
use tokio::task::{JoinSet, LocalSet};

use super::*;
use crate::{
    credentials::cache::planted::{Bug, plant},
    identity::{PodUid, Pods},
    secret::Secret,
    testing::upstream::Call,
};

const PODS: usize = 3;
/// Where the runs' jitter_source begin.
const SEED: u64 = 1;
/// Turns of all tasks after which nothing is left that could happen at this very time.
const SETTLED: usize = 16;

/// Something that happens.
#[derive(Clone, Debug)]
enum Event {
    Ask {
        pod: usize,
        timeout_ms: u64,
        floor: Floor,
    },
    /// By a caller at this address that nobody vouches for, or by the pod itself.
    Send {
        pod: usize,
        genuine: bool,
        address: Option<u8>,
    },
    Verdict(Verdict),
    Clock {
        minutes: i64,
    },
    Prefetch(usize),
    PodLifecycle(usize),
    Pass(Duration),
    Weather(Weather),
    Throttle(Option<f64>),
    ApiServer(bool),
    Latency(Duration),
    /// What the API server takes for a token.
    TokenLatency(Duration),
    /// What it takes to judge a token.
    Judging(Duration),
    /// To another agent, once everybody has been answered.
    HandOver,
}

/// What a caller saw.
struct Seen {
    pod: PodUid,
    /// When it waited for nothing but credentials any more.
    waits_from: TokioInstant,
    at: TokioInstant,
    /// The same by the node's clock, which may have been set.
    now: Timestamp,
    /// Whether it sent a token that is forged, and nobody vouches for it.
    forged: bool,
    /// Whether only EKS Auth itself could serve it.
    by_token: bool,
    answer: Result<Arc<Credentials>, Error>,
}

/// Where nobody can judge a pod's token but EKS Auth, it is one more call for the pod.
struct ByToken {
    pod: PodUid,
    digest: TokenDigest,
    from: TokioInstant,
    /// Whether whoever sent it has been answered.
    answered: Rc<Cell<bool>>,
    until: Option<TokioInstant>,
}

/// The engine in its world, and whoever asks it.
struct World {
    upstream: Arc<FakeUpstream>,
    engine: TestCache,
    pods: Vec<Arc<Pod>>,
    clock: Clock,
    /// Minutes by which the clock was set.
    set: Arc<AtomicI64>,
    callers: JoinSet<()>,
    seen: Rc<RefCell<Vec<Seen>>>,
    /// When pods were forgotten.
    gone: Vec<(PodUid, TokioInstant)>,
    by_token: Vec<ByToken>,
    trouble: Option<&'static str>,
    /// Whether calls may have to wait for their turn to the end, since EKS Auth has throttled.
    is_slow: bool,
}

fn event() -> impl Strategy<Value = Event> {
    let pod = 0..PODS;
    let floor = prop_oneof![Just(Floor::Imds), Just(Floor::Container)];
    let ask = (pod.clone(), 20_u64..2000, floor).prop_map(|(pod, timeout_ms, floor)| Event::Ask {
        pod,
        timeout_ms,
        floor,
    });
    let weather = prop_oneof![
        3 => Just(Weather::Fair),
        1 => Just(Weather::Down),
        1 => Just(Weather::Hangs),
        1 => Just(Weather::Says(404, "ResourceNotFoundException")),
        1 => Just(Weather::Says(503, "ServiceUnavailableException")),
    ];
    let address = prop_oneof![Just(None), Just(Some(1)), Just(Some(2))];
    let send = (pod.clone(), any::<bool>(), address);
    let send = send.prop_map(|(pod, genuine, address)| Event::Send { pod, genuine, address });
    let verdict = prop_oneof![Just(Verdict::Good), Just(Verdict::Bad("bad".into())), Just(Verdict::Unknown)];
    prop_oneof![
        12 => ask,
        6 => send,
        2 => verdict.prop_map(Event::Verdict),
        1 => (-300..300_i64).prop_map(|minutes| Event::Clock { minutes }),
        6 => (1_u64..400).prop_map(|millis| Event::Pass(Duration::from_millis(millis))),
        3 => (1_u64..90).prop_map(|minutes| Event::Pass(Duration::from_mins(minutes))),
        2 => weather.prop_map(Event::Weather),
        1 => prop_oneof![Just(None), (0.2..5.0_f64).prop_map(Some)].prop_map(Event::Throttle),
        1 => any::<bool>().prop_map(Event::ApiServer),
        1 => (1_u64..700).prop_map(|millis| Event::Latency(Duration::from_millis(millis))),
        1 => (0_u64..2000).prop_map(|millis| Event::TokenLatency(Duration::from_millis(millis))),
        1 => (0_u64..400).prop_map(|millis| Event::Judging(Duration::from_millis(millis))),
        1 => Just(Event::HandOver),
        1 => pod.clone().prop_map(Event::Prefetch),
        1 => pod.prop_map(Event::PodLifecycle),
    ]
}

// === impl World ===

impl World {
    fn new(budget: Budget) -> Self {
        let set = Arc::<AtomicI64>::default();
        let (offset, steady) = (Arc::clone(&set), virtual_clock());
        let clock: Clock = Arc::new(move || steady() + SignedDuration::from_mins(offset.load(SeqCst)));
        let upstream = FakeUpstream::new(Arc::clone(&clock));
        let (source, metrics) = (Arc::clone(&upstream), CacheMetrics::default());
        let engine = CredentialCache::start(source, budget, Arc::clone(&clock), 7, metrics);
        upstream.change(|conditions| conditions.life = SignedDuration::from_mins(60));
        Self {
            upstream,
            engine,
            pods: (0..PODS).map(|pod| Arc::new(pod_of(pod))).collect(),
            clock,
            set,
            callers: JoinSet::new(),
            seen: Rc::default(),
            gone: Vec::new(),
            by_token: Vec::new(),
            trouble: None,
            is_slow: budget != BUDGET,
        }
    }

    /// Lets somebody ask who is not waited for, after its token was judged for so long. Tells when it is answered.
    fn spawn<F>(
        &mut self,
        pod: usize,
        (forged, by_token): (bool, bool),
        judging: Duration,
        ask: impl FnOnce(TestCache, Arc<Pod>) -> F + 'static,
    ) -> Rc<Cell<bool>>
    where
        F: Future<Output = Result<Arc<Credentials>, Error>>,
    {
        let (engine, pod, seen) =
            (Arc::clone(&self.engine), Arc::clone(&self.pods[pod]), Rc::clone(&self.seen));
        let answered = Rc::<Cell<bool>>::default();
        let tell = Rc::clone(&answered);
        self.callers.spawn_local(async move {
            let waits_from = TokioInstant::now() + judging;
            let answer = ask(Arc::clone(&engine), Arc::clone(&pod)).await;
            let (at, now) = (TokioInstant::now(), engine.now());
            seen.borrow_mut().push(Seen { pod: pod.uid, waits_from, at, now, forged, by_token, answer });
            tell.set(true);
        });
        answered
    }

    fn send(&mut self, pod: usize, genuine: bool, address: Option<u8>) {
        let owner = Arc::clone(&self.pods[pod]);
        let sent = if genuine { sent_by(&owner) } else { forged(&owner) };
        let (digest, from) = (sent.token.digest(), TokioInstant::now());
        let is_known = self.engine.whose(&digest).is_some();
        let mut conditions = None;
        self.upstream.change(|now| conditions = Some(now.clone()));
        let Conditions { verdict, judging, .. } = conditions.unwrap_or_default();
        let judging = if is_known { Duration::ZERO } else { judging };
        let forged = !genuine && address.is_some();
        let by_token = genuine && address.is_some() && !is_known && verdict == Verdict::Unknown;
        let answered = self.spawn(pod, (forged, by_token), judging, async move |engine, pod| match address {
            Some(last) => engine.for_token(sent, [10, 0, 0, last].into(), within(800)).await,
            None => engine.for_pod(&pod, Some(sent), Floor::Container, within(800)).await,
        });
        if by_token {
            self.by_token.push(ByToken { pod: owner.uid, digest, from, answered, until: None });
        }
    }

    /// Notes which of the calls by token are over.
    fn look_at_tokens(&mut self) {
        let state = self.engine.lock();
        for call in self.by_token.iter_mut().filter(|call| call.until.is_none()) {
            let record = state.records.get(&Key::Token(call.digest));
            let is_under_way = record.is_some_and(|record| record.flight.is_some());
            if call.answered.get() && !is_under_way {
                call.until = Some(TokioInstant::now());
            }
        }
    }

    /// The agent ends, and another one goes on with what it has.
    async fn hand_over(&mut self) {
        while self.callers.join_next().await.is_some() {}
        let entries = self.engine.to_transfer();
        // What it has under way ends with it.
        self.engine.lock().records.clear();
        tokio::task::yield_now().await;
        let (source, metrics) = (Arc::clone(&self.upstream), CacheMetrics::default());
        self.engine = CredentialCache::start(source, BUDGET, Arc::clone(&self.clock), 8, metrics);
        let known = Pods::default();
        for pod in &self.pods {
            known.insert(pod);
        }
        self.engine.hold(entries.clone());
        self.engine.adopt(&known);
        let ready = self.engine.ready.pin();
        let has = |entry: &Transferred| {
            ready.get(&entry.pod).is_some_and(|ready| Arc::ptr_eq(&ready.credentials, &entry.credentials))
        };
        if !entries.iter().all(has) {
            self.trouble = Some("something that was handed over is lost");
        }
    }

    async fn happen(&mut self, event: Event) {
        let upstream = Arc::clone(&self.upstream);
        self.look_at_tokens();
        match event {
            Event::Ask { pod, timeout_ms, floor } => {
                self.spawn(pod, (false, false), Duration::ZERO, async move |engine, pod| {
                    engine.for_pod(&pod, None, floor, within(timeout_ms)).await
                });
                tokio::task::yield_now().await;
            }
            Event::Send { pod, genuine, address } => {
                self.send(pod, genuine, address);
                tokio::task::yield_now().await;
            }
            Event::Verdict(verdict) => upstream.change(|conditions| conditions.verdict = verdict),
            Event::Clock { minutes } => {
                // Who has been answered by now looks at what it got by the clock as it was.
                for _ in 0..SETTLED {
                    tokio::task::yield_now().await;
                }
                self.set.fetch_add(minutes, SeqCst);
            }
            Event::Prefetch(pod) => self.engine.prefetch(&self.pods[pod]),
            Event::PodLifecycle(pod) => {
                let uid = self.pods[pod].uid;
                self.gone.push((uid, TokioInstant::now()));
                self.engine.forget(uid).await;
                if self.engine.ready.pin().contains_key(&uid)
                    || self.engine.lock().records.contains_key(&Key::Pod(uid))
                {
                    self.trouble = Some("something is left of a pod that is gone");
                }
            }
            Event::Pass(time) => sleep(time).await,
            Event::Weather(weather) => upstream.change(|conditions| conditions.weather = weather),
            Event::Throttle(rate) => {
                self.is_slow |= rate.is_some();
                upstream.change(|conditions| conditions.throttle = rate);
            }
            Event::ApiServer(is_there) => upstream.change(|conditions| conditions.api_server = is_there),
            Event::Latency(latency) => upstream.change(|conditions| conditions.latency = latency),
            Event::TokenLatency(latency) => {
                upstream.change(|conditions| conditions.token_latency = latency);
            }
            Event::Judging(time) => upstream.change(|conditions| conditions.judging = time),
            Event::HandOver => self.hand_over().await,
        }
    }

    /// After ten minutes of fair weather everything is as if nothing had happened.
    async fn recover(&mut self) {
        while self.callers.join_next().await.is_some() {}
        let conditions = Conditions { life: SignedDuration::from_mins(60), ..Conditions::default() };
        self.upstream.change(|upstream| *upstream = conditions);
        for _ in 0..60 {
            sleep(Duration::from_secs(10)).await;
            for pod in &self.pods {
                let _ = get(&self.engine, pod).await;
            }
        }
        for pod in &self.pods {
            if get(&self.engine, pod).await.is_err() {
                self.trouble = Some("a pod is not served in fair weather");
            }
        }
        if !self.is_slow {
            self.probe().await;
        }
    }

    async fn probe(&mut self) {
        // EKS Auth is known to be there.
        if get(&self.engine, &Arc::new(pod_of(PODS))).await.is_err() {
            self.trouble = Some("a new pod is not served in fair weather");
        }
        // A lost answer is made up for at once, and a refusal told at once.
        let (lost, refused) = (Arc::new(pod_of(PODS)), Arc::new(pod_of(PODS)));
        self.upstream.change(|conditions| conditions.weather = Weather::Says(500, "InternalServerException"));
        let upstream = Arc::clone(&self.upstream);
        let clears = async {
            sleep(Duration::from_millis(60)).await;
            upstream.change(|conditions| conditions.weather = Weather::Fair);
        };
        if tokio::join!(get(&self.engine, &lost), clears).0.is_err() {
            self.trouble = Some("a lost answer is not made up for");
        }
        self.upstream
            .change(|conditions| conditions.weather = Weather::Says(404, "ResourceNotFoundException"));
        let begun = TokioInstant::now();
        let answer = get(&self.engine, &refused).await;
        if answer.is_ok() || begun.elapsed() > Duration::from_millis(100) {
            self.trouble = Some("an error is not told when it is known");
        }
    }
}

fn pod_of(number: usize) -> Pod {
    pod("app", &format!("web{number}"))
}

/// It says that it is the pod's.
fn forged(pod: &Pod) -> SentToken {
    SentToken { token: Secret::from(format!("forged {}", pod.uid)), ..sent_by(pod) }
}

// === impl ByToken ===

impl ByToken {
    /// Whether it may have been under way then.
    fn is_under_way(&self, at: TokioInstant) -> bool {
        self.from <= at && self.until.is_none_or(|until| at <= until)
    }
}

/// Lets it all happen, and then the weather be fair.
async fn run(budget: Budget, events: Vec<Event>) -> World {
    let mut world = World::new(budget);
    for event in events {
        world.happen(event).await;
    }
    world.look_at_tokens();
    world.recover().await;
    world
}

fn check(budget: Budget, events: Vec<Event>) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    let World { upstream, seen, gone, by_token, trouble, .. } =
        LocalSet::new().block_on(&runtime, run(budget, events));
    let calls = upstream.calls();
    let is_by_token =
        |call: &Call| by_token.iter().any(|sent| sent.pod == call.pod && sent.is_under_way(call.came));
    let overlaps = calls.iter().any(|call| call.overlaps && !is_by_token(call));
    prop_assert!(!overlaps, "two flights for a pod");
    prop_assert!(trouble.is_none(), "{}", trouble.unwrap_or_default());
    for Seen { pod, waits_from, at, now, forged, by_token, answer } in seen.take() {
        if let Ok(credentials) = &answer {
            prop_assert!(!forged, "credentials for a forged token");
            prop_assert!(are_of(credentials, pod), "another pod's credentials");
            prop_assert!(now < credentials.expiration, "expired credentials");
        }
        // What came for its pod while it waited was its answer, at once: unless the pod was forgotten meanwhile, or it was a
        // token that brought it while the pod's own call was under way.
        let forgotten = gone.iter().any(|(uid, gone)| *uid == pod && *gone >= waits_from && *gone <= at);
        if forgotten || forged || by_token {
            continue;
        }
        let came = calls.iter().filter(|call| call.pod == pod).filter_map(|call| call.served_at);
        let mut came = came.filter(|came| *came > waits_from && *came < at);
        let missed = came.find(|came| upstream.under_way(pod, *came) == 1);
        prop_assert!(missed.is_none(), "a lost wake-up: {answer:?} although {missed:?}");
    }
    Ok(())
}

/// That of a node, or one with which most have to wait for their turn.
fn budget() -> impl Strategy<Value = Budget> {
    prop_oneof![3 => Just(BUDGET), 1 => Just(Budget { per_second: 2.0, burst: 2.0 })]
}

fn find(cases: u32) -> Result<(), String> {
    // The same runs each time, or others: `PROPTEST_RNG_SEED` says which.
    let seed = match Config::default().rng_seed {
        RngSeed::Random => RngSeed::Fixed(SEED),
        fixed @ RngSeed::Fixed(_) => fixed,
    };
    let config = Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 200,
        rng_seed: seed,
        ..Config::default()
    };
    let runs = (budget(), vec(event(), 1..60));
    let runner = TestRunner::new(config).run(&runs, |(budget, events)| check(budget, events));
    runner.map_err(|error| error.to_string())
}

#[test]
fn the_engine_keeps_its_promises_whatever_happens() {
    if let Err(error) = find(512) {
        panic!("{error}");
    }
}

#[test]
fn each_promise_that_is_broken_is_noticed() {
    for (bug, noticed) in [
        // The second one of two may also undo what the first has done.
        (Bug::TwoFlights, &["two flights for a pod", "an error is not told"][..]),
        (Bug::ExpiredOut, &["expired credentials"]),
        (Bug::Mixed, &["another pod's credentials"]),
        (Bug::LostWakeUp, &["a lost wake-up", "an error is not told"]),
        (Bug::ForgedOpens, &["credentials for a forged token"]),
        (Bug::QueueNotTold, &["a lost wake-up"]),
        (Bug::NotifyLost, &["a lost answer is not made up for"]),
        (Bug::ErrorNotTold, &["an error is not told when it is known"]),
        (Bug::ForgetLeaves, &["something is left of a pod that is gone"]),
    ] {
        plant(Some(bug));
        let found = find(512);
        plant(None);
        let error = found.err().unwrap_or_else(|| panic!("{bug:?} was not noticed"));
        assert!(noticed.iter().any(|noticed| error.contains(noticed)), "{bug:?}: {error}");
        println!("{bug:?}: {}", error.lines().next().unwrap_or_default());
    }
}
