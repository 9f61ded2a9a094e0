//! Fetches that land while others ask and the pod goes: on threads that truly run at once. A checker of interleavings would
//! have to know the locks of the runtime and of the table of what is cached, which are others'.

use tokio::{runtime, sync::Barrier};

use super::*;
use crate::credentials::cache::planted::plant;

const THREADS: usize = 4;
const CALLERS: usize = 6;

/// An engine that need not save calls.
fn lavish_engine() -> (Arc<FakeUpstream>, TestCache) {
    let clock = virtual_clock();
    let upstream = FakeUpstream::new(Arc::clone(&clock));
    let lavish = Budget { per_second: 1e6, burst: 1e6 };
    let engine = CredentialCache::start(Arc::clone(&upstream), lavish, clock, 7, CacheMetrics::default());
    (upstream, engine)
}

/// Runs it on threads that all have this bug, if any.
fn on_threads<T>(bug: Option<Bug>, test: impl Future<Output = T>) -> T {
    let mut threads = runtime::Builder::new_multi_thread();
    let threads = threads.worker_threads(THREADS).enable_time().on_thread_start(move || plant(bug)).build();
    plant(bug);
    let result = threads.unwrap().block_on(test);
    plant(None);
    result
}

/// Lets many ask at once for a pod whose fetch takes no time, again and again, until a pod had more than one. Tells by which
/// round.
async fn fetched_twice(rounds: u32) -> Option<u32> {
    let (upstream, engine) = lavish_engine();
    upstream.change(|conditions| conditions.latency = Duration::ZERO);
    for round in 0..rounds {
        let (pod, begin) = (Arc::new(pod("app", "web")), Arc::new(Barrier::new(CALLERS)));
        let callers = (0..CALLERS).map(|_| {
            let (engine, pod, begin) = (Arc::clone(&engine), Arc::clone(&pod), Arc::clone(&begin));
            tokio::spawn(async move {
                begin.wait().await;
                engine.for_pod(&pod, None, Floor::Imds, within(20_000)).await
            })
        });
        for caller in futures::future::join_all(callers).await {
            assert!(are_of(&caller.unwrap().unwrap(), pod.uid));
        }
        if round % 100 == 99 && upstream.calls().len() > round as usize + 1 {
            return Some(round);
        }
    }
    None
}

#[test]
fn who_asks_while_a_fetch_lands_is_served_by_it_and_an_engine_that_looks_only_once_is_found() {
    const ROUNDS: u32 = 5000;
    assert_eq!(on_threads(None, fetched_twice(ROUNDS)), None);
    let found = on_threads(Some(Bug::OneLook), fetched_twice(ROUNDS));
    println!("an engine that looks once only: found by round {found:?}");
    assert!(found.is_some());
}

#[test]
fn whatever_lands_while_a_pod_goes_everybody_is_answered_and_nothing_is_left() {
    on_threads(None, async {
        let (upstream, engine) = lavish_engine();
        for round in 0..400 {
            let begun = upstream.calls().len();
            while_it_goes(&upstream, &engine, round).await;
            let calls = &upstream.calls()[begun..];
            assert!(calls.len() <= 1, "round {round}: {calls:?}");
        }
        assert_eq!((upstream.overlaps(), engine.lock().plan.flights()), (0, 0));
    });
}

async fn while_it_goes(upstream: &Arc<FakeUpstream>, engine: &TestCache, round: u64) {
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| conditions.latency = Duration::from_micros(round % 4 * 500));
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| {
            let (engine, pod) = (Arc::clone(engine), Arc::clone(&pod));
            tokio::spawn(async move {
                let begun = Instant::now();
                let deadline = begun + Duration::from_secs(20);
                let answer = engine.for_pod(&pod, None, Floor::Imds, deadline).await;
                (answer, begun.elapsed())
            })
        })
        .collect();
    sleep(Duration::from_micros(round % 16 * 200)).await;
    engine.forget(pod.uid).await;
    for caller in callers {
        let (answer, took) = caller.await.unwrap();
        match answer {
            Ok(credentials) => assert!(are_of(&credentials, pod.uid)),
            Err(error) => assert!(matches!(error, Error::Token { .. }), "{error}"),
        }
        assert!(took < Duration::from_secs(10), "round {round}: a lost wake-up");
    }
    let state = engine.lock();
    let is_left = state.records.contains_key(&Key::Pod(pod.uid)) || engine.ready.pin().contains_key(&pod.uid);
    assert!(!is_left && state.plan.standing(pod.uid).is_none(), "round {round}");
}
