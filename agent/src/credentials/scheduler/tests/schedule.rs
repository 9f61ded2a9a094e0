//! Refreshes, prefetches, retries, and what is removed.

use super::*;

#[test]
fn used_credentials_are_refreshed_and_unused_ones_lapse() {
    let mut world = World::new(lives(360));
    let [busy, idle] = [pod_uid(), pod_uid()];
    world.ask(busy);
    world.ask(idle);
    for _ in 0..96 {
        world.pass(SignedDuration::from_mins(15));
        world.scheduler.asked(Key::Pod(busy), world.now);
    }
    // Credentials used once are refreshed once.
    assert_eq!(world.calls_of(idle), 2);
    assert!(world.dropped.contains(&Key::Pod(idle)) && !world.dropped.contains(&Key::Pod(busy)));
    let calls = world.calls_of(busy);
    assert!((5..=9).contains(&calls), "a day of six-hour credentials: {calls}");
}

#[test]
fn credentials_used_again_after_a_lapse_are_refreshed() {
    let mut world = World::new(lives(360));
    let uid = pod_uid();
    world.ask(uid);
    world.pass(SignedDuration::from_mins(500));
    let before = world.calls_of(uid);
    assert_eq!(before, 2, "refreshed once, and lapsing");
    world.scheduler.asked(Key::Pod(uid), world.now);
    world.act();
    assert_eq!(world.begun.last().map(|(_, _, priority)| *priority), Some(Priority::Refresh));
}

#[test]
fn refusals_are_remembered_longer_and_longer() {
    let mut world = World::new(|_, _| Outcome::Failed(Failure::Refused));
    let uid = pod_uid();
    let mut after = Vec::new();
    for _ in 0..36_000 {
        world.ask(uid);
        world.pass(SignedDuration::from_millis(100));
        after.push(world.calls_of(uid));
    }
    assert!(after[599] <= 4, "in the first minute: {}", after[599]);
    let (half, hour) = (after[17_999], after[35_999]);
    assert!(hour - half <= 8, "in the second half hour: {}", hour - half);
    // Another pod starts clean, whatever its service account.
    assert!(matches!(world.ask(pod_uid()), Answer::Joined { likely: true }));
}

#[test]
fn one_lost_answer_is_retried_before_any_caller_sees_it() {
    let mut calls = 0;
    let mut world = World::new(move |_, now| {
        calls += 1;
        if calls == 1 { Outcome::Failed(Failure::Outage) } else { lives(360)(Key::Pod(pod_uid()), now) }
    });
    let uid = pod_uid();
    world.ask(uid);
    world.pass(SignedDuration::from_millis(250));
    assert!(world.lives.contains_key(&Key::Pod(uid)));
    assert_eq!(world.calls_of(uid), 2);
}

#[test]
fn pods_without_a_token_do_not_affect_others() {
    let good = pod_uid();
    let mut world = World::new(move |key, now| {
        if key == Key::Pod(good) { lives(360)(key, now) } else { Outcome::Failed(Failure::NoToken) }
    });
    for _ in 0..200 {
        for _ in 0..5 {
            world.ask(pod_uid());
        }
        world.pass(SignedDuration::from_millis(100));
    }
    assert!(!world.scheduler.eks_auth_is_unavailable());
    world.ask(good);
    world.pass(SignedDuration::from_millis(200));
    assert!(world.lives.contains_key(&Key::Pod(good)));
}

#[test]
fn a_prefetch_comes_last_and_is_promoted_when_its_pod_asks() {
    let mut world = World::new(lives(360));
    world.takes = secs(1);
    let pods: Vec<_> = (0..40).map(|_| pod_uid()).collect();
    for uid in &pods {
        world.scheduler.prefetch(*uid, world.now);
    }
    world.act();
    let last = pods[39];
    world.ask(last);
    assert_eq!(world.begun.last(), Some(&(START, Key::Pod(last), Priority::Foreground)));
    world.pass(secs(60));
    assert!(pods.iter().all(|uid| world.calls_of(*uid) == 1));
}

