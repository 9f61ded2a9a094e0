//! The cache against a model of what it promises, whatever happens in whatever order. `agent/tests/mutants` shows that the
//! model notices broken promises.

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
    identity::{PodUid, Pods},
    secret::Secret,
    testing::upstream::Call,
};

const PODS: usize = 3;
/// The seed of the runs.
const SEED: u64 = 1;
/// After so many turns of all tasks nothing more can happen at the current time.
const SETTLED: usize = 16;

/// An event.
#[derive(Clone, Debug)]
enum Event {
    Ask {
        pod: usize,
        timeout_ms: u64,
        floor: Floor,
    },
    /// From an anonymous caller at this address, or from the pod itself.
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
    /// How long the API server takes for a token.
    TokenLatency(Duration),
    /// How long it takes to verify a token.
    Judging(Duration),
    /// To a successor, once all callers are answered.
    HandOver,
}

/// What a caller saw.
struct Seen {
    pod: PodUid,
    /// When only credentials were left to wait for.
    waits_from: TokioInstant,
    at: TokioInstant,
    /// The same by the wall clock, which may have been set.
    now: Timestamp,
    /// Whether it is anonymous and sent a forged token.
    forged: bool,
    /// Whether only EKS Auth itself could serve it.
    by_token: bool,
    answer: Result<Arc<Credentials>, Error>,
}

/// A token that only EKS Auth can verify costs one more call for its pod.
struct ByToken {
    pod: PodUid,
    digest: TokenDigest,
    from: TokioInstant,
    /// Whether its caller was answered.
    answered: Rc<Cell<bool>>,
    until: Option<TokioInstant>,
}

