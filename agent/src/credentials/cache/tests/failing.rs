//! What callers and operators learn when something fails, and what it costs.

use super::*;

#[tokio::test(start_paused = true)]
async fn an_outage_that_is_over_is_nobody_s_answer_any_more() {
    let (upstream, engine) = engine();
    upstream.change(|conditions| conditions.weather = Weather::Says(500, "InternalServerException"));
    let pods: Vec<_> = (0..4).map(|_| Arc::new(pod("app", "web"))).collect();
    for (pod, request_id) in pods.iter().zip(["r", "", "", ""]) {
        let Err(Error::Service(error)) = get(&engine, pod).await else { panic!("served") };
        assert_eq!(
            (error.status, &*error.request_id),
            (500, request_id),
            "the first one's request is its own"
        );
    }

    upstream.change(|conditions| conditions.weather = Weather::Fair);
    sleep(Duration::from_secs(3)).await;
    get(&engine, &pods[0]).await.unwrap();
    upstream.change(|conditions| conditions.latency = Duration::from_secs(3));
    let answer = get(&engine, &Arc::new(pod("app", "later"))).await;
    assert!(matches!(answer, Err(Error::Slow(_))), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn a_token_that_eks_auth_refuses_is_dropped_and_the_next_one_tried_at_once() {
    let (upstream, engine) = engine();
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| conditions.bad_tokens = true);
    let answer = get(&engine, &pod).await;
    assert!(
        matches!(&answer, Err(Error::Service(error)) if error.code == "InvalidTokenException"),
        "{answer:?}"
    );
    assert_eq!((upstream.bad_tokens(), upstream.token_requests()), (2, 2), "one more, and no third");

    upstream.change(|conditions| conditions.bad_tokens = false);
    sleep(Duration::from_secs(11)).await;
    get(&engine, &pod).await.unwrap();
    assert_eq!(
        (upstream.bad_tokens(), upstream.token_requests()),
        (3, 3),
        "the second bad one was kept until now"
    );
    get(&engine, &pod).await.unwrap();
    assert_eq!(upstream.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_call_with_another_token_waits_for_its_turn_and_its_caller_learns_why() {
    let clock = virtual_clock();
    let upstream = FakeUpstream::new(Arc::clone(&clock));
    let one_call = Budget { per_second: 0.1, burst: 1.0 };
    let engine = CredentialCache::start(Arc::clone(&upstream), one_call, clock, 7, CacheMetrics::default());
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| conditions.bad_tokens = true);
    let answer = get(&engine, &pod).await;
    assert!(
        matches!(&answer, Err(Error::Service(error)) if error.code == "InvalidTokenException"),
        "{answer:?}"
    );
    upstream.change(|conditions| conditions.bad_tokens = false);
    sleep(Duration::from_secs(8)).await;
    assert_eq!((upstream.bad_tokens(), upstream.calls().len()), (1, 0), "the budget has no other call yet");
    sleep(Duration::from_secs(2)).await;
    assert_eq!((upstream.bad_tokens(), upstream.calls().len()), (1, 1));
    assert!(are_of(&get(&engine, &pod).await.unwrap(), pod.uid));
}

#[tokio::test(start_paused = true)]
async fn operators_are_told_once_in_a_row_and_how_many_pods_are_in_need() {
    let (upstream, engine) = engine();
    upstream.change(|conditions| conditions.life = SignedDuration::from_mins(60));
    let pods: Vec<_> = (0..3).map(|_| Arc::new(pod("app", "web"))).collect();
    for pod in &pods {
        get(&engine, pod).await.unwrap();
        get(&engine, pod).await.unwrap();
    }
    let in_need = |minutes: i64| {
        let state = engine.lock();
        let warned = state.records.values().filter(|record| record.warned).count();
        (minutes, warned, state.plan.in_need(engine.now()))
    };
    assert_eq!(in_need(0), (0, 0, (0, 0)));
    upstream.change(|conditions| conditions.weather = Weather::Says(404, "ResourceNotFoundException"));
    for (minutes, expected) in [(29, (0, 0)), (30, (3, 0)), (32, (0, 3))] {
        sleep(Duration::from_mins(minutes)).await;
        for pod in &pods {
            let _ = get(&engine, pod).await;
        }
        let (_, warned, counted) = in_need(0);
        assert_eq!(counted, expected, "after {minutes} more");
        assert!(warned == 3 || expected.1 == 3, "{warned}");
    }
    sleep(Duration::from_mins(2)).await;
    let text = |engine: &TestCache| format!("{:?}", engine.metrics);
    assert!(text(&engine).contains("pods_without: Gauge { value: 3"), "{}", text(&engine));
}

#[tokio::test(start_paused = true)]
async fn what_lives_shorter_does_not_take_the_place_of_what_lives_longer() {
    let (upstream, engine) = engine();
    let pod = Arc::new(pod("app", "web"));
    let first = get(&engine, &pod).await.unwrap();
    get(&engine, &pod).await.unwrap();
    upstream.change(|conditions| conditions.life = SignedDuration::from_mins(60));
    // The refresh has come, and another one is not due at once.
    sleep(Duration::from_mins(260)).await;
    let calls = upstream.calls().len();
    assert!((2..=6).contains(&calls), "{calls}");
    assert_eq!(get(&engine, &pod).await.unwrap().access_key_id, first.access_key_id);
    for _ in 0..30 {
        sleep(Duration::from_mins(10)).await;
        let credentials = get(&engine, &pod).await.unwrap();
        assert!(credentials.expiration.duration_since(engine.now()) >= SignedDuration::from_mins(30));
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_since_it_lives_longer_is_not_fetched_again_for_everybody_who_asks() {
    let (upstream, engine) = engine();
    let pod = Arc::new(pod("app", "web"));
    let first = get(&engine, &pod).await.unwrap();
    get(&engine, &pod).await.unwrap();
    upstream.change(|conditions| conditions.life = SignedDuration::from_mins(4));
    // 25 minutes are left of it.
    sleep(Duration::from_mins(335)).await;
    let (calls, counted) = (upstream.calls().len(), engine.metrics.below_floor.get());
    for _ in 0..60 {
        assert_eq!(get(&engine, &pod).await.unwrap(), first);
        let by_container = engine.for_pod(&pod, None, Floor::Container, within(800)).await;
        assert_eq!(by_container.unwrap(), first);
        sleep(Duration::from_secs(1)).await;
    }
    let calls = upstream.calls().len() - calls;
    assert!((1..=2).contains(&calls), "{calls}");
    assert_eq!(engine.metrics.below_floor.get() - counted, 60, "it is below the floor of IMDS alone");
    // Nor in its last minutes, when the others would live longer.
    sleep(Duration::from_mins(20)).await;
    for _ in 0..60 {
        let credentials = get(&engine, &pod).await.unwrap();
        assert!(credentials.expiration.duration_since(engine.now()) > SignedDuration::from_mins(1));
        sleep(Duration::from_secs(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_schedule_that_panics_goes_on() {
    let (upstream, engine) = engine();
    let pod = Arc::new(pod("app", "web"));
    get(&engine, &pod).await.unwrap();
    get(&engine, &pod).await.unwrap();
    planted::plant(Some(Bug::Panic));
    sleep(Duration::from_hours(5)).await;
    assert!(!planted(Bug::Panic), "it has panicked");
    assert_eq!(upstream.calls().len(), 2, "and refreshed");
}

#[tokio::test(start_paused = true)]
async fn tokens_that_are_long_in_coming_keep_nobody_waiting_when_eks_auth_is_back() {
    let (upstream, engine) = engine();
    upstream.change(|conditions| conditions.life = SignedDuration::from_mins(40));
    let known: Vec<_> = (0..20).map(|_| Arc::new(pod("app", "web"))).collect();
    for pod in &known {
        get(&engine, pod).await.unwrap();
    }
    upstream.change(|conditions| {
        (conditions.weather, conditions.token_latency) = (Weather::Down, Duration::from_secs(4));
    });
    let new: Vec<_> = (0..20).map(|_| Arc::new(pod("app", "new"))).collect();
    for _ in 0..45 {
        sleep(Duration::from_mins(1)).await;
        futures::future::join_all(known.iter().chain(&new).map(|pod| get(&engine, pod))).await;
    }
    // The API server hangs, too, and those who need it are first.
    upstream.change(|conditions| conditions.weather = Weather::Fair);
    let newer: Vec<_> = (0..20).map(|_| Arc::new(pod("app", "newer"))).collect();
    let begun = TokioInstant::now();
    let asks = newer.iter().chain(&known).map(async |pod| {
        while get(&engine, pod).await.is_err() {
            sleep(Duration::from_millis(200)).await;
        }
        begun.elapsed()
    });
    let took = futures::future::join_all(asks).await;
    let last = took[20..].iter().max().unwrap();
    assert!(*last <= Duration::from_secs(5), "the known ones were back after {last:?}");
}