#[test]
fn a_refused_prefetch_is_retried_when_the_pod_asks() {
    let mut calls = 0;
    let mut world = World::new(move |key, now| {
        calls += 1;
        if calls <= 2 { Outcome::Failed(Failure::Refused) } else { lives(360)(key, now) }
    });
    let uid = pod_uid();
    world.scheduler.prefetch(uid, START);
    world.act();
    world.pass(secs(12));
    assert_eq!((world.calls_of(uid), world.lives.len()), (2, 0));
    assert_eq!(world.ask(uid), Answer::Joined { likely: true });
    world.pass(secs(1));
    assert!(world.lives.contains_key(&Key::Pod(uid)));
}

#[test]
fn a_prefetch_with_a_waiter_is_retried_in_the_foreground() {
    for outcome in [Outcome::Throttled(None), Outcome::Failed(Failure::Outage)] {
        let mut calls = 0;
        let mut world = World::new(move |key, now| {
            calls += 1;
            if calls == 1 { outcome } else { lives(360)(key, now) }
        });
        let uid = pod_uid();
        world.scheduler.prefetch(uid, START);
        world.act();
        world.ask(uid);
        world.pass(secs(10));
        let priorities: Vec<_> = world.begun.iter().map(|(_, _, priority)| *priority).collect();
        assert_eq!(priorities, [Priority::Prefetch, Priority::Foreground], "{outcome:?}");
    }
}

#[test]
fn a_fetch_that_awaits_its_token_gives_up_its_slot() {
    let mut world = World::new(lives(360));
    world.takes = secs(5);
    world.scheduler = Scheduler::new(Budget { per_second: 1.0, burst: 1.0 }, 7, START);
    let [slow, next] = [pod_uid(), pod_uid()];
    world.ask(slow);
    world.ask(next);
    assert_eq!((world.calls_of(slow), world.calls_of(next)), (1, 0));
    world.scheduler.awaits_token(Key::Pod(slow), world.now);
    world.act();
    assert_eq!((world.calls_of(slow), world.calls_of(next)), (1, 1), "it has its budget, too");
    assert_eq!(world.scheduler.in_flight(), 2);
    assert_eq!(world.scheduler.completed(Key::Pod(slow), Outcome::HasToken, world.now), Completion::Retrying);
    world.under_way.retain(|_, key| *key != Key::Pod(slow));
    world.act();
    world.pass(secs(20));
    assert_eq!((world.calls_of(slow), world.lives.len(), world.scheduler.in_flight()), (2, 2, 0));
}

#[test]
fn a_clock_that_is_set_back_takes_the_schedule_along() {
    let mut world = World::new(lives(60));
    let uid = pod_uid();
    world.ask(uid);
    world.pass(secs(10));
    world.now -= SignedDuration::from_hours(5);
    world.scheduler.asked(Key::Pod(uid), world.now);
    world.act();
    world.pass(SignedDuration::from_mins(25));
    assert_eq!(world.calls_of(uid), 2, "the refresh has come in its time");
    world.ask(pod_uid());
    assert_eq!(world.begun.len(), 3, "and the budget was not stopped");
}

#[test]
fn nothing_is_left_of_a_removed_pod() {
    let mut world = World::new(lives(60));
    let uids: Vec<_> = (0..30).map(|_| pod_uid()).collect();
    for uid in &uids {
        world.ask(*uid);
    }
    for uid in &uids {
        world.scheduler.remove(Key::Pod(*uid));
    }
    let scheduler = &world.scheduler;
    assert!(
        scheduler.entries.is_empty()
            && scheduler.timers.next_at().is_none()
            && scheduler.queue.first().is_none()
    );
    assert_eq!((scheduler.calling, scheduler.in_flight(), scheduler.wake_at()), (0, 0, None));
}
