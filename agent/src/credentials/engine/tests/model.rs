//! The engine against a model of what it promises, whatever happens in whatever order; and the model against bugs that are
//! planted in the engine.

use std::{cell::RefCell, rc::Rc};

use proptest::{
    collection::vec,
    test_runner::{Config, TestCaseError, TestRunner},
};
use tokio::task::{JoinSet, LocalSet};

use super::*;
use crate::{
    credentials::engine::planted::{Bug, plant},
    identity::PodUid,
};

const PODS: usize = 3;

/// Something that happens.
#[derive(Clone, Debug)]
enum Event {
    Ask { pod: usize, patience_ms: u64, floor: Floor },
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
    answer: Result<Arc<Credentials>, Error>,
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
    prop_oneof![
        12 => ask,
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

/// Lets it all happen, and tells what was seen. `gone` are the times at which pods were forgotten.
async fn run(events: Vec<Event>) -> (Arc<FakeUpstream>, Vec<Seen>, Vec<(PodUid, Timestamp)>) {
    let (upstream, engine) = engine();
    upstream.change(|conditions| conditions.life = SignedDuration::from_mins(60));
    let pods: Vec<_> = (0..PODS).map(|pod| Arc::new(self::pod("app", &format!("web{pod}")))).collect();
    let seen = Rc::new(RefCell::new(Vec::new()));
    let mut gone = Vec::new();
    let mut callers = JoinSet::new();
    for event in events {
        match event {
            Event::Ask { pod, patience_ms, floor } => {
                let (engine, pod, seen) = (Arc::clone(&engine), Arc::clone(&pods[pod]), Rc::clone(&seen));
                callers.spawn_local(async move {
                    let asked_at = engine.now();
                    let answer = engine.for_pod(&pod, None, floor, within(patience_ms)).await;
                    seen.borrow_mut().push(Seen { pod: pod.uid, asked_at, at: engine.now(), answer });
                });
                tokio::task::yield_now().await;
            }
            Event::Prefetch(pod) => engine.prefetch(&pods[pod]),
            Event::Forget(pod) => {
                gone.push((pods[pod].uid, engine.now()));
                engine.forget(pods[pod].uid).await;
            }
            Event::Pass(time) => sleep(time).await,
            Event::Weather(weather) => upstream.change(|conditions| conditions.weather = weather),
            Event::Throttle(rate) => upstream.change(|conditions| conditions.throttle = rate),
            Event::ApiServer(is_there) => upstream.change(|conditions| conditions.api_server = is_there),
            Event::Latency(latency) => upstream.change(|conditions| conditions.latency = latency),
        }
    }
    while callers.join_next().await.is_some() {}
    let seen = seen.take();
    (upstream, seen, gone)
}

fn check(events: Vec<Event>) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    let (upstream, seen, gone) = LocalSet::new().block_on(&runtime, run(events));
    prop_assert!(upstream.overlaps() == 0, "two flights for a pod");
    for Seen { pod, asked_at, at, answer } in seen {
        if let Ok(credentials) = &answer {
            prop_assert!(are_of(credentials, pod), "another pod's credentials");
            prop_assert!(at < credentials.expiration, "expired credentials");
        }
        // What came for its pod while it waited was its answer, at once, if the pod was not forgotten meanwhile.
        let came = upstream.calls().into_iter().filter(|call| call.pod == pod);
        let came = came.filter_map(|call| call.served_at).find(|came| *came >= asked_at && *came < at);
        let forgotten = gone.iter().any(|(uid, gone)| *uid == pod && *gone >= asked_at && *gone <= at);
        prop_assert!(came.is_none() || forgotten, "a lost wake-up: {answer:?} although {came:?}");
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
        (Bug::TwoFlights, "two flights for a pod"),
        (Bug::ExpiredOut, "expired credentials"),
        (Bug::Mixed, "another pod's credentials"),
        (Bug::LostWakeUp, "a lost wake-up"),
    ] {
        plant(Some(bug));
        let found = find(512);
        plant(None);
        let error = found.err().unwrap_or_else(|| panic!("{bug:?} was not noticed"));
        assert!(error.contains(noticed), "{bug:?}: {error}");
        println!("{bug:?}: {}", error.lines().next().unwrap_or_default());
    }
}
