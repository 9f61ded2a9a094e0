//! The engine against a model of what it promises, whatever happens in whatever order; and the model against bugs that are
//! planted in the engine.

use std::{
    cell::RefCell,
    rc::Rc,
    sync::atomic::{AtomicI64, Ordering::SeqCst},
};

use proptest::{
    collection::vec,
    test_runner::{Config, TestCaseError, TestRunner},
};
use tokio::task::{JoinSet, LocalSet};

use super::*;
use crate::{
    credentials::engine::planted::{Bug, plant},
    identity::PodUid,
    secret::Secret,
};

const PODS: usize = 3;

/// Something that happens.
#[derive(Clone, Debug)]
enum Event {
    Ask {
        pod: usize,
        patience_ms: u64,
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
    Forget(usize),
    Pass(Duration),
    Weather(Weather),
    Throttle(Option<f64>),
    ApiServer(bool),
    Latency(Duration),
}

/// What a caller saw.
struct Seen {
    pod: PodUid,
    asked_at: Timestamp,
    at: Timestamp,
    /// Whether it sent a token that is forged, and nobody vouches for it.
    forged: bool,
    answer: Result<Arc<Credentials>, Error>,
}

/// The engine in its world, and whoever asks it.
struct World {
    upstream: Arc<FakeUpstream>,
    engine: TestEngine,
    pods: Vec<Arc<Pod>>,
    /// Minutes by which the clock was set.
    set: Arc<AtomicI64>,
    callers: JoinSet<()>,
    seen: Rc<RefCell<Vec<Seen>>>,
    /// When pods were forgotten.
    gone: Vec<(PodUid, Timestamp)>,
    trouble: Option<&'static str>,
    /// Whether calls may have to wait for their turn to the end, since EKS Auth has throttled.
    is_slow: bool,
}

fn event() -> impl Strategy<Value = Event> {
    let pod = 0..PODS;
    let floor = prop_oneof![Just(Floor::Imds), Just(Floor::Container)];
    let ask = (pod.clone(), 20_u64..2000, floor).prop_map(|(pod, patience_ms, floor)| Event::Ask {
        pod,
        patience_ms,
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
        1 => pod.clone().prop_map(Event::Prefetch),
        1 => pod.prop_map(Event::Forget),
    ]
}

// === impl World ===

impl World {
    fn new() -> Self {
        let set = Arc::<AtomicI64>::default();
        let (offset, steady) = (Arc::clone(&set), virtual_clock());
        let clock: Clock = Arc::new(move || steady() + SignedDuration::from_mins(offset.load(SeqCst)));
        let (upstream, engine) = engine_at(clock);
        upstream.change(|conditions| conditions.life = SignedDuration::from_mins(60));
        let pods = (0..PODS).map(|pod| Arc::new(pod_of(pod))).collect();
        let (callers, seen) = (JoinSet::new(), Rc::default());
        Self { upstream, engine, pods, set, callers, seen, gone: Vec::new(), trouble: None, is_slow: false }
    }

    /// Lets somebody ask who is not waited for.
    fn spawn<F>(&mut self, pod: usize, forged: bool, ask: impl FnOnce(TestEngine, Arc<Pod>) -> F + 'static)
    where
        F: Future<Output = Result<Arc<Credentials>, Error>>,
    {
        let (engine, pod, seen) =
            (Arc::clone(&self.engine), Arc::clone(&self.pods[pod]), Rc::clone(&self.seen));
        self.callers.spawn_local(async move {
            let asked_at = engine.now();
            let answer = ask(Arc::clone(&engine), Arc::clone(&pod)).await;
            seen.borrow_mut().push(Seen { pod: pod.uid, asked_at, at: engine.now(), forged, answer });
        });
    }

    async fn happen(&mut self, event: Event) {
        let upstream = Arc::clone(&self.upstream);
        match event {
            Event::Ask { pod, patience_ms, floor } => {
                self.spawn(pod, false, async move |engine, pod| {
                    engine.for_pod(&pod, None, floor, within(patience_ms)).await
                });
                tokio::task::yield_now().await;
            }
            Event::Send { pod, genuine, address } => {
                let sent = if genuine { sent_by(&self.pods[pod]) } else { forged(&self.pods[pod]) };
                self.spawn(pod, !genuine && address.is_some(), async move |engine, pod| match address {
                    Some(last) => engine.for_token(sent, [10, 0, 0, last].into(), within(800)).await,
                    None => engine.for_pod(&pod, Some(sent), Floor::Container, within(800)).await,
                });
                tokio::task::yield_now().await;
            }
            Event::Verdict(verdict) => upstream.change(|conditions| conditions.verdict = verdict),
            Event::Clock { minutes } => {
                self.set.fetch_add(minutes, SeqCst);
            }
            Event::Prefetch(pod) => self.engine.prefetch(&self.pods[pod]),
            Event::Forget(pod) => {
                let uid = self.pods[pod].uid;
                self.gone.push((uid, self.engine.now()));
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

/// Lets it all happen, and then the weather be fair.
async fn run(events: Vec<Event>) -> World {
    let mut world = World::new();
    for event in events {
        world.happen(event).await;
    }
    world.recover().await;
    world
}

fn check(events: Vec<Event>) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    let clock_was_set = events.iter().any(|event| matches!(event, Event::Clock { .. }));
    // Where nobody can judge a token but EKS Auth, it is one more call for the pod.
    let by_token =
        events.iter().any(|event| matches!(event, Event::Send { genuine: true, address: Some(_), .. }));
    let World { upstream, seen, gone, trouble, .. } = LocalSet::new().block_on(&runtime, run(events));
    prop_assert!(by_token || upstream.overlaps() == 0, "two flights for a pod");
    prop_assert!(trouble.is_none(), "{}", trouble.unwrap_or_default());
    for Seen { pod, asked_at, at, forged, answer } in seen.take() {
        if let Ok(credentials) = &answer {
            prop_assert!(!forged, "credentials for a forged token");
            prop_assert!(are_of(credentials, pod), "another pod's credentials");
            prop_assert!(at < credentials.expiration, "expired credentials");
        }
        // What came for its pod while it waited was its answer, at once, if the pod was not forgotten meanwhile.
        let came = upstream.calls().into_iter().filter(|call| call.pod == pod);
        let came = came.filter_map(|call| call.served_at).find(|came| *came >= asked_at && *came < at);
        let forgotten = gone.iter().any(|(uid, gone)| *uid == pod && *gone >= asked_at && *gone <= at);
        let excused = forgotten || forged || by_token || clock_was_set;
        prop_assert!(came.is_none() || excused, "a lost wake-up: {answer:?} although {came:?}");
    }
    Ok(())
}

fn find(cases: u32) -> Result<(), String> {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 200, ..Config::default() };
    let runner = TestRunner::new(config).run(&vec(event(), 1..60), check);
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
