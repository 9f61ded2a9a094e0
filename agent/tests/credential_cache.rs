//! What the cache promises, in virtual time: hours pass in seconds, and every call of EKS Auth is counted.
#![expect(clippy::unwrap_used, reason = "test code")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering::Relaxed},
    },
    time::Duration,
};

use agent::{
    credentials::{
        Clock, Credentials, Error, Floor,
        cache::{BUDGET, Budget, CredentialCache},
        metrics::CacheMetrics,
        token::Verdict,
    },
    identity::{Pod, Pods},
    testing::{
        pod,
        upstream::{FakeUpstream, Weather, are_of, sent_by, virtual_clock},
    },
};
use jiff::{SignedDuration, Timestamp};
use tokio::time::{Instant as TokioInstant, sleep, timeout};

type Answer = Result<Arc<Credentials>, Error>;

/// The cache in its virtual world.
#[derive(Clone)]
struct World {
    upstream: Arc<FakeUpstream>,
    cache: Arc<CredentialCache<Arc<FakeUpstream>>>,
    metrics: CacheMetrics,
    clock: Clock,
    /// Minutes by which the wall clock is ahead.
    ahead: Arc<AtomicI64>,
}

impl World {
    fn new(budget: Budget) -> Self {
        let (ahead, metrics) = (Arc::<AtomicI64>::default(), CacheMetrics::default());
        let (offset, steady) = (Arc::clone(&ahead), virtual_clock());
        let clock: Clock = Arc::new(move || steady() + SignedDuration::from_mins(offset.load(Relaxed)));
        let upstream = FakeUpstream::new(Arc::clone(&clock));
        let cache =
            CredentialCache::start(Arc::clone(&upstream), budget, Arc::clone(&clock), 42, metrics.clone());
        Self { upstream, cache, metrics, clock, ahead }
    }

    async fn ask(&self, pod: &Arc<Pod>) -> Answer {
        self.ask_above(Floor::Imds, pod).await
    }

    async fn ask_above(&self, floor: Floor, pod: &Arc<Pod>) -> Answer {
        let deadline = TokioInstant::now() + Duration::from_millis(800);
        let answer = self.cache.for_pod(pod, None, floor, deadline.into_std()).await;
        if let Ok(credentials) = &answer {
            assert!(are_of(credentials, pod.uid), "another pod's");
            assert!((self.clock)() < credentials.expiration, "expired");
        }
        answer
    }

    /// As SDKs do: retries every second, as long as it takes.
    async fn ask_until_served(&self, pod: &Arc<Pod>) {
        while self.ask(pod).await.is_err() {
            sleep(Duration::from_secs(1)).await;
        }
    }

    /// All of them at once.
    async fn ask_all(&self, pods: &[Arc<Pod>]) -> Vec<Answer> {
        futures::future::join_all(pods.iter().map(|pod| self.ask(pod))).await
    }

    fn calls(&self) -> usize {
        self.upstream.calls().len()
    }

    /// Calls since then, in buckets of this width.
    fn histogram(&self, since: Timestamp, width: Duration) -> Vec<usize> {
        let mut bars = Vec::new();
        for call in self.upstream.calls().iter().filter(|call| call.at >= since) {
            let passed = call.at.duration_since(since).unsigned_abs().as_millis();
            let bar = usize::try_from(passed / width.as_millis()).unwrap();
            bars.resize(bars.len().max(bar + 1), 0);
            bars[bar] += 1;
        }
        bars
    }
}

fn pods(count: usize) -> Vec<Arc<Pod>> {
    (0..count).map(|n| Arc::new(pod("app", &format!("web{n}")))).collect()
}

