//! The circuit breaker, and what an outage leaves behind.

use super::*;

#[test]
fn an_open_circuit_probes_every_two_seconds() {
    let mut world = World::new(|_, _| Outcome::Failed(Failure::Outage));
    let pods: Vec<_> = (0..50).map(|_| pod_uid()).collect();
    for _ in 0..600 {
        for uid in &pods {
            world.ask(*uid);
        }
        world.pass(SignedDuration::from_millis(100));
    }
    assert!(world.scheduler.eks_auth_is_unavailable());
    let late = world.begun.iter().filter(|(at, ..)| *at > START + secs(30)).count();
    assert!((15..=21).contains(&late), "in thirty seconds: {late}");
    assert!(matches!(world.ask(pod_uid()), Answer::Joined { likely: false }));
}

#[test]
fn a_node_with_few_pods_opens_the_circuit_too() {
    for count in 1..4 {
        let mut world = World::new(|_, _| Outcome::Failed(Failure::Outage));
        let pods: Vec<_> = (0..count).map(|_| pod_uid()).collect();
        for uid in &pods {
            world.ask(*uid);
        }
        world.pass(secs(2));
        assert!(world.scheduler.eks_auth_is_unavailable(), "{count}");
        assert_eq!(world.ask(pods[0]), Answer::Joined { likely: false }, "{count}");
    }
}

#[test]
fn one_failing_pod_does_not_open_the_circuit() {
    let bad = pod_uid();
    let mut world = World::new(move |key, now| {
        if key == Key::Pod(bad) { Outcome::Failed(Failure::Outage) } else { lives(360)(key, now) }
    });
    for _ in 0..100 {
        world.ask(bad);
        world.ask(pod_uid());
        world.pass(SignedDuration::from_millis(200));
        assert!(!world.scheduler.eks_auth_is_unavailable());
    }
}

#[test]
fn the_failure_is_remembered_when_credentials_expire_in_an_outage() {
    let begun = START + secs(1);
    let mut world =
        World::new(
            move |key, now| {
                if now < begun { lives(20)(key, now) } else { Outcome::Failed(Failure::Outage) }
            },
        );
    let uid = pod_uid();
    world.ask(uid);
    for _ in 0..21 {
        world.pass(secs(60));
        world.ask(uid);
    }
    assert!(world.scheduler.entries[&Key::Pod(uid)].failed.is_some_and(|failed| failed.times >= 2));
    assert_eq!(world.scheduler.count_failing(world.now), (0, 1));
    world.pass(SignedDuration::from_mins(11));
    assert!(world.scheduler.entries.is_empty(), "but not forever");
}

#[test]
fn a_clock_that_is_set_back_after_an_outage_stops_nothing() {
    let weather = std::rc::Rc::new(std::cell::Cell::new(true));
    let is_fair = std::rc::Rc::clone(&weather);
    let mut world =
        World::new(
            move |key, now| {
                if is_fair.get() { lives(360)(key, now) } else { Outcome::Failed(Failure::Outage) }
            },
        );
    weather.set(false);
    let pods: Vec<_> = (0..5).map(|_| pod_uid()).collect();
    for uid in &pods {
        world.ask(*uid);
    }
    world.pass(secs(5));
    assert!(world.scheduler.eks_auth_is_unavailable());
    weather.set(true);
    world.ask(pods[0]);
    world.pass(secs(5));
    assert!(!world.scheduler.eks_auth_is_unavailable());
    world.now -= SignedDuration::from_hours(5);
    weather.set(false);
    let (before, other) = (world.begun.len(), pod_uid());
    for _ in 0..50 {
        world.ask(other);
        world.pass(SignedDuration::from_millis(200));
    }
    let calls = world.begun.len() - before;
    assert!(calls < 20, "what fails now is no leftover of the outage: {calls} calls in ten seconds");
    assert!(world.scheduler.eks_auth_is_unavailable());
}

