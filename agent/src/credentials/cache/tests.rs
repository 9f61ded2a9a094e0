use std::sync::atomic::AtomicI64;

use jiff::SignedDuration;
use proptest::prelude::*;
use tokio::time::sleep;

use super::*;
use crate::{
    credentials::{ServiceError, token::Verdict},
    secret::Secret,
    testing::{
        pod,
        upstream::{Conditions, FakeUpstream, Weather, are_of, sent_by, virtual_clock},
    },
};

mod failures;
mod handover;
mod model;
mod threads;

type TestCache = Arc<CredentialCache<Arc<FakeUpstream>>>;

fn cache() -> (Arc<FakeUpstream>, TestCache) {
    cache_at(virtual_clock())
}

fn cache_at(clock: Clock) -> (Arc<FakeUpstream>, TestCache) {
    let upstream = FakeUpstream::new(Arc::clone(&clock));
    let cache = CredentialCache::start(Arc::clone(&upstream), BUDGET, clock, 7, CacheMetrics::default());
    (upstream, cache)
}

fn within(millis: u64) -> Instant {
    (TokioInstant::now() + Duration::from_millis(millis)).into_std()
}

async fn get(cache: &TestCache, pod: &Arc<Pod>) -> Result<Arc<Credentials>, Error> {
    cache.for_pod(pod, None, Floor::Imds, within(800)).await
}

