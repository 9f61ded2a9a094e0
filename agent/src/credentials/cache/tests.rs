use std::sync::atomic::AtomicI64;

use jiff::SignedDuration;
use proptest::prelude::*;
use tokio::time::sleep;

use super::*;
use crate::{
    credentials::{ServiceError, token::issuer::Verdict},
    secret::Secret,
    testing::{
        pod,
        upstream::{Conditions, FakeUpstream, Weather, are_of, sent_by, virtual_clock},
    },
};

mod failing;
mod model;
mod threads;
mod transferred;

type TestCache = Arc<CredentialCache<Arc<FakeUpstream>>>;

fn engine() -> (Arc<FakeUpstream>, TestCache) {
    engine_at(virtual_clock())
}

fn engine_at(clock: Clock) -> (Arc<FakeUpstream>, TestCache) {
    let upstream = FakeUpstream::new(Arc::clone(&clock));
    let engine = CredentialCache::start(Arc::clone(&upstream), BUDGET, clock, 7, CacheMetrics::default());
    (upstream, engine)
}

fn within(millis: u64) -> Instant {
    (TokioInstant::now() + Duration::from_millis(millis)).into_std()
}

async fn get(engine: &TestCache, pod: &Arc<Pod>) -> Result<Arc<Credentials>, Error> {
    engine.for_pod(pod, None, Floor::Imds, within(800)).await
}