#[test]
fn pods_without_a_token_retry_one_by_one_until_one_has_a_token() {
    let weather = std::rc::Rc::new(std::cell::Cell::new(false));
    let has_tokens = std::rc::Rc::clone(&weather);
    let mut world =
        World::new(
            move |key, now| {
                if has_tokens.get() { lives(360)(key, now) } else { Outcome::Failed(Failure::NoToken) }
            },
        );
    world.scheduler = Scheduler::new(Budget { per_second: 100.0, burst: 100.0 }, 7, START);
    let pods: Vec<_> = (0..100).map(|_| pod_uid()).collect();
    let mut attempts = Vec::new();
    for _ in 0..3_000 {
        for uid in &pods {
            world.ask(*uid);
        }
        world.pass(SignedDuration::from_millis(100));
        attempts.push(world.begun.len());
    }
    let late = attempts[2_999] - attempts[1_499];
    assert!((30..=160).contains(&late), "in the last 150 s: {late}");
    weather.set(true);
    for _ in 0..50 {
        for uid in &pods {
            world.ask(*uid);
        }
        world.pass(SignedDuration::from_millis(100));
    }
    assert_eq!(world.lives.len(), 100, "all have theirs within five seconds");
    let mut alone = World::new(|_, _| Outcome::Failed(Failure::NoToken));
    for _ in 0..6_000 {
        alone.ask(pods[0]);
        alone.pass(SignedDuration::from_millis(100));
    }
    assert!(alone.begun.len() <= 80, "in ten minutes: {}", alone.begun.len());
}

#[test]
fn a_pod_without_a_token_does_not_consume_the_probe() {
    let [good, bad] = [pod_uid(), pod_uid()];
    let weather = std::rc::Rc::new(std::cell::Cell::new(false));
    let is_fair = std::rc::Rc::clone(&weather);
    let mut world = World::new(move |key, now| match is_fair.get() {
        _ if key == Key::Pod(bad) => Outcome::Failed(Failure::NoToken),
        true => lives(360)(key, now),
        false => Outcome::Failed(Failure::Outage),
    });
    for _ in 0..30 {
        world.ask(good);
        world.pass(SignedDuration::from_millis(100));
    }
    assert!(world.scheduler.eks_auth_is_unavailable());
    weather.set(true);
    // Its turn is first.
    world.ask(bad);
    world.ask(good);
    let before = world.now;
    while !world.lives.contains_key(&Key::Pod(good)) {
        world.pass(SignedDuration::from_millis(50));
        world.ask(bad);
        world.ask(good);
    }
    let took = world.now.duration_since(before);
    assert!(took <= SignedDuration::from_millis(2_300), "{took}");
}

#[test]
fn a_refused_token_closes_the_circuit() {
    let mut world = World::new(|_, now| match now {
        now if now < START + secs(10) => Outcome::Failed(Failure::Outage),
        now if now < START + secs(14) => Outcome::TokenRefused,
        _ => lives(360)(Key::Token([0; 32]), now),
    });
    let uids = [pod_uid(), pod_uid(), pod_uid()];
    for _ in 0..12 {
        for uid in uids {
            world.ask(uid);
        }
        world.pass(secs(1));
    }
    assert!(!world.scheduler.eks_auth_is_unavailable());
    world.pass(secs(5));
    assert_eq!((world.lives.len(), world.scheduler.in_flight()), (3, 0));
}

#[test]
fn credentials_from_elsewhere_clear_the_failure() {
    let mut world = World::new(|_, _| Outcome::Failed(Failure::Refused));
    let uid = pod_uid();
    world.ask(uid);
    world.pass(secs(1));
    assert_eq!(world.ask(uid), Answer::Refused);
    let life = Life { obtained_at: world.now, expiration: world.now + SignedDuration::from_hours(6) };
    world.scheduler.on_credentials(uid, life, world.now);
    assert_eq!(world.ask(uid), Answer::Joined { likely: true });
}
