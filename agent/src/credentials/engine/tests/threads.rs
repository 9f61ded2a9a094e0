//! Fetches that land while others ask and the pod goes: on threads that truly run at once. A checker of interleavings would
//! have to know the locks of the runtime and of the table of what is at hand, which are others'.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn whatever_lands_while_a_pod_goes_everybody_is_answered_and_nothing_is_left() {
    let (upstream, engine) = engine();
    for round in 0..400_u64 {
        let pod = Arc::new(pod("app", "web"));
        upstream.change(|conditions| conditions.latency = Duration::from_micros(round % 4 * 500));
        let callers: Vec<_> = (0..6)
            .map(|_| {
                let (engine, pod) = (Arc::clone(&engine), Arc::clone(&pod));
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
        let is_left =
            state.records.contains_key(&Key::Pod(pod.uid)) || engine.ready.pin().contains_key(&pod.uid);
        assert!(!is_left && state.plan.standing(pod.uid).is_none(), "round {round}");
    }
    assert_eq!((upstream.overlaps(), engine.lock().plan.flights()), (0, 0));
}