#[tokio::test(start_paused = true)]
async fn however_many_ask_one_call_is_made_and_shared() {
    let (upstream, cache) = cache();
    let pod = Arc::new(pod("app", "web"));
    let answers = futures::future::join_all((0..32).map(|_| get(&cache, &pod))).await;
    let first = answers[0].as_ref().unwrap().access_key_id.clone();
    assert!(answers.iter().all(|answer| answer.as_ref().unwrap().access_key_id == first));
    assert_eq!(upstream.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_error_is_shared() {
    let (upstream, cache) = cache();
    upstream.change(|conditions| conditions.weather = Weather::Says(400, "AccessDeniedException"));
    let pod = Arc::new(pod("app", "web"));
    let answers = futures::future::join_all((0..8).map(|_| get(&cache, &pod))).await;
    assert!(answers.iter().all(|answer| matches!(answer, Err(Error::Service(_)))), "{answers:?}");
    assert_eq!(upstream.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_gives_up_leaves_the_call_to_the_next_one() {
    let (upstream, cache) = cache();
    upstream.change(|conditions| conditions.latency = Duration::from_secs(3));
    let pod = Arc::new(pod("app", "web"));
    assert!(matches!(get(&cache, &pod).await, Err(Error::Slow(_))));
    assert!(tokio::time::timeout(Duration::from_millis(20), get(&cache, &pod)).await.is_err());
    sleep(Duration::from_millis(1700)).await;
    assert!(get(&cache, &pod).await.is_ok());
    assert_eq!(upstream.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn pods_of_one_service_account_have_separate_credentials() {
    let (_, cache) = cache();
    for _ in 0..2 {
        let pod = Arc::new(pod("app", "web"));
        assert!(are_of(&get(&cache, &pod).await.unwrap(), pod.uid));
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_for_another_service_account_is_not_handed_out() {
    let (_, cache) = cache();
    let web = Arc::new(pod("app", "web"));
    let other = Pod { uid: web.uid, ..pod("app", "other") };
    let answer = cache.for_pod(&web, Some(sent_by(&other)), Floor::Imds, within(800)).await;
    assert!(matches!(answer, Err(Error::Mismatch { .. })), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn credentials_fetched_by_token_serve_the_queued_callers_of_the_pod() {
    let clock = virtual_clock();
    let upstream = FakeUpstream::new(Arc::clone(&clock));
    let one_call = Budget { per_second: 0.1, burst: 1.0 };
    let cache = CredentialCache::start(Arc::clone(&upstream), one_call, clock, 7, CacheMetrics::default());
    let (web, other) = (Arc::new(pod("app", "web")), Arc::new(pod("app", "other")));
    let (by_token, waits, in_vain) = tokio::join!(
        cache.for_token(sent_by(&web), [10, 0, 0, 9].into(), within(800)),
        tokio::time::timeout(Duration::from_millis(100), get(&cache, &web)),
        get(&cache, &other),
    );
    let waits = waits.expect("it is served when the token's fetch ends").unwrap();
    assert_eq!(by_token.unwrap().access_key_id, waits.access_key_id);
    assert!(matches!(in_vain, Err(Error::Slow(_))), "there was no call left for its turn");
    // The next call is not for the pod that no longer needs one.
    sleep(Duration::from_secs(30)).await;
    let called: Vec<_> = upstream.calls().iter().map(|call| call.pod).collect();
    assert_eq!(called, [web.uid, other.uid]);
}

#[tokio::test(start_paused = true)]
async fn an_unverifiable_token_goes_to_eks_auth_and_then_opens_the_cache() {
    let (upstream, cache) = cache();
    let pod = Arc::new(pod("app", "web"));
    get(&cache, &pod).await.unwrap();
    let peer = [10, 0, 0, 9].into();
    let mut forged = sent_by(&pod);
    forged.token = Secret::from("forged");
    for _ in 0..3 {
        let answer = cache.for_token(forged.clone(), peer, within(800)).await;
        assert!(matches!(answer, Err(Error::Service(_))), "{answer:?}");
    }
    // That address has to wait now, but others do not.
    assert!(matches!(cache.for_token(sent_by(&pod), peer, within(800)).await, Err(Error::Busy)));
    for _ in 0..3 {
        let credentials = cache.for_token(sent_by(&pod), [10, 0, 0, 10].into(), within(800)).await.unwrap();
        assert!(are_of(&credentials, pod.uid));
    }
    assert_eq!(upstream.calls().len(), 2, "the pod's own, and the genuine token once");
}

#[tokio::test(start_paused = true)]
async fn a_verified_token_opens_the_cache_and_an_invalid_one_is_refused() {
    let (upstream, cache) = cache();
    let pod = Arc::new(pod("app", "web"));
    get(&cache, &pod).await.unwrap();
    let peer = [10, 0, 0, 9].into();
    upstream.change(|conditions| conditions.verdict = Verdict::Invalid("its signature is wrong".into()));
    for answer in [
        cache.for_token(sent_by(&pod), peer, within(800)).await,
        cache.for_pod(&pod, Some(sent_by(&pod)), Floor::Container, within(800)).await,
    ] {
        assert!(matches!(answer, Err(Error::BadToken { .. })), "{answer:?}");
    }
    upstream.change(|conditions| conditions.verdict = Verdict::Valid);
    cache.for_token(sent_by(&pod), peer, within(800)).await.unwrap();
    assert_eq!(upstream.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_removed_pod_leaves_nothing_not_even_a_running_call() {
    let (upstream, cache) = cache();
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| conditions.verdict = Verdict::Valid);
    cache.for_pod(&pod, Some(sent_by(&pod)), Floor::Imds, within(800)).await.unwrap();
    cache.on_cgroup_removed(pod.uid).await;
    assert!(cache.ready.is_empty() && cache.trusted.is_empty() && cache.lock().records.is_empty());

    let pod = Arc::new(self::pod("app", "web"));
    upstream.change(|conditions| conditions.weather = Weather::Hangs);
    let (answer, ()) = tokio::join!(get(&cache, &pod), async {
        sleep(Duration::from_millis(100)).await;
        cache.on_cgroup_removed(pod.uid).await;
    });
    assert!(answer.is_err());
    upstream.change(|conditions| conditions.weather = Weather::Fair);
    cache.on_cgroup_created(pod.uid);
    get(&cache, &pod).await.unwrap();
    assert_eq!(upstream.overlaps(), 0, "the call was given up");
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_cgroup_was_removed_gets_nothing_while_it_is_shown() {
    let set = Arc::<AtomicI64>::default();
    let (offset, steady) = (Arc::clone(&set), virtual_clock());
    let (upstream, cache) =
        cache_at(Arc::new(move || steady() + SignedDuration::from_mins(offset.load(Relaxed))));
    let pod = Arc::new(pod("app", "web"));
    let ask_all = async || {
        cache.prefetch(&pod);
        [
            get(&cache, &pod).await,
            cache.for_pod(&pod, Some(sent_by(&pod)), Floor::Container, within(800)).await,
            cache.for_token(sent_by(&pod), [10, 0, 0, 9].into(), within(800)).await,
        ]
    };
    upstream.change(|conditions| conditions.verdict = Verdict::Valid);
    assert!(ask_all().await.iter().all(Result::is_ok));
    cache.on_cgroup_removed(pod.uid).await;
    for (passes, clock) in [(0, 0), (2, 0), (0, 2), (0, -5), (600, 0)] {
        sleep(Duration::from_mins(passes)).await;
        set.fetch_add(clock, Relaxed);
        for answer in ask_all().await {
            assert!(matches!(answer, Err(Error::Token { .. })), "after {passes}, {clock} min: {answer:?}");
        }
    }
    assert_eq!(upstream.calls().len(), 1);
    assert!(cache.ready.is_empty() && cache.trusted.is_empty() && cache.lock().records.is_empty());

    // The kubelet restarts its containers.
    cache.on_cgroup_created(pod.uid);
    assert!(ask_all().await.iter().all(Result::is_ok));

    // The API server deletes it: what is in flight is refused for a minute.
    cache.on_cgroup_removed(pod.uid).await;
    cache.on_pod_deleted(pod.uid).await;
    sleep(absent::RETENTION / 2).await;
    assert!(ask_all().await.iter().all(Result::is_err));
    sleep(absent::RETENTION / 2).await;
    assert!(cache.for_token(sent_by(&pod), [10, 0, 0, 9].into(), within(800)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn requests_in_flight_for_a_removed_pod_bring_nothing_back() {
    let (upstream, cache) = cache();
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| {
        (conditions.verdict, conditions.judging) = (Verdict::Valid, Duration::from_millis(200));
    });
    let peer = [10, 0, 0, 9].into();
    let (known, anonymous, ()) = tokio::join!(
        cache.for_pod(&pod, Some(sent_by(&pod)), Floor::Container, within(800)),
        cache.for_token(sent_by(&pod), peer, within(800)),
        async {
            sleep(Duration::from_millis(100)).await;
            cache.on_pod_deleted(pod.uid).await;
        }
    );
    for answer in [known, anonymous, get(&cache, &pod).await] {
        assert!(matches!(answer, Err(Error::Token { .. })), "{answer:?}");
    }
    cache.prefetch(&pod);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(upstream.calls().len(), 0);
    assert!(cache.ready.is_empty() && cache.trusted.is_empty() && cache.lock().records.is_empty());

    // Nor does a token that EKS Auth accepts while the pod is removed.
    let (upstream, cache) = self::cache();
    upstream.change(|conditions| conditions.latency = Duration::from_millis(200));
    let (answer, ()) = tokio::join!(cache.for_token(sent_by(&pod), peer, within(800)), async {
        sleep(Duration::from_millis(100)).await;
        cache.on_pod_deleted(pod.uid).await;
    });
    assert!(are_of(&answer.unwrap(), pod.uid));
    assert!(cache.ready.is_empty() && cache.trusted.is_empty() && cache.lock().records.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_refused_refresh_keeps_the_cached_credentials() {
    for code in ["AccessDeniedException", "ResourceNotFoundException", "ExpiredTokenException"] {
        let (upstream, cache) = cache();
        let pod = Arc::new(pod("app", "web"));
        let first = get(&cache, &pod).await.unwrap();
        upstream.change(|conditions| conditions.weather = Weather::Says(400, code));
        for _ in 0..(6 * 60 - 1) {
            sleep(Duration::from_mins(1)).await;
            let answer = get(&cache, &pod).await.unwrap();
            assert_eq!(answer.access_key_id, first.access_key_id);
        }
        assert!(cache.metrics.below_floor.get() > 20, "{code}");
        sleep(Duration::from_mins(2)).await;
        assert!(matches!(get(&cache, &pod).await, Err(Error::Service(ServiceError { status: 400, .. }))));
    }
}

#[tokio::test(start_paused = true)]
async fn a_throttled_caller_is_told_so_and_its_fetch_continues() {
    let (upstream, cache) = cache();
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| {
        (conditions.throttle, conditions.retry_after) = (Some(0.0), Some(Duration::from_secs(2)));
    });
    // The bucket holds one call.
    get(&cache, &Arc::new(self::pod("app", "first"))).await.unwrap();
    let answer = get(&cache, &pod).await;
    assert!(matches!(&answer, Err(Error::Service(error)) if error.status == 429), "{answer:?}");
    upstream.change(|conditions| conditions.throttle = None);
    sleep(Duration::from_secs(2)).await;
    assert!(get(&cache, &pod).await.is_ok());
    assert_eq!(upstream.calls().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn prefetched_credentials_are_served_at_once_and_lapse_if_unused() {
    let (upstream, cache) = cache();
    let pods: Vec<_> = (0..20).map(|_| Arc::new(pod("app", "web"))).collect();
    for pod in &pods {
        cache.prefetch(pod);
    }
    sleep(Duration::from_secs(3)).await;
    let begun = TokioInstant::now();
    for pod in &pods {
        get(&cache, pod).await.unwrap();
    }
    assert_eq!((begun.elapsed(), upstream.calls().len()), (Duration::ZERO, 20));
    sleep(Duration::from_hours(24)).await;
    assert_eq!(upstream.calls().len(), 40, "once more for those who have asked once");
    assert!(cache.ready.is_empty() && cache.lock().records.is_empty());
}
