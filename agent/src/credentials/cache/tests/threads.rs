//! Fetches that complete while others ask and the pod is removed, on threads that run in parallel. A model checker of
//! interleavings would have to know the locks of the runtime and of the concurrent map.

use tokio::{runtime, sync::Barrier};

use super::*;

const THREADS: usize = 4;
const CALLERS: usize = 6;

/// A cache without a rate limit.
fn unlimited_cache() -> (Arc<FakeUpstream>, TestCache) {
    let clock = virtual_clock();
    let upstream = FakeUpstream::new(Arc::clone(&clock));
    let lavish = Budget { per_second: 1e6, burst: 1e6 };
    let cache = CredentialCache::start(Arc::clone(&upstream), lavish, clock, 7, CacheMetrics::default());
    (upstream, cache)
}

fn on_threads<T>(test: impl Future<Output = T>) -> T {
    let threads = runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_time().build();
    threads.unwrap().block_on(test)
}

/// Many callers ask at once for a pod whose fetch takes no time, round after round. Returns the round by which a pod was
/// fetched twice.
async fn fetched_twice(rounds: u32) -> Option<u32> {
    let (upstream, cache) = unlimited_cache();
    upstream.change(|conditions| conditions.latency = Duration::ZERO);
    for round in 0..rounds {
        let (pod, begin) = (Arc::new(pod("app", "web")), Arc::new(Barrier::new(CALLERS)));
        let callers = (0..CALLERS).map(|_| {
            let (cache, pod, begin) = (Arc::clone(&cache), Arc::clone(&pod), Arc::clone(&begin));
            tokio::spawn(async move {
                begin.wait().await;
                cache.for_pod(&pod, None, Floor::Imds, within(20_000)).await
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
fn a_caller_that_races_with_a_completing_fetch_is_served_by_it() {
    assert_eq!(on_threads(fetched_twice(5000)), None);
}

/// What the test above sees by luck: the fetch completes between the two looks of a caller.
#[test]
fn a_caller_that_waits_for_the_lock_is_served_by_the_fetch_that_had_it() {
    let calls = on_threads(async {
        let (upstream, cache) = unlimited_cache();
        let pod = Arc::new(pod("app", "web"));
        cache.for_pod(&pod, None, Floor::Imds, within(20_000)).await.unwrap();
        let caller = {
            let _completing = cache.lock();
            let ready = Arc::clone(cache.ready.pin().remove(&pod.uid).unwrap());
            let (cache_of_caller, caller) = (Arc::clone(&cache), Arc::clone(&pod));
            let caller = tokio::spawn(async move {
                cache_of_caller.for_pod(&caller, None, Floor::Imds, within(20_000)).await
            });
            // If it is not at the lock by then, it finds the credentials at its first look, and nothing is tested.
            std::thread::sleep(Duration::from_millis(200));
            cache.ready.pin().insert(pod.uid, ready);
            caller
        };
        assert!(are_of(&caller.await.unwrap().unwrap(), pod.uid));
        upstream.calls().len()
    });
    assert_eq!(calls, 1);
}

#[test]
fn fetches_that_race_with_removal_answer_everybody_and_leave_nothing() {
    on_threads(async {
        let (upstream, cache) = unlimited_cache();
        for round in 0..400 {
            let begun = upstream.calls().len();
            while_it_goes(&upstream, &cache, round).await;
            let calls = &upstream.calls()[begun..];
            assert!(calls.len() <= 1, "round {round}: {calls:?}");
        }
        assert_eq!((upstream.overlaps(), cache.lock().scheduler.in_flight()), (0, 0));
    });
}

async fn while_it_goes(upstream: &Arc<FakeUpstream>, cache: &TestCache, round: u64) {
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| conditions.latency = Duration::from_micros(round % 4 * 500));
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| {
            let (cache, pod) = (Arc::clone(cache), Arc::clone(&pod));
            tokio::spawn(async move {
                let begun = Instant::now();
                let deadline = begun + Duration::from_secs(20);
                let answer = cache.for_pod(&pod, None, Floor::Imds, deadline).await;
                (answer, begun.elapsed())
            })
        })
        .collect();
    sleep(Duration::from_micros(round % 16 * 200)).await;
    cache.on_pod_deleted(pod.uid).await;
    for caller in callers {
        let (answer, took) = caller.await.unwrap();
        match answer {
            Ok(credentials) => assert!(are_of(&credentials, pod.uid)),
            Err(error) => assert!(matches!(error, Error::Token { .. }), "{error}"),
        }
        assert!(took < Duration::from_secs(10), "round {round}: a lost wake-up");
    }
    let state = cache.lock();
    let is_left = state.records.contains_key(&Key::Pod(pod.uid)) || cache.ready.pin().contains_key(&pod.uid);
    assert!(!is_left && state.scheduler.refresh_state(pod.uid).is_none(), "round {round}");
}