#[tokio::test(start_paused = true)]
async fn a_cold_node_makes_one_call_a_pod() {
    let five_percent = (1..=20).map(|seed| (50, seed));
    for (errors_per_mille, seed) in std::iter::once((0, 0)).chain(five_percent) {
        let (world, pods) = (World::new(BUDGET), pods(250));
        world.upstream.change(|conditions| {
            (conditions.errors_per_mille, conditions.seed) = (errors_per_mille, seed);
        });
        let asks = pods.iter().flat_map(|pod| std::iter::repeat_n(pod, 8));
        let answers = futures::future::join_all(asks.map(|pod| world.ask(pod))).await;
        let at_once = answers.iter().filter(|answer| answer.is_ok()).count();
        let errors = world.upstream.calls().iter().filter(|call| call.served_at.is_none()).count();
        println!(
            "250 pods x 8 callers, errors {errors_per_mille} per mille, seed {seed}: {} calls, {errors} lost, \
             {at_once} served at their first attempt",
            world.calls()
        );
        // Callers that lost three answers in a row see the error, and are served when they retry.
        let calls = world.upstream.calls();
        let is_served =
            |pod: &Arc<Pod>| calls.iter().any(|call| call.pod == pod.uid && call.served_at.is_some());
        let told: Vec<_> = pods.iter().filter(|pod| !is_served(pod)).collect();
        assert!(told.len() <= 1, "{} of 250: one in 8000 has so much bad luck", told.len());
        assert_eq!(at_once, 2000 - 8 * told.len(), "seed {seed}");
        let expected = if errors_per_mille == 0 { 0..=0 } else { 3..=30 };
        assert!(expected.contains(&errors), "{errors}");
        let again = told.iter().map(|pod| timeout(Duration::from_secs(5), world.ask_until_served(pod)));
        assert!(futures::future::join_all(again).await.iter().all(Result::is_ok), "seed {seed}");
        let served = world.upstream.calls().iter().filter(|call| call.served_at.is_some()).count();
        assert_eq!((served, world.upstream.overlaps()), (250, 0), "seed {seed}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_floor_of_each_caller_decides_whether_it_is_served_from_cache() {
    for (minutes_left, floor, is_cached) in [
        (31, Floor::Imds, true),
        (29, Floor::Imds, false),
        (25, Floor::Imds, false),
        (25, Floor::Container, true),
        (21, Floor::Container, true),
        (19, Floor::Container, false),
    ] {
        let (world, pod) = (World::new(BUDGET), Arc::new(pod("app", "web")));
        let first = world.ask(&pod).await.unwrap();
        world.ahead.store(6 * 60 - minutes_left, Relaxed);
        let begun = TokioInstant::now();
        let second = world.ask_above(floor, &pod).await.unwrap();
        let answer = (second.access_key_id == first.access_key_id, begun.elapsed().is_zero(), world.calls());
        let calls = if is_cached { 1 } else { 2 };
        assert_eq!(answer, (is_cached, is_cached, calls), "{minutes_left} min left, {floor:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_caller_with_a_token_has_the_container_floor() {
    for (minutes_left, is_cached) in [(25, true), (19, false)] {
        let (world, pod) = (World::new(BUDGET), Arc::new(pod("app", "web")));
        world.upstream.change(|conditions| conditions.verdict = Verdict::Valid);
        let first = world.ask(&pod).await.unwrap();
        world.ahead.store(6 * 60 - minutes_left, Relaxed);
        let deadline = TokioInstant::now() + Duration::from_millis(800);
        let second = world.cache.for_token(sent_by(&pod), [10, 0, 0, 9].into(), deadline.into_std()).await;
        assert_eq!(
            second.unwrap().access_key_id == first.access_key_id,
            is_cached,
            "{minutes_left} min left"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn callers_that_hang_up_leave_the_answer_to_the_next() {
    let (world, pods) = (World::new(BUDGET), pods(250));
    world.upstream.change(|conditions| conditions.latency = Duration::from_millis(300));
    let asks = pods.iter().flat_map(|pod| std::iter::repeat_n(pod, 8));
    let asks = asks.map(|pod| timeout(Duration::from_millis(100), world.ask(pod)));
    assert!(futures::future::join_all(asks).await.iter().all(Result::is_err), "all have hung up");
    sleep(Duration::from_millis(300)).await;
    let begun = TokioInstant::now();
    let answers = world.ask_all(&pods).await;
    println!("250 pods x 8 callers hang up after 100 of 300 ms, then 250 again: {} calls", world.calls());
    assert!(answers.iter().all(Result::is_ok) && begun.elapsed().is_zero());
    assert_eq!(world.calls(), 250);
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_gives_up_and_tries_again_is_served_by_the_first_call() {
    let (world, pods) = (World::new(BUDGET), pods(1));
    world.upstream.change(|conditions| conditions.latency = Duration::from_secs(3));
    let begun = TokioInstant::now();
    world.ask_until_served(&pods[0]).await;
    println!("upstream takes 3 s: served after {:?}, {} call", begun.elapsed(), world.calls());
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(world.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn two_thousand_refreshes_due_together_are_spread_and_none_expires() {
    let world = World::new(Budget { per_second: 10.0, burst: 2500.0 });
    let pods = pods(2000);
    assert!(world.ask_all(&pods).await.iter().all(Result::is_ok));
    assert!(world.ask_all(&pods).await.iter().all(Result::is_ok), "they are in use");
    // The node was suspended for four and a half hours: all are due.
    world.ahead.store(270, Relaxed);
    let since = (world.clock)();
    let mut failed = 0;
    for _ in 0..36 {
        sleep(Duration::from_secs(10)).await;
        failed += world.ask_all(&pods).await.iter().filter(|answer| answer.is_err()).count();
    }
    let bars = world.histogram(since, Duration::from_secs(10));
    println!("2000 due at once, budget 10/s; calls in each 10 s: {bars:?}");
    assert_eq!((failed, world.calls()), (0, 4000), "none has expired, each was fetched once more");
    assert!(bars.iter().all(|bar| *bar <= 101), "never above the budget: {bars:?}");
    let busy: Vec<_> = bars.iter().skip_while(|bar| **bar < 90).take(19).collect();
    assert!(busy.len() == 19 && busy.iter().all(|bar| **bar >= 99), "flat while there is work: {bars:?}");
}

#[tokio::test(start_paused = true)]
async fn two_thousand_stale_pods_give_way_to_pods_without_credentials() {
    let world = World::new(Budget { per_second: 10.0, burst: 20.0 });
    let (pods, cold) = (pods(2000), pods(100));
    futures::future::join_all(pods.iter().map(|pod| world.ask_until_served(pod))).await;
    // The node was suspended: they have 16 to 20 minutes left, and are below the floor.
    world.ahead.store(340, Relaxed);
    let since = (world.clock)();
    let crowd = world.clone();
    let asks = tokio::spawn(async move {
        let mut failed = 0;
        for _ in 0..150 {
            failed += crowd.ask_all(&pods).await.iter().filter(|answer| answer.is_err()).count();
            sleep(Duration::from_secs(2)).await;
        }
        failed
    });
    sleep(Duration::from_secs(3)).await;
    let begun = TokioInstant::now();
    futures::future::join_all(cold.iter().map(|pod| world.ask_until_served(pod))).await;
    let took = begun.elapsed();
    let failed = asks.await.unwrap();
    let bars = world.histogram(since, Duration::from_secs(10));
    println!("2000 with 16 to 20 min left, 100 cold: {took:?} (ideal 8 s); calls in each 10 s: {bars:?}");
    assert!(took <= Duration::from_secs(12), "{took:?}");
    assert_eq!((failed, world.calls()), (0, 4100), "none has expired, each was fetched once more");
    assert!(bars.iter().all(|bar| *bar <= 121), "never above the budget: {bars:?}");
}

#[tokio::test(start_paused = true)]
async fn half_an_hour_without_eks_auth_is_not_noticed() {
    for weather in [Weather::Down, Weather::Hangs] {
        let (world, pods) = (World::new(BUDGET), pods(100));
        world.upstream.change(|conditions| conditions.life = SignedDuration::from_mins(60));
        for pod in &pods {
            world.ask(pod).await.unwrap();
            sleep(Duration::from_secs(13)).await;
        }
        let (mut requests, before) = (0, world.calls());
        world.upstream.change(|conditions| conditions.weather = weather);
        for _ in 0..60 {
            sleep(Duration::from_secs(30)).await;
            let answers = world.ask_all(&pods).await;
            requests += answers.len();
            assert!(answers.iter().all(Result::is_ok), "a request failed");
        }
        println!(
            "EKS Auth {weather:?} for 30 min: {requests} requests, 0 failed, {} below the floor, {} calls",
            world.metrics.below_floor.get(),
            world.calls() - before
        );
        assert!(world.calls() - before < 1200, "it is left in peace");
    }
}

#[tokio::test(start_paused = true)]
async fn after_expiration_in_an_outage_errors_and_recovery_are_quick() {
    let few_or_many = [1, 2, 250].into_iter();
    for (weather, count) in few_or_many.flat_map(|count| [(Weather::Down, count), (Weather::Hangs, count)]) {
        let (world, pods) = (World::new(BUDGET), pods(count));
        world.upstream.change(|conditions| conditions.life = SignedDuration::from_mins(60));
        assert!(world.ask_all(&pods).await.iter().all(Result::is_ok));
        world.upstream.change(|conditions| conditions.weather = weather);
        for _ in 0..61 {
            sleep(Duration::from_mins(1)).await;
            world.ask_all(&pods).await;
        }
        let mut slowest = Duration::ZERO;
        for _ in 0..30 {
            let begun = TokioInstant::now();
            for answer in world.ask_all(&pods).await {
                let error = answer.unwrap_err();
                assert!(matches!(error, Error::Unreachable { .. }), "{error}");
            }
            slowest = slowest.max(begun.elapsed());
            sleep(Duration::from_millis(500)).await;
        }
        let (since, begun) = ((world.clock)(), TokioInstant::now());
        world.upstream.change(|conditions| conditions.weather = Weather::Fair);
        let recovered = async |pod: &Arc<Pod>| {
            while world.ask(pod).await.is_err() {
                sleep(Duration::from_millis(200)).await;
            }
            begun.elapsed()
        };
        let all = futures::future::join_all(pods.iter().map(recovered)).await;
        let last = all.iter().max().unwrap();
        let bars = world.histogram(since, Duration::from_millis(100));
        println!(
            "EKS Auth {weather:?} past expiry: refused within {slowest:?}, all {count} back after {last:?}"
        );
        println!("  calls in each 100 ms since its return: {bars:?}");
        assert!(slowest <= Duration::from_millis(100));
        assert!(*last <= Duration::from_secs(5));
        assert!(bars.iter().sum::<usize>() <= count + 5, "one call a pod: {bars:?}");
        let grows = bars.windows(2).all(|pair| pair[1] <= 5 * pair[0].max(4));
        assert!(grows, "no stampede: {bars:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn throttled_to_one_call_a_second_a_cold_node_is_fair_and_quick() {
    for retry_after in [None, Some(Duration::from_secs(1))] {
        let (world, pods) = (World::new(BUDGET), pods(250));
        world.upstream.change(|conditions| {
            (conditions.throttle, conditions.retry_after) = (Some(1.0), retry_after);
        });
        let begun = TokioInstant::now();
        let served = async |pod: &Arc<Pod>| {
            world.ask_until_served(pod).await;
            begun.elapsed()
        };
        futures::future::join_all(pods.iter().map(served)).await;
        let took = begun.elapsed();
        let calls = world.upstream.calls();
        let order: Vec<_> =
            calls.iter().filter(|call| call.served_at.is_some()).map(|call| call.pod).collect();
        let expected: Vec<_> = pods.iter().map(|pod| pod.uid).collect();
        let displaced = order
            .iter()
            .enumerate()
            .map(|(place, uid)| expected.iter().position(|other| other == uid).unwrap().abs_diff(place));
        let displaced = displaced.max().unwrap();
        let throttled = calls.len() - order.len();
        println!(
            "throttled to 1/s, Retry-After {retry_after:?}: {took:?} (ideal 250 s), {throttled} throttled, out of order by {displaced} at most"
        );
        assert!(took <= Duration::from_secs(275));
        assert!(throttled <= 300, "about one for each that is let through: {throttled}");
        assert_eq!(order.len(), 250);
        assert!(displaced <= 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_without_association_that_asks_all_the_time_disturbs_nobody() {
    let world = World::new(BUDGET);
    let (others, noisy) = (pods(50), Arc::new(pod("app", "without")));
    world.upstream.change(|conditions| conditions.weather = Weather::Says(404, "ResourceNotFoundException"));
    assert!(world.ask(&noisy).await.is_err());
    world.upstream.change(|conditions| conditions.weather = Weather::Fair);
    let (crowd, asks) = (world.clone(), Arc::clone(&noisy));
    // The association stays missing.
    let upstream = Arc::clone(&world.upstream);
    let refusals = tokio::spawn(async move {
        let mut refused = 0;
        for _ in 0..60_000 {
            upstream
                .change(|conditions| conditions.weather = Weather::Says(404, "ResourceNotFoundException"));
            refused += usize::from(crowd.ask(&asks).await.is_err());
            upstream.change(|conditions| conditions.weather = Weather::Fair);
            sleep(Duration::from_millis(1)).await;
        }
        refused
    });
    sleep(Duration::from_secs(5)).await;
    let begun = TokioInstant::now();
    for pod in &others {
        world.ask_until_served(pod).await;
    }
    let took = begun.elapsed();
    assert_eq!(refusals.await.unwrap(), 60_000);
    let noisy_calls = world.upstream.calls().iter().filter(|call| call.pod == noisy.uid).count();
    println!(
        "1000 requests a second without association for a minute: {noisy_calls} calls; 50 others took {took:?}"
    );
    assert!(noisy_calls <= 5);
    assert!(took <= Duration::from_millis(50 * 51));
}

#[tokio::test(start_paused = true)]
async fn known_pods_need_no_api_server_and_new_ones_are_told_to_retry() {
    let world = World::new(BUDGET);
    let (known, new) = (pods(50), pods(20));
    assert!(world.ask_all(&known).await.iter().all(Result::is_ok));
    world.upstream.change(|conditions| conditions.api_server = false);
    let before = world.calls();
    for _ in 0..60 {
        sleep(Duration::from_secs(10)).await;
        assert!(world.ask_all(&known).await.iter().all(Result::is_ok));
        let answers = world.ask_all(&new).await;
        assert!(answers.iter().all(|answer| matches!(answer, Err(Error::Token { .. }))));
    }
    assert_eq!(world.calls(), before, "EKS Auth has not been asked without a token");
    world.upstream.change(|conditions| conditions.api_server = true);
    let begun = TokioInstant::now();
    futures::future::join_all(new.iter().map(|pod| world.ask_until_served(pod))).await;
    println!(
        "API server unavailable for 10 min: known pods served; 20 new ones {:?} after its return",
        begun.elapsed()
    );
    // They had asked every ten seconds, and each of them tries again after thirty at the latest; one is enough.
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[tokio::test(start_paused = true)]
async fn after_a_crash_a_full_node_is_fetched_again_under_its_budget() {
    for (budget, longest) in [(Budget { per_second: 10.0, burst: 20.0 }, 200), (BUDGET, 50)] {
        let (world, pods) = (World::new(budget), pods(250));
        let since = (world.clock)();
        for pod in &pods {
            world.cache.prefetch(pod);
        }
        // Twenty of them ask meanwhile, and are served first.
        let begun = TokioInstant::now();
        assert!(world.ask_all(&pods[230..]).await.iter().all(Result::is_ok));
        println!("20 of 250 asked while all are prefetched: served after {:?}", begun.elapsed());
        assert!(begun.elapsed() <= Duration::from_millis(longest));
        sleep(Duration::from_secs(30)).await;
        let bars = world.histogram(since, Duration::from_secs(1));
        println!("250 prefetched, {budget:?}; calls in each second: {bars:?}");
        assert!(bars.iter().skip(2).all(|bar| *bar <= 11), "{bars:?}");
        assert_eq!(world.calls(), 250);
    }
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_of_a_full_node_causes_no_extra_calls() {
    let (world, pods) = (World::new(BUDGET), pods(250));
    assert!(world.ask_all(&pods).await.iter().all(Result::is_ok));
    assert!(world.ask_all(&pods).await.iter().all(Result::is_ok), "they are in use");
    sleep(Duration::from_hours(1)).await;
    let known = Pods::default();
    for pod in &pods {
        known.insert(pod);
    }
    let mut next = world.clone();
    next.cache = CredentialCache::start(
        Arc::clone(&world.upstream),
        BUDGET,
        Arc::clone(&world.clock),
        43,
        next.metrics.clone(),
    );
    let (since, before) = ((world.clock)(), world.calls());
    next.cache.stage(world.cache.to_transfer());
    for pod in &pods {
        next.cache.prefetch(pod);
    }
    next.cache.adopt(&known);
    drop(world);
    for _ in 0..100 {
        sleep(Duration::from_mins(1)).await;
        assert!(next.ask_all(&pods).await.iter().all(Result::is_ok));
    }
    assert_eq!(next.calls(), before, "none in the first 100 minutes");
    sleep(Duration::from_hours(2)).await;
    let bars = next.histogram(since, Duration::from_mins(10));
    println!("upgraded after an hour with 250 pods in use: calls in each 10 min since: {bars:?}");
    assert_eq!((next.calls() - before, next.metrics.transferred.get()), (250, 250));
    assert!(bars.iter().all(|bar| *bar <= 60), "spread: {bars:?}");
}
