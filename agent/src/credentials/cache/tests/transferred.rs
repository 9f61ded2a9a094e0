//! What the next agent makes of what the former one gives it.

use super::*;
use crate::identity::Pods;

/// The next agent's engine, in the same world.
fn next(upstream: &Arc<FakeUpstream>, former: &TestCache) -> TestCache {
    CredentialCache::start(
        Arc::clone(upstream),
        BUDGET,
        Arc::clone(&former.clock),
        8,
        CacheMetrics::default(),
    )
}

fn known(pods: &[Arc<Pod>]) -> Pods {
    let table = Pods::default();
    for pod in pods {
        table.insert(pod);
    }
    table
}

fn pods(count: usize) -> Vec<Arc<Pod>> {
    (0..count).map(|number| Arc::new(pod("app", &format!("web{number}")))).collect()
}

async fn get_all(engine: &TestCache, pods: &[Arc<Pod>]) -> Vec<Arc<Credentials>> {
    let answers = futures::future::join_all(pods.iter().map(|pod| get(engine, pod))).await;
    answers.into_iter().map(Result::unwrap).collect()
}

#[tokio::test(start_paused = true)]
async fn what_was_handed_over_is_served_without_a_call() {
    let (upstream, former) = engine();
    let pods = pods(20);
    let before = get_all(&former, &pods).await;
    let next = next(&upstream, &former);
    next.hold(former.to_transfer());
    assert!(next.ready.is_empty(), "nobody's before its pod is known");
    // The watch shows some before it has shown all.
    for pod in &pods[..10] {
        next.prefetch(pod);
    }
    next.adopt(&known(&pods));
    assert_eq!(get_all(&next, &pods).await, before);
    assert_eq!((upstream.calls().len(), next.metrics.transferred.get()), (20, 20));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_believed_of_a_pod_that_is_not_seen_or_has_another_service_account() {
    let (upstream, former) = engine();
    let pods = pods(4);
    get_all(&former, &pods).await;
    let next = next(&upstream, &former);
    next.hold(former.to_transfer());
    let renamed = Arc::new(Pod { uid: pods[0].uid, ..pod("app", "other") });
    let seen = [Arc::clone(&renamed), Arc::clone(&pods[1])];
    next.forget(pods[3].uid).await;
    next.adopt(&known(&seen));
    assert_eq!(next.metrics.transferred.get(), 1);
    sleep(absent::REMEMBERED).await;
    for (pod, calls) in [(&renamed, 5), (&pods[1], 5), (&pods[2], 6), (&pods[3], 7)] {
        assert!(are_of(&get(&next, pod).await.unwrap(), pod.uid));
        assert_eq!(upstream.calls().len(), calls);
    }
    assert!(next.lock().held.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_the_former_agent_has_dropped_meanwhile_is_dropped() {
    let (upstream, former) = engine();
    let pods = pods(2);
    get_all(&former, &pods).await;
    let next = next(&upstream, &former);
    next.hold(former.to_transfer());
    former.gone(pods[1].uid).await;
    next.hold(former.to_transfer());
    next.adopt(&known(&pods));
    assert_eq!((next.metrics.transferred.get(), next.ready.len()), (1, 1));
    assert!(next.alive(pods[1].uid).is_none());
}

#[tokio::test(start_paused = true)]
async fn what_is_held_for_a_pod_without_a_cgroup_is_not_its_own() {
    let (upstream, former) = engine();
    let pods = pods(3);
    get_all(&former, &pods).await;
    let next = next(&upstream, &former);
    next.hold(former.to_transfer());
    for pod in &pods[..2] {
        next.on_pod_pending(pod.uid);
    }
    next.prefetch(&pods[0]);
    sleep(Duration::from_millis(100)).await;
    assert_eq!((upstream.calls().len(), next.metrics.transferred.get()), (4, 0), "it is fetched ahead");
    next.on_cgroup_created(pods[1].uid);
    next.adopt(&known(&pods));
    assert_eq!(next.metrics.transferred.get(), 2);
    assert_eq!(next.alive(pods[0].uid).unwrap().credentials.access_key_id, format!("{} 4", pods[0].uid));
}

#[tokio::test(start_paused = true)]
async fn what_has_expired_or_is_older_than_one_s_own_is_dropped() {
    let (upstream, former) = engine();
    let pods = pods(2);
    get_all(&former, &pods).await;
    let entries = former.to_transfer();
    let next = next(&upstream, &former);
    next.hold(entries.clone());
    // Each has been refreshed once meanwhile.
    sleep(Duration::from_hours(13)).await;
    next.adopt(&known(&pods));
    assert!(next.ready.is_empty() && next.lock().records.is_empty());
    assert!(former.to_transfer().is_empty(), "nor is it given");

    let own = get(&next, &pods[0]).await.unwrap();
    let mut older = entries;
    let credentials =
        Credentials { expiration: own.expiration - SignedDuration::from_mins(1), ..(*own).clone() };
    older[0] = Transferred { pod: pods[0].uid, credentials: Arc::new(credentials), ..older[0].clone() };
    next.hold(older);
    next.adopt(&known(&pods));
    assert_eq!(get(&next, &pods[0]).await.unwrap(), own);
    assert_eq!(next.metrics.transferred.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_a_caller_brought_in_whose_pod_nobody_vouched_for_stays() {
    let (_, former) = engine();
    let pod = pod("app", "web");
    former.for_token(sent_by(&pod), [10, 0, 0, 9].into(), within(800)).await.unwrap();
    assert_eq!((former.ready.len(), former.to_transfer().len()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn an_adopted_pod_is_refreshed_as_planned_and_one_that_nobody_asks_for_lapses() {
    let (upstream, former) = engine();
    let pods = pods(40);
    get_all(&former, &pods).await;
    // Half of them go on asking.
    sleep(Duration::from_secs(1)).await;
    get_all(&former, &pods[..20]).await;
    let entries = former.to_transfer();
    let planned: HashMap<_, _> = entries.iter().map(|entry| (entry.pod, entry.refresh_at)).collect();
    let next = next(&upstream, &former);
    next.hold(entries);
    next.adopt(&known(&pods));
    drop(former);
    let begun = upstream.calls().len();
    sleep(Duration::from_hours(6)).await;
    let calls = upstream.calls();
    for call in &calls[begun..] {
        let late = call.at.duration_since(planned[&call.pod]);
        assert!(late >= SignedDuration::ZERO && late < SignedDuration::from_secs(5), "{late}");
    }
    assert!(calls.len() - begun >= 20, "{}", calls.len() - begun);
    assert_eq!(upstream.overlaps(), 0);
}