/// The cache, its upstream and its callers.
struct World {
    upstream: Arc<FakeUpstream>,
    cache: TestCache,
    pods: Vec<Arc<Pod>>,
    clock: Clock,
    /// Minutes by which the clock was set.
    set: Arc<AtomicI64>,
    callers: JoinSet<()>,
    seen: Rc<RefCell<Vec<Seen>>>,
    /// When pods were removed.
    removed: Vec<(PodUid, TokioInstant)>,
    by_token: Vec<ByToken>,
    trouble: Option<&'static str>,
    /// Whether calls may have to queue until the end, since EKS Auth has throttled.
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
    let verdict =
        prop_oneof![Just(Verdict::Valid), Just(Verdict::Invalid("bad".into())), Just(Verdict::Unknown)];
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
        let cache = CredentialCache::start(source, budget, Arc::clone(&clock), 7, metrics);
        upstream.change(|conditions| conditions.life = SignedDuration::from_mins(60));
        Self {
            upstream,
            cache,
            pods: (0..PODS).map(|pod| Arc::new(pod_of(pod))).collect(),
            clock,
            set,
            callers: JoinSet::new(),
            seen: Rc::default(),
            removed: Vec::new(),
            by_token: Vec::new(),
            trouble: None,
            is_slow: budget != BUDGET,
        }
    }

    /// Spawns a caller whose token takes so long to verify. The returned cell is set when it is answered.
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
        let (cache, pod, seen) =
            (Arc::clone(&self.cache), Arc::clone(&self.pods[pod]), Rc::clone(&self.seen));
        let answered = Rc::<Cell<bool>>::default();
        let notify_waiters = Rc::clone(&answered);
        self.callers.spawn_local(async move {
            let waits_from = TokioInstant::now() + judging;
            let answer = ask(Arc::clone(&cache), Arc::clone(&pod)).await;
            let (at, now) = (TokioInstant::now(), cache.now());
            seen.borrow_mut().push(Seen { pod: pod.uid, waits_from, at, now, forged, by_token, answer });
            notify_waiters.set(true);
        });
        answered
    }

    fn send(&mut self, pod: usize, genuine: bool, address: Option<u8>) {
        let owner = Arc::clone(&self.pods[pod]);
        let sent = if genuine { sent_by(&owner) } else { forged(&owner) };
        let (digest, from) = (sent.token.digest(), TokioInstant::now());
        let is_known = self.cache.pod_of_token(&digest).is_some();
        let mut conditions = None;
        self.upstream.change(|now| conditions = Some(now.clone()));
        let Conditions { verdict, judging, .. } = conditions.unwrap_or_default();
        let judging = if is_known { Duration::ZERO } else { judging };
        let forged = !genuine && address.is_some();
        let by_token = genuine && address.is_some() && !is_known && verdict == Verdict::Unknown;
        let answered = self.spawn(pod, (forged, by_token), judging, async move |cache, pod| match address {
            Some(last) => cache.for_token(sent, [10, 0, 0, last].into(), within(800)).await,
            None => cache.for_pod(&pod, Some(sent), Floor::Container, within(800)).await,
        });
        if by_token {
            self.by_token.push(ByToken { pod: owner.uid, digest, from, answered, until: None });
        }
    }

    /// Records which of the calls by token are over.
    fn look_at_tokens(&mut self) {
        let state = self.cache.lock();
        for call in self.by_token.iter_mut().filter(|call| call.until.is_none()) {
            let record = state.records.get(&Key::Token(call.digest));
            let is_under_way = record.is_some_and(|record| record.in_flight.is_some());
            if call.answered.get() && !is_under_way {
                call.until = Some(TokioInstant::now());
            }
        }
    }

    /// The agent stops, and a successor inherits its credentials.
    async fn hand_over(&mut self) {
        while self.callers.join_next().await.is_some() {}
        let entries = self.cache.to_transfer();
        // Its fetches end with it.
        self.cache.lock().records.clear();
        tokio::task::yield_now().await;
        let (source, metrics) = (Arc::clone(&self.upstream), CacheMetrics::default());
        self.cache = CredentialCache::start(source, BUDGET, Arc::clone(&self.clock), 8, metrics);
        let known = Pods::default();
        for pod in &self.pods {
            known.insert(pod);
        }
        self.cache.stage(entries.clone());
        self.cache.adopt(&known);
        let ready = self.cache.ready.pin();
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
                self.spawn(pod, (false, false), Duration::ZERO, async move |cache, pod| {
                    cache.for_pod(&pod, None, floor, within(timeout_ms)).await
                });
                tokio::task::yield_now().await;
            }
            Event::Send { pod, genuine, address } => {
                self.send(pod, genuine, address);
                tokio::task::yield_now().await;
            }
            Event::Verdict(verdict) => upstream.change(|conditions| conditions.verdict = verdict),
            Event::Clock { minutes } => {
                // Callers that were answered by now check their answer by the clock as it was.
                for _ in 0..SETTLED {
                    tokio::task::yield_now().await;
                }
                self.set.fetch_add(minutes, SeqCst);
            }
            Event::Prefetch(pod) => self.cache.prefetch(&self.pods[pod]),
            Event::PodLifecycle(pod) => {
                let uid = self.pods[pod].uid;
                self.removed.push((uid, TokioInstant::now()));
                self.cache.on_pod_deleted(uid).await;
                if self.cache.ready.pin().contains_key(&uid)
                    || self.cache.lock().records.contains_key(&Key::Pod(uid))
                {
                    self.trouble = Some("something is left of a removed pod");
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

    /// After ten minutes of fair weather everything works as if nothing had happened.
    async fn recover(&mut self) {
        while self.callers.join_next().await.is_some() {}
        let conditions = Conditions { life: SignedDuration::from_mins(60), ..Conditions::default() };
        self.upstream.change(|upstream| *upstream = conditions);
        for _ in 0..60 {
            sleep(Duration::from_secs(10)).await;
            for pod in &self.pods {
                let _ = get(&self.cache, pod).await;
            }
        }
        for pod in &self.pods {
            if get(&self.cache, pod).await.is_err() {
                self.trouble = Some("a pod is not served in fair weather");
            }
        }
        if !self.is_slow {
            self.probe().await;
        }
    }

    async fn probe(&mut self) {
        // EKS Auth is known to be there.
        if get(&self.cache, &Arc::new(pod_of(PODS))).await.is_err() {
            self.trouble = Some("a new pod is not served in fair weather");
        }
        // A lost answer is retried at once, and a refusal reported at once.
        let (lost, refused) = (Arc::new(pod_of(PODS)), Arc::new(pod_of(PODS)));
        self.upstream.change(|conditions| conditions.weather = Weather::Says(500, "InternalServerException"));
        let upstream = Arc::clone(&self.upstream);
        let clears = async {
            sleep(Duration::from_millis(60)).await;
            upstream.change(|conditions| conditions.weather = Weather::Fair);
        };
        if tokio::join!(get(&self.cache, &lost), clears).0.is_err() {
            self.trouble = Some("a lost answer is not made up for");
        }
        self.upstream
            .change(|conditions| conditions.weather = Weather::Says(404, "ResourceNotFoundException"));
        let begun = TokioInstant::now();
        let answer = get(&self.cache, &refused).await;
        if answer.is_ok() || begun.elapsed() > Duration::from_millis(100) {
            self.trouble = Some("an error is not told when it is known");
        }
    }
}

fn pod_of(number: usize) -> Pod {
    pod("app", &format!("web{number}"))
}

/// A forged token whose claims name the pod.
fn forged(pod: &Pod) -> SentToken {
    SentToken { token: Secret::from(format!("forged {}", pod.uid)), ..sent_by(pod) }
}

// === impl ByToken ===

impl ByToken {
    /// Whether it may have been running then.
    fn is_running(&self, at: TokioInstant) -> bool {
        self.from <= at && self.until.is_none_or(|until| at <= until)
    }
}

/// Runs all events, and then fair weather.
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
    let World { upstream, seen, removed, by_token, trouble, .. } =
        LocalSet::new().block_on(&runtime, run(budget, events));
    let calls = upstream.calls();
    let is_by_token =
        |call: &Call| by_token.iter().any(|sent| sent.pod == call.pod && sent.is_running(call.came));
    let overlaps = calls.iter().any(|call| call.overlaps && !is_by_token(call));
    prop_assert!(!overlaps, "two fetches for a pod");
    prop_assert!(trouble.is_none(), "{}", trouble.unwrap_or_default());
    for Seen { pod, waits_from, at, now, forged, by_token, answer } in seen.take() {
        if let Ok(credentials) = &answer {
            prop_assert!(!forged, "credentials for a forged token");
            prop_assert!(are_of(credentials, pod), "another pod's credentials");
            prop_assert!(now < credentials.expiration, "expired credentials");
        }
        // Credentials that came for its pod while it waited were its answer at once: unless the pod was removed meanwhile,
        // or a token brought them while the pod's own call was running.
        let was_removed =
            removed.iter().any(|(uid, removed)| *uid == pod && (waits_from..=at).contains(removed));
        if was_removed || forged || by_token {
            continue;
        }
        let served = calls.iter().filter(|call| call.pod == pod).filter_map(|call| call.served_at);
        let mut served = served.filter(|served| *served > waits_from && *served < at);
        let missed = served.find(|served| upstream.under_way(pod, *served) == 1);
        prop_assert!(missed.is_none(), "a lost wake-up: {answer:?} although {missed:?}");
    }
    Ok(())
}

/// The real one, or one with which most fetches have to queue.
fn budget() -> impl Strategy<Value = Budget> {
    prop_oneof![3 => Just(BUDGET), 1 => Just(Budget { per_second: 2.0, burst: 2.0 })]
}

fn find(cases: u32) -> Result<(), String> {
    // The same runs each time, unless `PROPTEST_RNG_SEED` is set.
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
fn the_cache_keeps_its_promises_whatever_happens() {
    if let Err(error) = find(512) {
        panic!("{error}");
    }
}