#[tokio::test(start_paused = true)]
async fn however_many_ask_one_call_is_made_and_shared() {
    let (upstream, engine) = engine();
    let pod = Arc::new(pod("app", "web"));
    let answers = futures::future::join_all((0..32).map(|_| get(&engine, &pod))).await;
    let first = answers[0].as_ref().unwrap().access_key_id.clone();
    assert!(answers.iter().all(|answer| answer.as_ref().unwrap().access_key_id == first));
    assert_eq!(upstream.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_error_is_shared() {
    let (upstream, engine) = engine();
    upstream.change(|conditions| conditions.weather = Weather::Says(400, "AccessDeniedException"));
    let pod = Arc::new(pod("app", "web"));
    let answers = futures::future::join_all((0..8).map(|_| get(&engine, &pod))).await;
    assert!(answers.iter().all(|answer| matches!(answer, Err(Error::Service(_)))), "{answers:?}");
    assert_eq!(upstream.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_caller_who_gives_up_leaves_the_call_to_the_next_one() {
    let (upstream, engine) = engine();
    upstream.change(|conditions| conditions.latency = Duration::from_secs(3));
    let pod = Arc::new(pod("app", "web"));
    assert!(matches!(get(&engine, &pod).await, Err(Error::Slow(_))));
    assert!(tokio::time::timeout(Duration::from_millis(20), get(&engine, &pod)).await.is_err());
    sleep(Duration::from_millis(1700)).await;
    assert!(get(&engine, &pod).await.is_ok());
    assert_eq!(upstream.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn each_pod_has_its_own_even_with_one_service_account() {
    let (_, engine) = engine();
    for _ in 0..2 {
        let pod = Arc::new(pod("app", "web"));
        assert!(are_of(&get(&engine, &pod).await.unwrap(), pod.uid));
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_for_another_service_account_is_not_handed_out() {
    let (_, engine) = engine();
    let web = Arc::new(pod("app", "web"));
    let other = Pod { uid: web.uid, ..pod("app", "other") };
    let answer = engine.for_pod(&web, Some(sent_by(&other)), Floor::Imds, within(800)).await;
    assert!(matches!(answer, Err(Error::Mismatch { .. })), "{answer:?}");
}

#[tokio::test(start_paused = true)]
async fn what_a_token_brings_serves_the_pod_s_callers_who_wait_for_their_turn() {
    let clock = virtual_clock();
    let upstream = FakeUpstream::new(Arc::clone(&clock));
    let one_call = Budget { per_second: 0.1, burst: 1.0 };
    let engine = CredentialCache::start(Arc::clone(&upstream), one_call, clock, 7, CacheMetrics::default());
    let (web, other) = (Arc::new(pod("app", "web")), Arc::new(pod("app", "other")));
    let (by_token, waits, in_vain) = tokio::join!(
        engine.for_token(sent_by(&web), [10, 0, 0, 9].into(), within(800)),
        tokio::time::timeout(Duration::from_millis(100), get(&engine, &web)),
        get(&engine, &other),
    );
    let waits = waits.expect("it is served when the token's fetch ends").unwrap();
    assert_eq!(by_token.unwrap().access_key_id, waits.access_key_id);
    assert!(matches!(in_vain, Err(Error::Slow(_))), "there was no call left for its turn");
    // The next call is not for the pod that needs none any more.
    sleep(Duration::from_secs(30)).await;
    let called: Vec<_> = upstream.calls().iter().map(|call| call.pod).collect();
    assert_eq!(called, [web.uid, other.uid]);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_nobody_can_verify_goes_to_eks_auth_itself_and_then_opens_the_cache() {
    let (upstream, engine) = engine();
    let pod = Arc::new(pod("app", "web"));
    get(&engine, &pod).await.unwrap();
    let peer = [10, 0, 0, 9].into();
    let mut forged = sent_by(&pod);
    forged.token = Secret::from("forged");
    for _ in 0..3 {
        let answer = engine.for_token(forged.clone(), peer, within(800)).await;
        assert!(matches!(answer, Err(Error::Service(_))), "{answer:?}");
    }
    // The address has to wait after that, and others need not.
    assert!(matches!(engine.for_token(sent_by(&pod), peer, within(800)).await, Err(Error::Busy)));
    for _ in 0..3 {
        let credentials = engine.for_token(sent_by(&pod), [10, 0, 0, 10].into(), within(800)).await.unwrap();
        assert!(are_of(&credentials, pod.uid));
    }
    assert_eq!(upstream.calls().len(), 2, "the pod's own, and the genuine token once");
}

#[tokio::test(start_paused = true)]
async fn a_verified_token_opens_the_cache_and_a_bad_one_goes_nowhere() {
    let (upstream, engine) = engine();
    let pod = Arc::new(pod("app", "web"));
    get(&engine, &pod).await.unwrap();
    let peer = [10, 0, 0, 9].into();
    upstream.change(|conditions| conditions.verdict = Verdict::Bad("its signature is wrong".into()));
    for answer in [
        engine.for_token(sent_by(&pod), peer, within(800)).await,
        engine.for_pod(&pod, Some(sent_by(&pod)), Floor::Container, within(800)).await,
    ] {
        assert!(matches!(answer, Err(Error::BadToken { .. })), "{answer:?}");
    }
    upstream.change(|conditions| conditions.verdict = Verdict::Good);
    engine.for_token(sent_by(&pod), peer, within(800)).await.unwrap();
    assert_eq!(upstream.calls().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_is_gone_leaves_nothing_not_even_a_call_under_way() {
    let (upstream, engine) = engine();
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| conditions.verdict = Verdict::Good);
    engine.for_pod(&pod, Some(sent_by(&pod)), Floor::Imds, within(800)).await.unwrap();
    engine.gone(pod.uid).await;
    assert!(engine.ready.is_empty() && engine.trusted.is_empty() && engine.lock().records.is_empty());

    let pod = Arc::new(self::pod("app", "web"));
    upstream.change(|conditions| conditions.weather = Weather::Hangs);
    let (answer, ()) = tokio::join!(get(&engine, &pod), async {
        sleep(Duration::from_millis(100)).await;
        engine.gone(pod.uid).await;
    });
    assert!(answer.is_err());
    upstream.change(|conditions| conditions.weather = Weather::Fair);
    engine.on_cgroup_created(pod.uid);
    get(&engine, &pod).await.unwrap();
    assert_eq!(upstream.overlaps(), 0, "the call was given up");
}

#[tokio::test(start_paused = true)]
async fn a_pod_whose_cgroup_is_gone_gets_nothing_for_as_long_as_the_api_server_shows_it() {
    let set = Arc::<AtomicI64>::default();
    let (offset, steady) = (Arc::clone(&set), virtual_clock());
    let (upstream, engine) =
        engine_at(Arc::new(move || steady() + SignedDuration::from_mins(offset.load(Relaxed))));
    let pod = Arc::new(pod("app", "web"));
    let ask_all = async || {
        engine.prefetch(&pod);
        [
            get(&engine, &pod).await,
            engine.for_pod(&pod, Some(sent_by(&pod)), Floor::Container, within(800)).await,
            engine.for_token(sent_by(&pod), [10, 0, 0, 9].into(), within(800)).await,
        ]
    };
    upstream.change(|conditions| conditions.verdict = Verdict::Good);
    assert!(ask_all().await.iter().all(Result::is_ok));
    engine.gone(pod.uid).await;
    for (passes, clock) in [(0, 0), (2, 0), (0, 2), (0, -5), (600, 0)] {
        sleep(Duration::from_mins(passes)).await;
        set.fetch_add(clock, Relaxed);
        for answer in ask_all().await {
            assert!(matches!(answer, Err(Error::Token { .. })), "after {passes}, {clock} min: {answer:?}");
        }
    }
    assert_eq!(upstream.calls().len(), 1);
    assert!(engine.ready.is_empty() && engine.trusted.is_empty() && engine.lock().records.is_empty());

    // The kubelet starts its containers anew.
    engine.on_cgroup_created(pod.uid);
    assert!(ask_all().await.iter().all(Result::is_ok));

    // The API server has it no more: what is on its way is given a minute.
    engine.gone(pod.uid).await;
    engine.forget(pod.uid).await;
    sleep(absent::REMEMBERED / 2).await;
    assert!(ask_all().await.iter().all(Result::is_err));
    sleep(absent::REMEMBERED / 2).await;
    assert!(engine.for_token(sent_by(&pod), [10, 0, 0, 9].into(), within(800)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn what_is_on_its_way_for_a_pod_that_is_gone_brings_nothing_back() {
    let (upstream, engine) = engine();
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| {
        (conditions.verdict, conditions.judging) = (Verdict::Good, Duration::from_millis(200));
    });
    let peer = [10, 0, 0, 9].into();
    let (known, anonymous, ()) = tokio::join!(
        engine.for_pod(&pod, Some(sent_by(&pod)), Floor::Container, within(800)),
        engine.for_token(sent_by(&pod), peer, within(800)),
        async {
            sleep(Duration::from_millis(100)).await;
            engine.forget(pod.uid).await;
        }
    );
    for answer in [known, anonymous, get(&engine, &pod).await] {
        assert!(matches!(answer, Err(Error::Token { .. })), "{answer:?}");
    }
    engine.prefetch(&pod);
    sleep(Duration::from_secs(5)).await;
    assert_eq!(upstream.calls().len(), 0);
    assert!(engine.ready.is_empty() && engine.trusted.is_empty() && engine.lock().records.is_empty());

    // Nor does a token that EKS Auth takes, while the pod goes.
    let (upstream, engine) = self::engine();
    upstream.change(|conditions| conditions.latency = Duration::from_millis(200));
    let (answer, ()) = tokio::join!(engine.for_token(sent_by(&pod), peer, within(800)), async {
        sleep(Duration::from_millis(100)).await;
        engine.forget(pod.uid).await;
    });
    assert!(are_of(&answer.unwrap(), pod.uid));
    assert!(engine.ready.is_empty() && engine.trusted.is_empty() && engine.lock().records.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_refusal_on_refresh_does_not_throw_away_what_is_good() {
    for code in ["AccessDeniedException", "ResourceNotFoundException", "ExpiredTokenException"] {
        let (upstream, engine) = engine();
        let pod = Arc::new(pod("app", "web"));
        let first = get(&engine, &pod).await.unwrap();
        upstream.change(|conditions| conditions.weather = Weather::Says(400, code));
        for _ in 0..(6 * 60 - 1) {
            sleep(Duration::from_mins(1)).await;
            let answer = get(&engine, &pod).await.unwrap();
            assert_eq!(answer.access_key_id, first.access_key_id);
        }
        assert!(engine.metrics.below_floor.get() > 20, "{code}");
        sleep(Duration::from_mins(2)).await;
        assert!(matches!(get(&engine, &pod).await, Err(Error::Service(ServiceError { status: 400, .. }))));
    }
}

#[tokio::test(start_paused = true)]
async fn a_throttled_caller_is_told_so_and_its_fetch_goes_on() {
    let (upstream, engine) = engine();
    let pod = Arc::new(pod("app", "web"));
    upstream.change(|conditions| {
        (conditions.throttle, conditions.retry_after) = (Some(0.0), Some(Duration::from_secs(2)));
    });
    // The bucket has one.
    get(&engine, &Arc::new(self::pod("app", "first"))).await.unwrap();
    let answer = get(&engine, &pod).await;
    assert!(matches!(&answer, Err(Error::Service(error)) if error.status == 429), "{answer:?}");
    upstream.change(|conditions| conditions.throttle = None);
    sleep(Duration::from_secs(2)).await;
    assert!(get(&engine, &pod).await.is_ok());
    assert_eq!(upstream.calls().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_prefetched_pod_s_first_request_is_warm_and_one_nobody_asks_for_lapses() {
    let (upstream, engine) = engine();
    let pods: Vec<_> = (0..20).map(|_| Arc::new(pod("app", "web"))).collect();
    for pod in &pods {
        engine.prefetch(pod);
    }
    sleep(Duration::from_secs(3)).await;
    let begun = TokioInstant::now();
    for pod in &pods {
        get(&engine, pod).await.unwrap();
    }
    assert_eq!((begun.elapsed(), upstream.calls().len()), (Duration::ZERO, 20));
    sleep(Duration::from_hours(24)).await;
    assert_eq!(upstream.calls().len(), 40, "once more for those who have asked once");
    assert!(engine.ready.is_empty() && engine.lock().records.is_empty());
}
