//! What callers and operators learn when something fails, and what it costs.

use super::*;

#[tokio::test(start_paused = true)]
async fn an_outage_that_is_over_is_no_longer_reported() {
    let (upstream, cache) = cache();
    upstream.change(|conditions| conditions.weather = Weather::Says(500, "InternalServerException"));
    let pods: Vec<_> = (0..4).map(|_| Arc::new(pod("app", "web"))).collect();
    for (pod, request_id) in pods.iter().zip(["r", "", "", ""]) {
        let Err(Error::Service(error)) = get(&cache, pod).await else { panic!("served") };
        assert_eq!(
            (error.status, &*error.request_id),
            (500, request_id),
            "the first one's request is its own"
        );
    }

    upstream.change(|conditions| conditions.weather = Weather::Fair);
    sleep(Duration::from_secs(3)).await;
    get(&cache, &pods[0]).await.unwrap();
    upstream.change(|conditions| conditions.latency = Duration::from_secs(3));
    let answer = get(&cache, &Arc::new(pod("app", "later"))).await;
    assert!(matches!(answer, Err(Error::Slow(_))), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn a_refused_token_is_dropped_and_the_next_one_tried_at_once() {
    let (upstream, cache) = cache();
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| conditions.bad_tokens = true);
    let answer = get(&cache, &pod).await;
    assert!(
        matches!(&answer, Err(Error::Service(error)) if error.code == "InvalidTokenException"),
        "{answer:?}"
    );
    assert_eq!((upstream.bad_tokens(), upstream.token_requests()), (2, 2), "one more, and no third");

    upstream.change(|conditions| conditions.bad_tokens = false);
    sleep(Duration::from_secs(11)).await;
    get(&cache, &pod).await.unwrap();
    assert_eq!(
        (upstream.bad_tokens(), upstream.token_requests()),
        (3, 3),
        "the second bad one was cached until now"
    );
    get(&cache, &pod).await.unwrap();
    assert_eq!(upstream.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_call_with_the_next_token_waits_and_its_caller_learns_why() {
    let clock = virtual_clock();
    let upstream = FakeUpstream::new(Arc::clone(&clock));
    let one_call = Budget { per_second: 0.1, burst: 1.0 };
    let cache = CredentialCache::start(Arc::clone(&upstream), one_call, clock, 7, CacheMetrics::default());
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| conditions.bad_tokens = true);
    let answer = get(&cache, &pod).await;
    assert!(
        matches!(&answer, Err(Error::Service(error)) if error.code == "InvalidTokenException"),
        "{answer:?}"
    );
    upstream.change(|conditions| conditions.bad_tokens = false);
    sleep(Duration::from_secs(8)).await;
    assert_eq!((upstream.bad_tokens(), upstream.calls().len()), (1, 0), "the budget has no other call yet");
    sleep(Duration::from_secs(2)).await;
    assert_eq!((upstream.bad_tokens(), upstream.calls().len()), (1, 1));
    assert!(are_of(&get(&cache, &pod).await.unwrap(), pod.uid));
}

#[tokio::test(start_paused = true)]
async fn operators_are_warned_once_in_a_row_and_failing_pods_counted() {
    let (upstream, cache) = cache();
    upstream.change(|conditions| conditions.life = SignedDuration::from_mins(60));
    let pods: Vec<_> = (0..3).map(|_| Arc::new(pod("app", "web"))).collect();
    for pod in &pods {
        get(&cache, pod).await.unwrap();
        get(&cache, pod).await.unwrap();
    }
    let warned_and_failing = || {
        let state = cache.lock();
        let warned = state.records.values().filter(|record| record.warned).count();
        (warned, state.scheduler.count_failing(cache.now()))
    };
    assert_eq!(warned_and_failing(), (0, (0, 0)));
    upstream.change(|conditions| conditions.weather = Weather::Says(404, "ResourceNotFoundException"));
    for (minutes, expected) in [(29, (0, 0)), (30, (3, 0)), (32, (0, 3))] {
        sleep(Duration::from_mins(minutes)).await;
        for pod in &pods {
            let _ = get(&cache, pod).await;
        }
        let (warned, failing) = warned_and_failing();
        assert_eq!(failing, expected, "after {minutes} more");
        assert!(warned == 3 || expected.1 == 3, "{warned}");
    }
    sleep(Duration::from_mins(2)).await;
    let text = |cache: &TestCache| format!("{:?}", cache.metrics);
    assert!(text(&cache).contains("pods_missing: Gauge { value: 3"), "{}", text(&cache));
}

#[tokio::test(start_paused = true)]
async fn short_lived_credentials_do_not_replace_longer_lived_ones() {
    let (upstream, cache) = cache();
    let pod = Arc::new(pod("app", "web"));
    let first = get(&cache, &pod).await.unwrap();
    get(&cache, &pod).await.unwrap();
    upstream.change(|conditions| conditions.life = SignedDuration::from_mins(60));
    // It was refreshed, and no other refresh is due at once.
    sleep(Duration::from_mins(260)).await;
    let calls = upstream.calls().len();
    assert!((2..=6).contains(&calls), "{calls}");
    assert_eq!(get(&cache, &pod).await.unwrap().access_key_id, first.access_key_id);
    for _ in 0..30 {
        sleep(Duration::from_mins(10)).await;
        let credentials = get(&cache, &pod).await.unwrap();
        assert!(credentials.expiration.duration_since(cache.now()) >= SignedDuration::from_mins(30));
    }
}

#[tokio::test(start_paused = true)]
async fn credentials_that_live_longer_are_not_fetched_again_by_each_caller() {
    let (upstream, cache) = cache();
    let pod = Arc::new(pod("app", "web"));
    let first = get(&cache, &pod).await.unwrap();
    get(&cache, &pod).await.unwrap();
    upstream.change(|conditions| conditions.life = SignedDuration::from_mins(4));
    // It has 25 minutes left.
    sleep(Duration::from_mins(335)).await;
    let (calls, count_below_floor) = (upstream.calls().len(), cache.metrics.below_floor.get());
    for _ in 0..60 {
        assert_eq!(get(&cache, &pod).await.unwrap(), first);
        let by_container = cache.for_pod(&pod, None, Floor::Container, within(800)).await;
        assert_eq!(by_container.unwrap(), first);
        sleep(Duration::from_secs(1)).await;
    }
    let calls = upstream.calls().len() - calls;
    assert!((1..=2).contains(&calls), "{calls}");
    assert_eq!(
        cache.metrics.below_floor.get() - count_below_floor,
        60,
        "it is below the floor of IMDS alone"
    );
    // Nor in its last minutes, when new ones would live longer.
    sleep(Duration::from_mins(20)).await;
    for _ in 0..60 {
        let credentials = get(&cache, &pod).await.unwrap();
        assert!(credentials.expiration.duration_since(cache.now()) > SignedDuration::from_mins(1));
        sleep(Duration::from_secs(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_panicking_schedule_is_restarted() {
    let (armed, steady) = (Arc::<AtomicBool>::default(), virtual_clock());
    let panics = Arc::clone(&armed);
    let (upstream, cache) = cache_at(Arc::new(move || {
        assert!(!panics.swap(false, Relaxed), "the clock panics");
        steady()
    }));
    let pod = Arc::new(pod("app", "web"));
    get(&cache, &pod).await.unwrap();
    get(&cache, &pod).await.unwrap();
    armed.store(true, Relaxed);
    sleep(Duration::from_hours(5)).await;
    assert!(!armed.load(Relaxed), "it has panicked");
    assert_eq!(upstream.calls().len(), 2, "and refreshed");
}

#[tokio::test(start_paused = true)]
async fn slow_tokens_delay_nobody_when_eks_auth_is_back() {
    let (upstream, cache) = cache();
    upstream.change(|conditions| conditions.life = SignedDuration::from_mins(40));
    let known: Vec<_> = (0..20).map(|_| Arc::new(pod("app", "web"))).collect();
    for pod in &known {
        get(&cache, pod).await.unwrap();
    }
    upstream.change(|conditions| {
        (conditions.weather, conditions.token_latency) = (Weather::Down, Duration::from_secs(4));
    });
    let new: Vec<_> = (0..20).map(|_| Arc::new(pod("app", "new"))).collect();
    for _ in 0..45 {
        sleep(Duration::from_mins(1)).await;
        futures::future::join_all(known.iter().chain(&new).map(|pod| get(&cache, pod))).await;
    }
    // The API server hangs, too, and the pods that need it come first.
    upstream.change(|conditions| conditions.weather = Weather::Fair);
    let newer: Vec<_> = (0..20).map(|_| Arc::new(pod("app", "newer"))).collect();
    let begun = TokioInstant::now();
    let asks = newer.iter().chain(&known).map(async |pod| {
        while get(&cache, pod).await.is_err() {
            sleep(Duration::from_millis(200)).await;
        }
        begun.elapsed()
    });
    let took = futures::future::join_all(asks).await;
    let last = took[20..].iter().max().unwrap();
    assert!(*last <= Duration::from_secs(5), "the known ones were back after {last:?}");
}
