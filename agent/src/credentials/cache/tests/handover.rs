//! What a successor does with the credentials that it inherits.

use super::*;
use crate::identity::Pods;

/// The successor's cache, in the same world.
fn next(upstream: &Arc<FakeUpstream>, predecessor: &TestCache) -> TestCache {
    CredentialCache::start(
        Arc::clone(upstream),
        BUDGET,
        Arc::clone(&predecessor.clock),
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

async fn get_all(cache: &TestCache, pods: &[Arc<Pod>]) -> Vec<Arc<Credentials>> {
    let answers = futures::future::join_all(pods.iter().map(|pod| get(cache, pod))).await;
    answers.into_iter().map(Result::unwrap).collect()
}

#[tokio::test(start_paused = true)]
async fn inherited_credentials_are_served_without_a_call() {
    let (upstream, predecessor) = cache();
    let pods = pods(20);
    let before = get_all(&predecessor, &pods).await;
    let next = next(&upstream, &predecessor);
    next.stage(predecessor.to_transfer());
    assert!(next.ready.is_empty(), "not served before the pod is known");
    // The watch shows some pods before the rest.
    for pod in &pods[..10] {
        next.prefetch(pod);
    }
    next.adopt(&known(&pods));
    assert_eq!(get_all(&next, &pods).await, before);
    assert_eq!((upstream.calls().len(), next.metrics.transferred.get()), (20, 20));
}

#[tokio::test(start_paused = true)]
async fn credentials_of_unseen_or_changed_pods_are_not_adopted() {
    let (upstream, predecessor) = cache();
    let pods = pods(4);
    get_all(&predecessor, &pods).await;
    let next = next(&upstream, &predecessor);
    next.stage(predecessor.to_transfer());
    let renamed = Arc::new(Pod { uid: pods[0].uid, ..pod("app", "other") });
    let seen = [Arc::clone(&renamed), Arc::clone(&pods[1])];
    next.on_pod_deleted(pods[3].uid).await;
    next.adopt(&known(&seen));
    assert_eq!(next.metrics.transferred.get(), 1);
    sleep(absent::RETENTION).await;
    for (pod, calls) in [(&renamed, 5), (&pods[1], 5), (&pods[2], 6), (&pods[3], 7)] {
        assert!(are_of(&get(&next, pod).await.unwrap(), pod.uid));
        assert_eq!(upstream.calls().len(), calls);
    }
    assert!(next.lock().staged.is_empty());
}

#[tokio::test(start_paused = true)]
async fn credentials_that_the_predecessor_evicted_are_dropped() {
    let (upstream, predecessor) = cache();
    let pods = pods(2);
    get_all(&predecessor, &pods).await;
    let next = next(&upstream, &predecessor);
    next.stage(predecessor.to_transfer());
    predecessor.on_cgroup_removed(pods[1].uid).await;
    next.stage(predecessor.to_transfer());
    next.adopt(&known(&pods));
    assert_eq!((next.metrics.transferred.get(), next.ready.len()), (1, 1));
    assert!(next.unexpired(pods[1].uid).is_none());
}

#[tokio::test(start_paused = true)]
async fn credentials_staged_for_a_pod_without_cgroup_are_not_adopted() {
    let (upstream, predecessor) = cache();
    let pods = pods(3);
    get_all(&predecessor, &pods).await;
    let next = next(&upstream, &predecessor);
    next.stage(predecessor.to_transfer());
    for pod in &pods[..2] {
        next.on_pod_pending(pod.uid);
    }
    next.prefetch(&pods[0]);
    sleep(Duration::from_millis(100)).await;
    assert_eq!((upstream.calls().len(), next.metrics.transferred.get()), (4, 0), "it is fetched ahead");
    next.on_cgroup_created(pods[1].uid);
    next.adopt(&known(&pods));
    assert_eq!(next.metrics.transferred.get(), 2);
    assert_eq!(next.unexpired(pods[0].uid).unwrap().credentials.access_key_id, format!("{} 4", pods[0].uid));
}

#[tokio::test(start_paused = true)]
async fn inherited_credentials_that_expired_or_are_older_are_dropped() {
    let (upstream, predecessor) = cache();
    let pods = pods(2);
    get_all(&predecessor, &pods).await;
    let entries = predecessor.to_transfer();
    let next = next(&upstream, &predecessor);
    next.stage(entries.clone());
    // The predecessor has refreshed each of them since.
    sleep(Duration::from_hours(13)).await;
    next.adopt(&known(&pods));
    assert!(next.ready.is_empty() && next.lock().records.is_empty());
    assert!(predecessor.to_transfer().is_empty(), "nor is it given");

    let own = get(&next, &pods[0]).await.unwrap();
    let mut older = entries;
    let credentials =
        Credentials { expiration: own.expiration - SignedDuration::from_mins(1), ..(*own).clone() };
    older[0] = Transferred { pod: pods[0].uid, credentials: Arc::new(credentials), ..older[0].clone() };
    next.stage(older);
    next.adopt(&known(&pods));
    assert_eq!(get(&next, &pods[0]).await.unwrap(), own);
    assert_eq!(next.metrics.transferred.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn credentials_of_anonymous_callers_are_not_transferred() {
    let (_, predecessor) = cache();
    let pod = pod("app", "web");
    predecessor.for_token(sent_by(&pod), [10, 0, 0, 9].into(), within(800)).await.unwrap();
    assert_eq!((predecessor.ready.len(), predecessor.to_transfer().len()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn adopted_credentials_are_refreshed_as_planned_or_lapse_if_unused() {
    let (upstream, predecessor) = cache();
    let pods = pods(40);
    get_all(&predecessor, &pods).await;
    // Half of them keep asking.
    sleep(Duration::from_secs(1)).await;
    get_all(&predecessor, &pods[..20]).await;
    let entries = predecessor.to_transfer();
    let schedule_changed: HashMap<_, _> = entries.iter().map(|entry| (entry.pod, entry.refresh_at)).collect();
    let next = next(&upstream, &predecessor);
    next.stage(entries);
    next.adopt(&known(&pods));
    drop(predecessor);
    let begun = upstream.calls().len();
    sleep(Duration::from_hours(6)).await;
    let calls = upstream.calls();
    for call in &calls[begun..] {
        let late = call.at.duration_since(schedule_changed[&call.pod]);
        assert!(late >= SignedDuration::ZERO && late < SignedDuration::from_secs(5), "{late}");
    }
    assert!(calls.len() - begun >= 20, "{}", calls.len() - begun);
    assert_eq!(upstream.overlaps(), 0);
}
